"""Host libraries kept off the terminal while one of our calls runs, on any number of threads."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

LIBRARIES = ("transformers", "huggingface_hub", "sentence_transformers", "open_clip", "timm")

_lock = threading.Lock()
# Calls that are running, and what puts the terminal's settings back after the last of them. The warning filters and the
# loggers are the process's own: restored by each thread on its own, they would come back in the wrong order.
_running = 0
_undo = ExitStack()


@contextmanager
def quiet(progress: bool = False, *, loads: str | None = None) -> Iterator[None]:
    """Hides warnings, log lines and progress bars of the host libraries; errors still raise.

    Args:
        progress: True changes nothing: the libraries show what they like.
        loads: A library that the call will import. It is imported first, because it sets up its logging then.
    """
    global _running
    if progress:
        yield
        return
    if loads is not None:
        # Without it the call itself says what to install.
        with suppress(ImportError):
            importlib.import_module(loads)
    with _lock:
        if not _running:
            _undo.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _silence()
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                _undo.close()


def _silence() -> None:
    """Silences what is imported by now and is not silent yet; `loads` makes sure of what a call will import."""
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        if name in sys.modules and logger.level != logging.CRITICAL:
            _undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
    transformers = sys.modules.get("transformers")
    if transformers is not None and transformers.utils.logging.is_progress_bar_enabled():
        transformers.utils.logging.disable_progress_bar()
        _undo.callback(transformers.utils.logging.enable_progress_bar)
    hub = sys.modules.get("huggingface_hub")
    if hub is not None and not hub.utils.are_progress_bars_disabled():
        hub.utils.disable_progress_bars()
        _undo.callback(hub.utils.enable_progress_bars)
