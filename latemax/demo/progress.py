"""The stages of the demo, their times, and the thread that the small ones run on."""

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread, where calls are too small for two.

    On two cores with other work, 300 training steps of words took 1.2 to 36 s on two threads and 2.2 s on one; a call
    of the simulation 295 ms and 6 ms.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
