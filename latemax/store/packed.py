"""Documents concatenated: tokens and offsets, the form every backend and every store can share without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latemax.quantized import QuantizedTokens

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# int8: codes, a scale and an error for each token (QuantizedTokens)
DTYPES = {**FLOATS, "int8": torch.int8}
Tokens = Tensor | QuantizedTokens


def token_bytes(dtype: torch.dtype, dim: int) -> int:
    """Bytes of one token."""
    return dim + 8 if dtype == torch.int8 else dim * dtype.itemsize


def empty(dtype: torch.dtype, rows: int, dim: int) -> Tokens:
    """Uninitialised tokens on the CPU."""
    tokens = torch.empty(rows, dim, dtype=dtype, device="cpu")
    if dtype != torch.int8:
        return tokens
    scale, error = torch.empty(2, rows, device="cpu")
    return QuantizedTokens(tokens, scale, error, "int8", dim)


class Packed(NamedTuple):
    """Document i is ``tokens[offsets[i] : offsets[i + 1]]``; QuantizedTokens of a store of codes."""

    tokens: Any  # Tensor or QuantizedTokens [t_d, dim]
    offsets: Tensor  # int32 or int64 [n_d + 1], from 0 to t_d, never falling

    @classmethod
    def of(cls, documents: Sequence[Tensor]) -> Packed:
        """Packs [l_i, dim] tensors of one dim and dtype, in order; copies them.

        Raises:
            ValueError: no document, or dims or dtypes that differ.
        """
        if not len(documents):
            raise ValueError("documents must hold at least one tensor, which gives dim and dtype")
        first = documents[0]
        for i, item in enumerate(documents):
            if item.dim() != 2 or item.shape[1] != first.shape[1] or item.dtype != first.dtype:
                raise ValueError(
                    f"documents must be [l_i, dim] of one dim and dtype; documents[0] is {first.dtype} "
                    f"{list(first.shape)}, documents[{i}] is {item.dtype} {list(item.shape)}"
                )
        lengths = torch.tensor([0, *map(len, documents)], dtype=torch.int64, device="cpu")
        return cls(torch.cat(list(documents)), lengths.cumsum(0))

    def documents(self) -> list[Any]:
        """Views [l_i, dim], one for each document."""
        bounds = self.offsets.tolist()
        return [self.tokens[a:b] for a, b in pairwise(bounds)]


def check(tokens: Tokens, offsets: Tensor) -> None:
    """TypeError or ValueError unless the two are what `Packed` says; reads the offsets."""
    if not isinstance(tokens, (Tensor, QuantizedTokens)) or len(tokens.shape) != 2:
        came = list(tokens.shape) if isinstance(tokens, (Tensor, QuantizedTokens)) else type(tokens).__name__
        raise ValueError(f"tokens must be a tensor [t_d, dim], got {came}")
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        came = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"offsets must be an int32 or int64 tensor, got {came}")
    if offsets.dim() != 1 or not len(offsets):
        raise ValueError(f"offsets must be [n_d + 1], got shape {list(offsets.shape)}")
    if offsets[0] != 0 or offsets[-1] != len(tokens):
        raise ValueError(f"offsets must run from 0 to {len(tokens)}, got {int(offsets[0])} to {int(offsets[-1])}")
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if len(falls):
        raise ValueError(f"offsets must never fall; they do after document {int(falls[0])}")
