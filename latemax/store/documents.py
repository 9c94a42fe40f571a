"""What a document may be: its tokens, id, grid, regions and metadata, checked before any is kept."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latemax.arguments.arrays import as_tensor
from latemax.quantized import QuantizedTokens, quantize

from .catalog import to_json
from .packed import DTYPES, FLOATS, Tokens

NAMES = {dtype: name for name, dtype in DTYPES.items()}
# float32 fractions may round past the edge of the image
EDGE = 1e-6


class Place(NamedTuple):
    """Where a committed document is."""

    shard: int
    start: int
    length: int


class Document(NamedTuple):
    """A document that waits for the commit. ``content``: its own copy of the tokens, or where they are already."""

    content: Tokens | Place
    grid: tuple[int, int] | None
    regions: bytes | None
    meta: str | None
    pos: int | None  # None: after all others

    @property
    def length(self) -> int:
        return self.content.length if isinstance(self.content, Place) else len(self.content)


def as_tokens(tokens: Any, dim: int | None, dtype: torch.dtype | None, quantized: bool) -> Tokens:
    """Tokens [l, dim] as a store keeps them, in memory of their own: the caller may reuse its memory.

    Args:
        tokens: floats, or QuantizedTokens for a store of codes. dim, dtype: of the store, None if it has none yet.
        quantized: floats are quantized, for a store of codes.

    Raises:
        TypeError, ValueError: naming tokens, the rule and what came.
    """
    tokens = as_tensor("tokens", tokens)
    codes = isinstance(tokens, QuantizedTokens)
    if not codes and (not isinstance(tokens, Tensor) or tokens.dtype not in FLOATS.values()):
        came = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be a float16, bfloat16 or float32 tensor, got {came}")
    if len(tokens.shape) != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be [l, dim], got shape {list(tokens.shape)}")
    if dim not in (None, tokens.shape[1]):
        raise ValueError(f"tokens must have the store's dim, {dim}; got shape {list(tokens.shape)}")
    if dtype == torch.int8:
        if not codes and not quantized:
            raise TypeError(f"tokens must be QuantizedTokens, or quantize must be True; got {tokens.dtype}")
        found = tokens if codes else quantize(tokens)
        _check_codes(found)
        return found._map(lambda x: x.to("cpu", copy=codes).contiguous())
    if codes or quantized:
        raise TypeError("tokens must be floats, without quantize: codes go into a store that is made with dtype='int8'")
    if dtype not in (None, tokens.dtype):
        raise TypeError(f"tokens must have the store's dtype, {dtype}; got {tokens.dtype}")
    return tokens.detach().to("cpu", copy=True).contiguous()


def _check_codes(tokens: QuantizedTokens) -> None:
    if tokens.kind != "int8" or tokens.error is None:
        raise ValueError(f"tokens must be of kind 'int8', got {tokens.kind!r}")
    for name, x in (("scale", tokens.scale), ("error", tokens.error)):
        if not bool((x.isfinite() & (x >= 0)).all()):
            raise ValueError(f"{name} of tokens must be finite and at least 0")
    if tokens.codes.numel() and int(tokens.codes.amin()) < -127:
        raise ValueError("codes of tokens must be -127 to 127, got -128")


def codes_of(tokens: Tensor) -> QuantizedTokens:
    """The int8 codes that a store keeps of tokens [l, dim]; one with NaN or infinity gets code 0 and error inf."""
    finite = tokens.isfinite().all(-1)
    found = quantize(tokens, mask=finite)
    assert found.error is not None
    found.error.masked_fill_(~finite, math.inf)
    return found


def check_id(id: object, id_type: str | None = None) -> int | str:
    """A plain int or str of an id of any subclass.

    Raises:
        TypeError, ValueError: naming the rule.
    """
    found: int | str
    if isinstance(id, str):
        # str() of an enum would be its name
        found = str.__str__(id)
        try:
            found.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"id must be text that UTF-8 can write, got {id!r}: {error.reason}") from error
    elif isinstance(id, (int, np.integer)) and not isinstance(id, bool):
        found = int(operator.index(id))
        if not -(1 << 63) <= found < 1 << 63:
            raise ValueError(f"id must fit into 64 bits, got {found}")
    else:
        raise TypeError(f"id must be an int or a string, got {type(id).__name__}")
    if id_type not in (None, type(found).__name__):
        raise TypeError(f"id must be like the store's others, {id_type}; got {type(found).__name__} {found!r}")
    return found


def check_grid(grid: tuple[int, int], length: int) -> tuple[int, int]:
    try:
        rows, cols = (operator.index(size) for size in grid)
    except (TypeError, ValueError) as error:
        raise TypeError(f"grid must be two ints, (rows, cols); got {grid!r}") from error
    if rows < 1 or cols < 1 or rows * cols != length:
        raise ValueError(f"grid must multiply to the number of tokens, {length}; got {rows} x {cols}")
    return int(rows), int(cols)


def check_regions(regions: Tensor | np.ndarray, length: int) -> bytes:
    """The bytes of float32 [l, 4]: left, top, right, bottom of every token, as fractions of the image."""
    if isinstance(regions, Tensor):
        regions = regions.detach().cpu().numpy()
    if not isinstance(regions, np.ndarray) or regions.dtype != np.float32:
        came = regions.dtype if isinstance(regions, np.ndarray) else type(regions).__name__
        raise TypeError(f"regions must be a float32 tensor or array, got {came}")
    if regions.shape != (length, 4):
        raise ValueError(f"regions must be [l, 4] with the l of tokens, {length}; got shape {list(regions.shape)}")
    left, top, right, bottom = regions.T
    ordered = (left <= right) & (top <= bottom) & (regions >= -EDGE).all(1) & (regions <= 1 + EDGE).all(1)
    wrong = np.flatnonzero(~(ordered | np.isnan(regions).all(1)))
    if len(wrong):
        raise ValueError(
            "regions must be left, top, right, bottom between 0 and 1, or NaN for a token that is no patch; "
            f"row {wrong[0]} is {regions[wrong[0]].tolist()}"
        )
    return np.ascontiguousarray(regions, dtype="<f4").tobytes()


def check_meta(meta: Mapping[str, Any]) -> str:
    if not isinstance(meta, Mapping):
        raise TypeError(f"meta must be a JSON object (a dict), got {type(meta).__name__}")
    return to_json("meta", dict(meta))
