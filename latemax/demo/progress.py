"""The stages of the demo and their times."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Prints the start and the end of every stage on stderr and keeps its duration in ``seconds``, by key."""

    def __init__(self, total: int) -> None:
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
