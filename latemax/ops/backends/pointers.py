"""Helpers shared by backends that pass raw pointers. csrc/binding.h reads what ``call`` writes."""

from __future__ import annotations

import array
import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor

from latemax.ops.problem import Batch, Outputs, Side

# maxsim_dtype of csrc/maxsim.h
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
CODES = {"int8": 3, "binary": 4}


def load(name: str) -> tuple[Any, str]:
    """The extension ``latemax.ops.<name>`` or None, and why there is none; empty if there is."""
    try:
        return importlib.import_module(f"latemax.ops.{name}"), ""
    except ImportError as error:
        return None, "not built" if isinstance(error, ModuleNotFoundError) else str(error)


def address(x: Tensor | None) -> int:
    """0 for None. A tensor whose memory was freed is refused: a kernel would read address 0."""
    if x is None:
        return 0
    at = x.data_ptr()
    if not at and x.numel():
        raise RuntimeError(f"the memory of a tensor of shape {list(x.shape)} has been freed")
    return at


def side(s: Side) -> tuple:
    tokens, mask, offsets = s.tokens, s.mask, s.offsets
    items = None
    if offsets is not None:
        items = address(offsets), offsets.shape[0] - 1, 0 if s.separate is None else s.separate.table.data_ptr()
    dtype = DTYPES[tokens.dtype] if s.codes is None else CODES[s.codes.kind]
    return (
        dtype, address(tokens), tokens.shape, tokens.stride(), items, address(mask),
        None if mask is None else mask.stride(),
    )  # fmt: skip


def item_table(items: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(table [n, 3], offsets [n + 1]) of items [l_i, dim] with contiguous dims; no masks yet."""
    rows, ends = array.array("q"), array.array("q", [0])
    for x in items:
        rows.extend((address(x), 0, x.stride(0)))
        ends.append(ends[-1] + x.shape[0])
    table, offsets = (torch.frombuffer(numbers, dtype=torch.int64) for numbers in (rows, ends))
    return table.view(-1, 3), offsets


def set_masks(table: Tensor, masks: list[Tensor]) -> None:
    """Adds to an item table the address of each contiguous mask."""
    table[:, 1] = torch.frombuffer(array.array("q", map(address, masks)), dtype=torch.int64)


def call(b: Batch, shape: tuple[int, ...], scores: Tensor | None, argmax: Tensor | None) -> tuple:
    """The positional arguments that ``read_call`` of csrc/binding.h reads. shape: [n_q, n_d]."""
    return (
        *side(b.q), *side(b.d), address(b.candidates), None if b.query_ids is None else (address(b.query_ids), b.l_q),
        b.own, shape, address(scores), address(argmax), b.normalize, b.empty_score, address(b.q.weights), b.mean,
    )  # fmt: skip


def forward_call(b: Batch, out: Outputs) -> tuple:
    return call(b, out.scores.shape, *out)


def codes(b: Batch, upper: Tensor | None = None, coarse: bool = False) -> tuple:
    """What follows ``call`` where documents are codes; nothing where they are not. ``upper``: of bounds."""
    if b.d.codes is None:
        return ()
    q, d = (None, None) if b.q.codes is None else b.q.codes[2:], b.d.codes[2:]
    return b.dim, *map(address, (*q, *d, upper)), coarse


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launches go to the tensors' device, whichever is current."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
