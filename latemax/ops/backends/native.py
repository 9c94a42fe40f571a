"""The native CPU kernels (csrc/cpu): float16, bfloat16 and float32, where the extension was built.

Nothing is copied or widened here: the kernels take addresses, shapes and strides as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from latemax.ops.backends import pointers
from latemax.ops.backends.base import Status, WrongDevice
from latemax.ops.backends.pointers import DTYPES, address
from latemax.ops.problem import Batch, Gradients, Needs, Outputs, Plan, Problem, Side

name = "native"
# csrc/cpu/level.h: sums of the products of codes fit in 32 bits
MOST_CODE_DIMS = 1 << 17
_cpu, _why_not = pointers.load("_cpu")


@functools.cache
def levels() -> tuple[str, ...]:
    """Instruction sets that this build and this processor both have, worst first."""
    return () if _cpu is None else _cpu.levels()


def status() -> Status:
    if _cpu is None:
        return Status(False, f"the native kernel cannot be loaded: {_why_not}")
    return Status(True, f"native kernel ({levels()[-1]})")


def why_not(p: Problem, by_name: bool = False) -> str:
    if p.device.type != "cpu":
        return WrongDevice(f"needs tensors on the CPU; got {p.device}")
    if _cpu is None:
        return status().reason
    if torch.float64 in (p.q_dtype, p.d_dtype):
        return "the native kernel does not take float64"
    if p.d_codes and p.dim > MOST_CODE_DIMS:
        return f"the native kernel takes codes of at most {MOST_CODE_DIMS} dims; got {p.dim}"
    return ""


def plan(p: Problem, by_name: bool = False) -> Plan:
    why = "asked for by name" if by_name else "the tensors are on the CPU"
    # launch: the index of the instruction set in levels()
    return Plan(name, f"{why}: {status().reason}", launch=len(levels()) - 1)


# torch's C interface to addresses and shapes
_exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def read_items(items: list[Any], *, arrays: bool = False) -> tuple[Tensor, Tensor] | None:
    """``pointers.item_table`` of tensors [l_i, dim] with contiguous dims, of one dtype and on one device, the CPU or a
    GPU, in a tenth of the time; with ``arrays`` of numpy arrays, which are then never made tensors.

    Returns None for any other tensor or array, for none, and where the extension or torch cannot do this.
    """
    if _cpu is None or not (arrays or (_exchange is not None and True not in map(Tensor.is_neg, items))):
        return None
    table = torch.empty(len(items), 3, dtype=torch.int64, device="cpu")
    offsets = torch.empty(len(items) + 1, dtype=torch.int64, device="cpu")
    known = _cpu.read_items(None if arrays else _exchange, items, table.data_ptr(), offsets.data_ptr())
    return (table, offsets) if known else None


def nonzero_rows(x: Tensor) -> tuple[Tensor, bool] | None:
    """Which rows of x [..., dim], on the CPU, are not all zeros: bool [...], and whether that is every row.

    A row is read up to its first number that is not 0 or -0. Returns None without the extension, for dims that are not
    contiguous or none, and for dtypes other than float16, bfloat16, float32 and float64.
    """
    known = x.dtype in DTYPES or x.dtype == torch.float64
    if _cpu is None or not known or not x.shape[-1] or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return None
    rows = x.flatten(0, -3) if x.dim() > 3 else x.expand(*(1,) * (3 - x.dim()), *x.shape)
    keep = torch.empty(x.shape[:-1], dtype=torch.bool)
    every = _cpu.nonzero_rows(
        torch.get_num_threads(), x.itemsize, address(rows), rows.shape, rows.stride(), keep.data_ptr()
    )
    return keep, every


def score(q: Tensor, d: Tensor, normalize: bool, empty_score: float) -> Tensor | None:
    """Fast path: dense tensors [l_q, dim] or [n_q, l_q, dim] and [l_d, dim] or [n_d, l_d, dim], no masks, no argmax.

    Returns None for anything else. The scores lack the axis of a 2-D side; no axis is added first, because a view costs
    more than a tiny problem.
    """
    if not (_cpu is not None and q.is_cpu and d.is_cpu and q.layout == d.layout == torch.strided):
        return None
    if q.is_nested or d.is_nested:
        return None
    q_dtype, d_dtype, q_shape, d_shape = DTYPES.get(q.dtype), DTYPES.get(d.dtype), q.shape, d.shape
    q_dim, d_dim = len(q_shape), len(d_shape)
    if q_dtype is None or d_dtype is None or q.is_neg() or d.is_neg() or not (1 < q_dim < 4 and 1 < d_dim < 4):
        return None
    if q_shape[-1] != d_shape[-1] or not q_shape[-1] or not q_shape[-2]:
        return None
    q_at, d_at = q.data_ptr(), d.data_ptr()
    if not q_at or not d_at:
        return None
    n_q, n_d = q_shape[0] if q_dim == 3 else 1, d_shape[0] if d_dim == 3 else 1
    shape = (n_q, n_d) if q_dim == d_dim == 3 else (n_q,) if q_dim == 3 else (n_d,) if d_dim == 3 else ()
    scores = q.new_empty(shape, dtype=torch.float32)
    _cpu.forward(
        len(levels()) - 1, torch.get_num_threads(), q_dtype, q_at, q_shape, q.stride(), None, 0, None, d_dtype, d_at,
        d_shape, d.stride(), None, 0, None, 0, None, False, (n_q, n_d), scores.data_ptr(), 0, normalize, empty_score,
        0, False,
    )  # fmt: skip
    return scores


def forward(b: Batch, plan: Plan, out: Outputs) -> None:
    """Raises ValueError for offsets that do not start at 0, fall or leave their tokens, and for unknown candidates."""
    if _has_neg(b):
        b = b._replace(q=_resolved(b.q), d=_resolved(b.d))
    _cpu.forward(plan.launch, torch.get_num_threads(), *pointers.forward_call(b, out), *pointers.codes(b))


def bounds(b: Batch, plan: Plan, lower: Tensor, upper: Tensor, *, coarse: bool = False) -> None:
    """Bounds of the scores of the tokens that int8 codes were made of, float32 [n_q, n_d].

    ``coarse``: with query tokens of 8 bits where the instruction set multiplies those faster; wider bounds. Raises as
    ``forward`` does.
    """
    if _has_neg(b):
        b = b._replace(q=_resolved(b.q))
    call = pointers.call(b, lower.shape, lower, None)
    _cpu.forward(plan.launch, torch.get_num_threads(), *call, *pointers.codes(b, upper, coarse))


def backward(b: Batch, plan: Plan, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
    """Rows that no argmax names, and rows outside every document, get 0. Raises as ``forward`` does."""
    b = b._replace(q=_contiguous_rows(b.q), d=_contiguous_rows(b.d))
    grad_q, grad_d = (
        torch.empty_like(side.tokens, memory_format=torch.contiguous_format) if needed else None
        for side, needed in ((b.q, needs.q), (b.d, needs.d))
    )
    grad_weights = torch.empty_like(b.q.weights) if b.q.weights is not None and needs.weights else None
    g = g.to(torch.float32)
    _cpu.backward(
        plan.launch, torch.get_num_threads(), *pointers.call(b, g.shape, None, argmax.contiguous()),
        g.data_ptr(), g.stride(), address(grad_q), address(grad_d), address(grad_weights),
    )  # fmt: skip
    return Gradients(grad_q, grad_d, grad_weights)


def _has_neg(b: Batch) -> bool:
    # a lazy negation (a view of a conjugate) is a flag that a pointer does not carry
    return b.q.tokens.is_neg() or b.d.tokens.is_neg()


def _resolved(s: Side) -> Side:
    return s._replace(tokens=s.tokens.resolve_neg())


def _contiguous_rows(s: Side) -> Side:
    return s._replace(tokens=s.tokens.resolve_neg() if s.tokens.stride(-1) == 1 else s.tokens.contiguous())
