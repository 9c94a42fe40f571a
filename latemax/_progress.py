"""A progress bar on stderr for work that takes more than a moment."""

from __future__ import annotations

import sys


class Bar:
    """A progress bar on stderr, redrawn in place on a terminal and silent everywhere else.

    Args:
        total: the number of steps.
        label: text printed before the bar.
    """

    def __init__(self, total: int, label: str = "") -> None:
        self.total, self.done, self.label = total, 0, label

    def tick(self, steps: int = 1) -> None:
        """Moves the bar forward by ``steps``."""
        self.done += steps
        if sys.stderr.isatty():
            filled = 30 * self.done // self.total
            end = "\n" if self.done == self.total else ""
            line = f"\r      {self.label}[{'#' * filled}{'.' * (30 - filled)}] {self.done}/{self.total}"
            print(line, end=end, file=sys.stderr, flush=True)
