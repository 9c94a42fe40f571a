"""``QuantizedTokens`` among the arguments: their codes go on as tensors, and what they mean as ``Codes``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latemax.arguments import arrays
from latemax.ops.problem import Codes
from latemax.quantized import QuantizedTokens


def split(name: str, x: Any) -> tuple[Any, Codes | None]:
    """QuantizedTokens → (codes, Codes); a list of them → (a list of codes, Codes with the scales concatenated).

    Anything else → (x, None), an array as a tensor.

    Raises:
        TypeError: a list that holds QuantizedTokens and other things.
        ValueError: a list of different kinds, dims or devices, items that are not [l_i, dim], or a scale that requires
            a gradient.
    """
    if isinstance(x, QuantizedTokens):
        return _contiguous_dims(x.codes), _codes_of(name, [x], x.scale, x.error)
    if not isinstance(x, (list, tuple)) or not x or not isinstance(x[0], QuantizedTokens):
        return arrays.as_tensor(name, x), None
    items = _checked(name, x)
    scale = torch.cat([item.scale for item in items])
    errors = [item.error for item in items if item.error is not None]
    codes = _codes_of(name, items, scale, torch.cat(errors) if errors else None)
    return [_contiguous_dims(item.codes) for item in items], codes


def refuse(function: str, *sides: tuple[str, Any]) -> None:
    """For functions that take no codes."""
    for name, x in sides:
        first = x[0] if isinstance(x, (list, tuple)) and x else x
        if isinstance(first, QuantizedTokens):
            raise TypeError(f"{function} takes no QuantizedTokens; got them as {name}: pass {name}.dequantize()")


def check_bounded(d: Any) -> None:
    """d must be what ``maxsim_bounds`` takes.

    Raises:
        TypeError: naming what came.
    """
    for item in d if isinstance(d, (list, tuple)) else (d,):
        if not isinstance(item, QuantizedTokens):
            raise TypeError(f"d must be QuantizedTokens or a list of them, got {type(item).__name__}")
        if item.kind != "int8":
            raise TypeError(f"d must be QuantizedTokens of kind 'int8', whose error is known; got {item.kind!r}")


def _codes_of(name: str, items: list[QuantizedTokens], scale: Tensor, error: Tensor | None) -> Codes:
    if torch.is_grad_enabled() and scale.requires_grad:
        raise ValueError(f"{name} is QuantizedTokens, which are not differentiable, but its scale requires a gradient")
    kind, dim = items[0].kind, items[0].dim
    return Codes(kind, dim, scale.contiguous(), None if error is None else error.contiguous())


def _checked(name: str, x: Any) -> list[QuantizedTokens]:
    first = x[0]
    for i, item in enumerate(x):
        if not isinstance(item, QuantizedTokens):
            raise TypeError(
                f"{name} must hold only QuantizedTokens if it holds one; {name}[{i}] is {type(item).__name__}"
            )
        if item.codes.dim() != 2:
            raise ValueError(f"{name}[{i}] must be [l_i, dim], got shape {list(item.shape)}")
        for what in ("kind", "dim", "device"):
            if getattr(item, what) != getattr(first, what):
                raise ValueError(
                    f"all items of {name} must have one {what}; {name}[0] has {getattr(first, what)}, "
                    f"{name}[{i}] has {getattr(item, what)}"
                )
    return list(x)


def _contiguous_dims(codes: Tensor) -> Tensor:
    return codes if codes.stride(-1) == 1 or codes.shape[-1] == 1 else codes.contiguous()
