"""What a corpus does with its tokens, be they a tensor or QuantizedTokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latemax.quantized import QuantizedTokens

Tokens = Tensor | QuantizedTokens


def tensors_of(tokens: Tokens) -> list[Tensor]:
    if isinstance(tokens, Tensor):
        return [tokens]
    return [x for x in (tokens.codes, tokens.scale, tokens.error) if x is not None]


def floats(tokens: Tokens) -> Tensor:
    """The tokens as floats: codes are dequantized to float32."""
    return tokens.detach() if isinstance(tokens, Tensor) else tokens.dequantize()


def mapped(function: Callable[[Tensor], Tensor], tokens: Tokens) -> Any:
    """The same done to every tensor of the tokens."""
    return function(tokens) if isinstance(tokens, Tensor) else tokens._map(function)


def dtype_of(tokens: Tokens) -> torch.dtype:
    return tensors_of(tokens)[0].dtype


def bytes_of(tokens: Tokens) -> int:
    """Bytes of one token."""
    first, *others = tensors_of(tokens)
    return first.shape[-1] * first.dtype.itemsize + 4 * len(others)


def copy(tokens: Tokens, out: Tokens, non_blocking: bool = False) -> None:
    for x, y in zip(tensors_of(tokens), tensors_of(out), strict=True):
        y.copy_(x, non_blocking=non_blocking)


def concatenated(parts: Sequence[Any]) -> Any:
    """Tokens [l_i, dim] of one kind as [t, dim]; a copy."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    # numpy: torch would start threads for each part, and wait for them where other programs run
    join = _joined if first.device.type == "cpu" else torch.cat
    codes, scale, *error = (join(part) for part in zip(*map(tensors_of, parts), strict=True))
    return QuantizedTokens(codes, scale, error[0] if error else None, first.kind, first.dim)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.from_numpy(np.concatenate([x.numpy() for x in parts]))
