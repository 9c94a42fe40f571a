"""Numpy arrays → CPU tensors of the same memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_tensor(name: str, x: Any) -> Any:
    """An array as a tensor that shares its memory; anything else as it is.

    Only negative strides, and strides that are not a multiple of an element's size, are copied: torch has none.

    Raises:
        TypeError: a masked array, another byte order than this machine's, or a dtype that torch does not have.
    """
    if not isinstance(x, np.ndarray):
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array, got a masked array: pass its data, and its mask as a mask")
    if not x.dtype.isnative:
        raise TypeError(f"{name} must be in the byte order of this machine, got dtype {x.dtype.str}")
    if any(stride < 0 or stride % max(1, x.itemsize) for stride in x.strides):
        x = x.copy()
    # a dtype of the package ml_dtypes, which numpy does not have
    brain = x.dtype.name == "bfloat16"
    if brain:
        x = x.view(np.uint16)
    if not x.flags.writeable:
        x = np.asarray(_Writable(x))
    try:
        tensor = torch.from_numpy(x)
    except TypeError:
        raise TypeError(f"{name} must be an array of a dtype that torch has, got {x.dtype}") from None
    return tensor.view(torch.bfloat16) if brain else tensor


def as_tensors(name: str, x: Any) -> Any:
    """``as_tensor``, also of the items of a list or tuple."""
    if not isinstance(x, (list, tuple)):
        return as_tensor(name, x)
    items = all_as_tensors(name, list(x))
    return tuple(items) if isinstance(x, tuple) else items


def all_as_tensors(name: str, items: list[Any]) -> list[Any]:
    """``as_tensor`` of the items of a list. Asking each for its type would cost more than reading it."""
    if torch.compiler.is_compiling() or not any(issubclass(kind, np.ndarray) for kind in {*map(type, items)}):
        return items
    plain = plain_as_tensors(items)
    return [as_tensor(f"{name}[{i}]", x) for i, x in enumerate(items)] if plain is None else plain


def plain_as_tensors(items: list[Any]) -> list[torch.Tensor] | None:
    """Arrays that torch takes as they are, in a seventh of the time of ``as_tensor``: 0.7 µs each; else None."""
    if {*map(type, items)} != {np.ndarray} or not all([x.flags.writeable for x in items]):
        return None
    try:
        return list(map(torch.from_numpy, items))
    except (TypeError, ValueError):  # a dtype, byte order or stride that torch does not have
        return None


class _Writable:
    """The memory of a read-only array, which torch warns about. Nothing here writes to its arguments."""

    def __init__(self, x: np.ndarray) -> None:
        self.array = x
        memory = x.__array_interface__
        self.__array_interface__ = {**memory, "data": (memory["data"][0], False)}
