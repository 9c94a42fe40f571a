"""What the backends share that hand addresses to an extension or a kernel."""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType

import torch


def load(name: str) -> tuple[ModuleType | None, str]:
    """The extension latemax.ops.<name>, and why there is none; empty if there is."""
    try:
        return importlib.import_module(f"latemax.ops.{name}"), ""
    except ImportError as error:
        return None, "not built" if isinstance(error, ModuleNotFoundError) else str(error)


def address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def on(device: torch.device):
    """Launches go to the tensors' device, whichever is current."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
