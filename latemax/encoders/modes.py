"""Eval mode for as long as an ``encode`` runs, on any number of threads."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_lock = threading.Lock()
# Modules that were in training mode when the first running encode came to them, with the number of encodes that hold
# them in eval mode. Kept for modules, not for encoders: two encoders may share a model.
_held: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Holds every module below ``module`` in eval mode, then gives each one its own mode back.

    Only the modules that are in training mode are touched: where none is, no mode changes. With several threads inside,
    modes come back when the last one leaves, so no thread sees training mode in the middle of its batches. The flags
    are set directly, because ``module.train(False)`` may do more (loralib merges its weights there).
    """
    with _lock:
        mine = [part for part in module.modules() if part.training or part in _held]
        for part in mine:
            _held[part] = _held.get(part, 0) + 1
            part.training = False
    try:
        yield
    finally:
        with _lock:
            for part in mine:
                _held[part] -= 1
                if not _held[part]:
                    del _held[part]
                    part.training = True
