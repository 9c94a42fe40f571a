"""One adapter per encoder family, chosen by what a model owns, never by a library's version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from . import hf, open_clip, timm, torchvision
from .base import Adapter
from .custom import CustomAdapter
from .wrappers import unwrap, why_opaque

# Most particular first: a TimmModel of open_clip holds a timm model, and a timm model may hold anything.
FAMILIES = (open_clip, timm, torchvision, hf)


def find_adapter(model: nn.Module | Callable[..., Any], n_prefix: int | None = None) -> Adapter:
    """The adapter for ``model``.

    Args:
        model: A module, perhaps inside a wrapper, or a callable.
        n_prefix: Overrides the prefix count; it is what makes an unknown module or callable usable.

    Raises:
        TypeError: ``model`` is neither a module nor a callable.
        ValueError: Unknown, unsuitable or wrapped model; the message says what to do.
    """
    if n_prefix is not None and (not isinstance(n_prefix, int) or isinstance(n_prefix, bool) or n_prefix < 0):
        raise ValueError(f"n_prefix must be an int >= 0 or None, got {n_prefix!r}")
    if not callable(model):
        raise TypeError(f"model must be an nn.Module or a callable, got {type(model).__name__}")
    adapter, opaque = None, None
    inner = model if isinstance(model, nn.Module) else None
    while inner is not None and adapter is None:
        adapter = next(filter(None, (family.matches(inner) for family in FAMILIES)), None)
        opaque = why_opaque(inner)
        inner = unwrap(inner)
    if adapter is None:
        if n_prefix is None:
            raise ValueError(
                opaque
                or f"model: {type(model).__name__} is no encoder family known here. Pass n_prefix=<how many leading "
                f"tokens are not patches> with a module or callable that returns [b, n_prefix + n, dim] tokens; a "
                f"convolutional model can return (feature_map.flatten(2).mT, (rows, cols)) with n_prefix=0"
            )
        adapter = CustomAdapter(model)
    if n_prefix is not None:
        adapter.n_prefix = n_prefix
    return adapter


__all__ = ["Adapter", "find_adapter"]
