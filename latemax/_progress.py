"""A progress bar on stderr for whatever takes a while."""

from __future__ import annotations

import sys


class Bar:
    """A bar of ``total`` steps on stderr, redrawn in place on a terminal and silent elsewhere."""

    def __init__(self, total: int, label: str = ""):
        self.total, self.done, self.label = total, 0, label

    def tick(self, steps: int = 1) -> None:
        self.done += steps
        if sys.stderr.isatty():
            filled = 30 * self.done // self.total
            end = "\n" if self.done == self.total else ""
            line = f"\r      {self.label}[{'#' * filled}{'.' * (30 - filled)}] {self.done}/{self.total}"
            print(line, end=end, file=sys.stderr, flush=True)
