"""Tokens as 8-bit or 1-bit codes: ``quantize`` and ``QuantizedTokens``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from latemax.arguments import arrays

KINDS = ("int8", "binary")
CODE_DTYPES = {"int8": torch.int8, "binary": torch.uint8}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# the smallest normal float32: a smaller scale would lose bits
LEAST_SCALE = 2.0**-126
# elements that are converted to float64 at a time: 2 MB, which stay in cache (32 MB take twice as long)
CHUNK = 1 << 18
BITS = (128, 64, 32, 16, 8, 4, 2, 1)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class QuantizedTokens:
    """Codes of tokens [..., l, dim], each token with a scale of its own; made by ``quantize``.

    Attributes:
        codes: int8 [..., l, dim], or of kind "binary" uint8 [..., l, ceil(dim / 8)]: bit 1 for x >= 0, most significant
            first, pad bits 0.
        scale: float32 [..., l]. A token is ``scale * codes``, or ``scale`` with the signs of its bits.
        error: float32 [..., l], at least the L2 distance between a token and its code; None for binary.
        kind: "int8" or "binary".
        dim: dims of a token.

    Indexing selects along the leading axes. An instance is a pytree of its tensors.
    """

    codes: Tensor
    scale: Tensor
    error: Tensor | None
    kind: str
    dim: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be {' or '.join(map(repr, KINDS))}; got {self.kind!r}")
        dtype, width = CODE_DTYPES[self.kind], self.dim if self.kind == "int8" else -(-self.dim // 8)
        if not isinstance(self.codes, Tensor) or self.codes.dtype != dtype:
            raise TypeError(f"codes of kind {self.kind!r} must be a {dtype} tensor, got {_type_of(self.codes)}")
        if self.codes.dim() < 2 or self.codes.shape[-1] != width or self.dim < 1:
            raise ValueError(f"codes must be [..., l, {width}] for dim {self.dim}; got shape {list(self.codes.shape)}")
        if (self.error is None) != (self.kind == "binary"):
            raise ValueError("error must be given for kind 'int8' and None for 'binary'")
        for name, x in (("scale", self.scale), ("error", self.error)):
            if x is None:
                continue
            if not isinstance(x, Tensor) or x.dtype != torch.float32:
                raise TypeError(f"{name} must be a float32 tensor, got {_type_of(x)}")
            if x.shape != self.codes.shape[:-1] or x.device != self.codes.device:
                raise ValueError(
                    f"{name} must be [..., l] like codes, on its device; got shape {list(x.shape)} on {x.device} "
                    f"and codes {list(self.codes.shape)} on {self.codes.device}"
                )

    @property
    def shape(self) -> torch.Size:
        """[..., l, dim]."""
        return torch.Size((*self.codes.shape[:-1], self.dim))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __len__(self) -> int:
        return len(self.codes)

    def to(self, device: torch.device | str) -> QuantizedTokens:
        return self._map(lambda x: x.to(device))

    def __getitem__(self, index: Any) -> QuantizedTokens:
        """Raises IndexError where no token axis would be left."""
        scale = self.scale[index]
        if not scale.dim():
            raise IndexError(f"the index must keep the axis of tokens; got {index!r} on shape {list(self.shape)}")
        error, rows = None if self.error is None else self.error[index], index
        if isinstance(index, tuple) and any(i is Ellipsis for i in index):
            # what follows "..." is for tokens, not for their dims
            rows = (*index, slice(None))
        return QuantizedTokens(self.codes[rows], scale, error, self.kind, self.dim)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Tokens [..., l, dim]. float64 is exact, float32 is rounded once."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        signs = self.codes if self.kind == "int8" else unpack_bits(self.codes, self.dim) * 2 - 1
        return (signs.to(exact) * self.scale.to(exact).unsqueeze(-1)).to(dtype)

    def _map(self, function: Any) -> QuantizedTokens:
        error = None if self.error is None else function(self.error)
        return QuantizedTokens(function(self.codes), function(self.scale), error, self.kind, self.dim)


def quantize(tokens: Any, kind: str = "int8", *, mask: Any = None) -> QuantizedTokens:
    """Codes of every token, symmetric about 0.

    int8: ``scale = max|x| / 127`` and ``codes = round(x / scale)``, half to even; a scale below 2^-126 is 0, and so are
    its codes. binary: the signs, and ``scale = mean|x|``. All is computed in float64.

    Args:
        tokens: tensor or numpy array [..., l, dim] of float16, bfloat16, float32 or float64. Its values are read: on a
            GPU this waits for the device.
        kind: "int8" or "binary".
        mask: [..., l], bool, int or float, nonzero = valid; codes, scale and error of other tokens are 0, whatever they
            hold.

    Returns:
        QuantizedTokens on the device of tokens, without a gradient.

    Raises:
        TypeError: tokens or mask of another type or dtype.
        ValueError: an unknown kind, a shape without axes l and dim, or a mask of another shape; NaN or infinity in a
            valid token; a scale beyond float32.
    """
    x = _as_tensor("tokens", tokens).detach()
    if x.layout != torch.strided or x.is_nested or x.dtype not in DTYPES:
        raise TypeError(f"tokens must be dense, of float16, bfloat16, float32 or float64; got {x.dtype}, {x.layout}")
    if x.dim() < 2 or not x.shape[-1]:
        raise ValueError(f"tokens must be [..., l, dim] with dim >= 1, got shape {list(x.shape)}")
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(map(repr, KINDS))}; got {kind!r}")
    shape, dim = x.shape[:-1], x.shape[-1]
    valid = None
    if mask is not None:
        valid = _as_tensor("mask", mask)
        if valid.dtype.is_complex:
            raise TypeError(f"mask must be bool, int or float, got {valid.dtype}")
        if valid.shape != shape or valid.device != x.device:
            raise ValueError(
                f"mask must be {list(shape)} like tokens, on {x.device}; got {list(valid.shape)} on {valid.device}"
            )
        if valid.dtype != torch.bool and bool((valid < 0).any()):
            raise ValueError("mask must be nonzero where a token is valid, else 0; got a negative value")
        valid = valid.reshape(-1) != 0
    rows = x.reshape(-1, dim)
    codes = rows.new_empty((len(rows), dim if kind == "int8" else -(-dim // 8)), dtype=CODE_DTYPES[kind])
    scale = rows.new_empty(len(rows), dtype=torch.float32)
    error = torch.empty_like(scale) if kind == "int8" else None
    step = max(1, CHUNK // dim)
    for first in range(0, len(rows), step):
        at = slice(first, first + step)
        part = rows[at].to(torch.float64)
        if valid is not None:
            part = part.masked_fill(~valid[at].unsqueeze(1), 0.0)
        scale[at] = _scale_of(part, kind, shape, first)
        if error is None:
            bits = pack_bits(part >= 0)
            codes[at] = bits if valid is None else bits.masked_fill(~valid[at].unsqueeze(1), 0)
        else:
            codes[at], error[at] = _int8_of(part, scale[at])
    return QuantizedTokens(
        codes.view(*shape, codes.shape[-1]), scale.view(shape),
        None if error is None else error.view(shape), kind, dim,
    )  # fmt: skip


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., dim] → uint8 [..., ceil(dim / 8)], most significant bit first, padded with 0."""
    dim = bits.shape[-1]
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -dim % 8))
    weights = torch.tensor(BITS, dtype=torch.uint8, device=bits.device)
    return (padded.unflatten(-1, (-(-dim // 8), 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, dim: int) -> Tensor:
    """uint8 [..., ceil(dim / 8)] → int8 [..., dim] of 0 and 1."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return packed.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1).flatten(-2)[..., :dim].to(torch.int8)


def _scale_of(rows: Tensor, kind: str, shape: torch.Size, first: int) -> Tensor:
    """float64 rows [n, dim] → float32 [n]."""
    size = rows.abs()
    scale = (size.amax(-1) / 127 if kind == "int8" else size.mean(-1)).to(torch.float32)
    finite = scale.isfinite() & rows.isfinite().all(-1)
    if not finite.all():
        at = int((~finite).nonzero()[0, 0])
        where = [int(i) for i in np.unravel_index(first + at, tuple(shape))]
        if rows[at].isfinite().all():
            raise ValueError(f"the scale of every token must be finite in float32; that of token {where} is not")
        raise ValueError(f"valid tokens must be finite; token {where} holds NaN or infinity")
    return scale if kind == "binary" else scale.where(scale >= LEAST_SCALE, 0.0)


def _int8_of(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """float64 rows [n, dim], float32 scale [n] → codes, error.

    The products of codes and scale are exact in float64. A relative 2^-40 covers the rounding of the difference, of the
    squares and of the sum up to 4,000 dims, 2^-30 up to 4 million; dividing by the largest difference keeps the squares
    in range. The result is rounded up to float32.
    """
    step = scale.to(torch.float64).unsqueeze(1)
    codes = (rows / step.where(step > 0, 1.0)).round_().clamp_(-127, 127).mul_(step > 0)
    apart = (rows - codes * step).abs_()
    largest = apart.amax(-1)
    by = largest.where(largest > 0, 1.0)
    length = (apart / by.unsqueeze(1)).square_().sum(-1).sqrt_() * by
    length *= 1 + (2.0**-40 if rows.shape[1] <= 4000 else 2.0**-30)
    return codes.to(torch.int8), rounded_up(length)


def rounded_up(x: Tensor) -> Tensor:
    """float64 → float32, at least x, never subnormal: a processor that flushes subnormal numbers would lose a bound."""
    y = x.to(torch.float32)
    y = torch.where(y < x, y.nextafter(torch.full_like(y, math.inf)), y)
    return torch.where((x > 0) & (y < LEAST_SCALE), LEAST_SCALE, torch.where((x < 0) & (y > -LEAST_SCALE), 0.0, y))


def _as_tensor(name: str, x: Any) -> Tensor:
    x = arrays.as_tensor(name, x)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a numpy array, got {type(x).__name__}")
    return x


def _type_of(x: Any) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _flatten(x: QuantizedTokens) -> tuple[list[Any], tuple[str, int]]:
    return [x.codes, x.scale, x.error], (x.kind, x.dim)


def _flatten_with_keys(x: QuantizedTokens) -> tuple[list[Any], tuple[str, int]]:
    children, context = _flatten(x)
    return [(pytree.GetAttrKey(k), v) for k, v in zip(("codes", "scale", "error"), children, strict=True)], context


def _unflatten(children: Any, context: tuple[str, int]) -> QuantizedTokens:
    """Unchecked: a tree map may hold anything in place of the tensors."""
    out = object.__new__(QuantizedTokens)
    for name, value in zip(("codes", "scale", "error", "kind", "dim"), (*children, *context), strict=True):
        object.__setattr__(out, name, value)
    return out


pytree.register_pytree_node(
    QuantizedTokens, _flatten, _unflatten, serialized_type_name="latemax.QuantizedTokens",
    to_dumpable_context=list, from_dumpable_context=tuple, flatten_with_keys_fn=_flatten_with_keys,
)  # fmt: skip
