"""Stages of the demo with their times, and a bar for the one that has steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Prints ``[2/6] what ... 3.1 s`` on stderr and keeps the seconds of every stage by its key."""

    def __init__(self, total: int):
        self.total = total
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, key: str, what: str) -> Iterator[None]:
        at = f"[{len(self.seconds) + 1}/{self.total}]"
        print(f"{at} {what} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        yield
        self.seconds[key] = time.perf_counter() - start
        print(f"{at} done in {self.seconds[key]:.1f} s", file=sys.stderr, flush=True)


class Bar:
    """A bar of ``total`` steps on stderr, redrawn in place on a terminal and silent elsewhere."""

    def __init__(self, total: int):
        self.total, self.done = total, 0

    def tick(self) -> None:
        self.done += 1
        if sys.stderr.isatty():
            filled = 30 * self.done // self.total
            end = "\n" if self.done == self.total else ""
            line = f"\r      [{'#' * filled}{'.' * (30 - filled)}] {self.done}/{self.total}"
            print(line, end=end, file=sys.stderr, flush=True)
