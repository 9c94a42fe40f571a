"""Arrow columns ``list<fixed_size_list<float16 | float32>[dim]>``, as LanceDB keeps them, without copying tokens.

Arrow has no bfloat16: a bfloat16 corpus is converted where ``dtype`` says so, and refused otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .packed import Packed, check
from .reader import PatchStore

if TYPE_CHECKING:
    import pyarrow


def _pyarrow():
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("Arrow columns need pyarrow: pip install pyarrow") from error
    return pyarrow


def to_arrow(corpus, *, dtype: torch.dtype | None = None, ids=None) -> pyarrow.Table:
    """A table with columns ``id`` (int64 or string) and ``tokens`` (list<fixed_size_list<dtype>[dim]>).

    Args:
        corpus: a PatchStore (a chunk for each of its `packed()`, on the files' own pages) or (tokens [t_d, dim],
            offsets [n_d + 1]) on the CPU, whose memory the table shares.
        dtype: torch.float16 or torch.float32: converts, which copies; None keeps float16 and float32.
        ids: of a pair, one per document; None numbers them. A store brings its own.

    Raises:
        TypeError: bfloat16 or float64 without a dtype to convert to; a store of codes.
        ImportError: pyarrow is missing.
    """
    pa = _pyarrow()
    if isinstance(corpus, PatchStore):
        if corpus.dtype == torch.int8:
            raise TypeError(f"corpus must hold floats, got {corpus}")
        if ids is not None:
            raise ValueError("ids must be None for a PatchStore, which has its own")
        if corpus.dim is None:
            raise ValueError(f"corpus must hold at least one document, got {corpus}")
        parts, ids = list(corpus.packed()), corpus.ids
        empty = Packed(
            torch.empty(0, corpus.dim, dtype=corpus.dtype, device="cpu"),
            torch.zeros(1, dtype=torch.int64, device="cpu"),
        )
        id_type = pa.int64() if corpus.id_type == "int" else pa.string()
    else:
        check(*corpus)
        parts = [Packed(*corpus)]
        empty, ids = parts[0], list(range(len(corpus[1]) - 1)) if ids is None else list(ids)
        id_type = pa.string() if ids and isinstance(ids[0], str) else pa.int64()
    chunks = [_list_array(pa, tokens, offsets, dtype) for tokens, offsets in parts or [empty]]
    return pa.table({"id": pa.array(ids, id_type), "tokens": pa.chunked_array(chunks)})


def _list_array(pa, tokens: Tensor, offsets: Tensor, dtype: torch.dtype | None):
    wanted = dtype or tokens.dtype
    if wanted not in (torch.float16, torch.float32):
        raise TypeError(
            f"Arrow has float16 and float32 but no {_name(wanted)}; dtype=torch.float32 keeps every bfloat16 value and "
            "copies"
        )
    values = tokens.detach().to(wanted).contiguous()
    if values.device.type != "cpu":
        raise ValueError(f"tokens must be on the CPU, got {values.device}")
    flat = pa.array(values.view(-1).numpy()) if values.numel() else pa.array([], pa.from_numpy_dtype(_name(wanted)))
    vectors = pa.FixedSizeListArray.from_arrays(flat, tokens.shape[1])
    if len(tokens) < 1 << 31:
        return pa.ListArray.from_arrays(pa.array(offsets.to(torch.int32).numpy()), vectors)
    return pa.LargeListArray.from_arrays(pa.array(offsets.to(torch.int64).numpy()), vectors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def from_arrow(column) -> Packed:
    """(tokens [t_d, dim], offsets int64 [n_d + 1]) of a column; the tokens are its own memory, not to be written.

    Args:
        column: a pyarrow Array, or a ChunkedArray of one chunk, of list (or large_list) of
            fixed_size_list<float16 | float32>[dim].

    Raises:
        TypeError: another type. ValueError: nulls; several chunks (``column.combine_chunks()`` copies them into one,
        ``[from_arrow(c) for c in column.chunks]`` does not copy).
    """
    pa = _pyarrow()
    if isinstance(column, pa.ChunkedArray):
        if column.num_chunks != 1:
            raise ValueError(
                f"column must be one chunk, got {column.num_chunks}: combine_chunks() copies them into one, "
                "[from_arrow(c) for c in column.chunks] does not copy"
            )
        column = column.chunk(0)
    lists = isinstance(column, (pa.ListArray, pa.LargeListArray))
    if not lists or not isinstance(column.values, pa.FixedSizeListArray):
        came = getattr(column, "type", type(column).__name__)
        raise TypeError(f"column must be of type list<fixed_size_list<float16 | float32>>, got {came}")
    vectors = column.values
    if vectors.type.value_type not in (pa.float16(), pa.float32()):
        raise TypeError(f"column must hold float16 or float32, got {vectors.type.value_type}")
    offsets = torch.from_dlpack(column.offsets).to(torch.int64)
    vectors = vectors.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    flat = vectors.values.slice(vectors.offset * vectors.type.list_size, len(vectors) * vectors.type.list_size)
    if column.null_count or vectors.null_count or flat.null_count:
        raise ValueError("column must hold no null; an image without tokens is an empty list")
    return Packed(torch.from_dlpack(flat).view(-1, vectors.type.list_size), offsets - offsets[0])
