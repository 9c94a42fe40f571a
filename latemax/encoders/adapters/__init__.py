"""One adapter per encoder family, chosen by the attributes a model has, never by a library's version."""

from __future__ import annotations

from torch import nn

from . import hf, open_clip, timm, torchvision
from .base import Adapter
from .custom import CustomAdapter

# Most particular first: a TimmModel of open_clip holds a timm model, and a timm model may hold anything.
FAMILIES = (open_clip, timm, torchvision, hf)


def find_adapter(model, n_prefix: int | None = None) -> Adapter:
    """The adapter for `model`; `n_prefix` overrides its prefix count and is what makes an unknown module or callable
    usable.

    Raises:
        TypeError: `model` is neither a module nor a callable.
        ValueError: unknown or unsuitable model, saying what to do.
    """
    if n_prefix is not None and (not isinstance(n_prefix, int) or isinstance(n_prefix, bool) or n_prefix < 0):
        raise ValueError(f"n_prefix must be an int >= 0 or None, got {n_prefix!r}")
    if not callable(model):
        raise TypeError(f"model must be an nn.Module or a callable, got {type(model).__name__}")
    adapter = None
    if isinstance(model, nn.Module):
        if hasattr(model, "_orig_mod"):
            raise ValueError(
                "model is already wrapped by torch.compile; pass the plain model and compile the encoder: "
                "torch.compile(PatchEncoder(model))"
            )
        adapter = next(filter(None, (family.matches(model) for family in FAMILIES)), None)
    if adapter is None:
        if n_prefix is None:
            raise ValueError(
                f"model: {type(model).__name__} is no encoder family known here. Pass n_prefix=<how many leading "
                f"tokens are not patches> with a module or callable that returns [b, n_prefix + n, dim] tokens; a "
                f"convolutional model can return (feature_map.flatten(2).mT, (rows, cols)) with n_prefix=0"
            )
        adapter = CustomAdapter(model)
    if n_prefix is not None:
        adapter.n_prefix = n_prefix
    return adapter


__all__ = ["Adapter", "find_adapter"]
