"""The native CPU kernels (csrc/cpu): float16, bfloat16 and float32 on the CPU, where they were built.

Nothing is copied or widened here: the kernels take addresses, shapes and strides as they come.
"""

from __future__ import annotations

import functools

import torch

from latemax.ops import binding
from latemax.ops.binding import address

_cpu, _why_not = binding.load("_cpu")

# maxsim_dtype of csrc/maxsim.h
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@functools.cache
def levels() -> tuple[str, ...]:
    """Instruction sets that this build and this processor have, worst first."""
    return () if _cpu is None else _cpu.levels()


def status() -> tuple[bool, str]:
    """(usable here, why not or with which instructions)."""
    if _cpu is None:
        return False, f"the native kernel cannot be loaded: {_why_not}"
    return True, f"native kernel ({levels()[-1]})"


def why_not(device: torch.device, q_dtype: torch.dtype, d_dtype: torch.dtype) -> str:
    """Why these tensors do not go through the native kernel; empty if they do."""
    if device.type != "cpu":
        return "the tensors are not on the CPU"
    if _cpu is None:
        return status()[1]
    if q_dtype not in _DTYPES or d_dtype not in _DTYPES:
        return "the native kernel does not take float64"
    return ""


def _source(x: torch.Tensor) -> tuple:
    at = x.data_ptr()
    if not at and x.numel():
        raise RuntimeError(f"the memory of a tensor of shape {list(x.shape)} has been freed")
    return _DTYPES[x.dtype], at, x.shape, x.stride()


def _mask(mask: torch.Tensor | None) -> tuple:
    return address(mask), None if mask is None else mask.stride()


def score(q: torch.Tensor, d: torch.Tensor, normalize: bool, empty_score: float) -> torch.Tensor | None:
    """Scores of plain dense tensors [l_q, dim] or [n_q, l_q, dim] and [l_d, dim] or [n_d, l_d, dim], without the axis
    of a 2-D side: none is added first, as views take longer than tiny problems. None for anything else."""
    if not (_cpu is not None and q.is_cpu and d.is_cpu and q.layout == d.layout == torch.strided):
        return None
    if q.is_nested or d.is_nested:
        return None
    q_dtype, d_dtype, q_shape, d_shape = _DTYPES.get(q.dtype), _DTYPES.get(d.dtype), q.shape, d.shape
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
        len(levels()) - 1, torch.get_num_threads(), q_dtype, q_at, q_shape, q.stride(), d_dtype, d_at, d_shape,
        d.stride(), 0, 0, 0, 0, (n_q, n_d), 0, None, 0, None, scores.data_ptr(), 0, normalize, empty_score,
    )  # fmt: skip
    return scores


def forward(q, d, q_mask, d_mask, scores, argmax, *, normalize, empty_score, level=-1) -> None:
    """Fills scores [n_q, n_d] and, where it has elements, argmax int32 [n_q, n_d, l_q].

    ``level`` picks one of ``levels()``; the best by default.
    """
    forward_packed(
        q, d, q_mask, d_mask, None, None, None, scores, argmax,
        normalize=normalize, empty_score=empty_score, level=level,
    )  # fmt: skip


def forward_packed(
    q: torch.Tensor,  # [n_q, l_q, dim], or [t_q, dim] end to end
    d: torch.Tensor,  # [n_d, l_d, dim] or own candidates [n_q, k, l_d, dim], or [t_d, dim] end to end
    q_mask: torch.Tensor | None,  # bool, q.shape[:-1]
    d_mask: torch.Tensor | None,  # bool, d.shape[:-1]
    cu_q: torch.Tensor | None,  # int64 [n_q + 1] contiguous: q is end to end
    cu_d: torch.Tensor | None,  # int64 [n_documents + 1] contiguous: d is end to end
    candidates: torch.Tensor | None,  # int64 [n_q, k] contiguous, of the documents in cu_d; -1 for none
    scores: torch.Tensor,  # float32 [n_q, n_d] or [n_q, k], contiguous
    argmax: torch.Tensor,  # int32 [n_q, n_d, l_q], where q is end to end [n_d, t_q]; of no element: not wanted
    *,
    normalize,
    empty_score,
    level=-1,
) -> None:
    """``forward`` over tokens that lie end to end; with candidates, of the documents they name where they lie.

    Raises:
        ValueError: offsets that do not start at 0, fall or leave their tokens; a candidate that is no document.
    """
    q, d = q.resolve_neg(), d.resolve_neg()
    _cpu.forward(
        level % len(levels()),
        torch.get_num_threads(),
        *_source(q),
        *_source(d),
        address(cu_q),
        address(cu_d),
        0 if cu_d is None else len(cu_d) - 1,
        address(candidates),
        scores.shape,
        *_mask(q_mask),
        *_mask(d_mask),
        scores.data_ptr(),
        argmax.data_ptr() if argmax.numel() else 0,
        normalize,
        empty_score,
    )


def backward(g, q, d, argmax, *, normalize, needs_q, needs_d, level=-1):
    """(grad_q, grad_d) in the dtypes of q and d, or None for a side that needs none."""
    return backward_packed(
        g, q, d, argmax, None, None, None, normalize=normalize, needs_q=needs_q, needs_d=needs_d, level=level
    )


def backward_packed(g, q, d, argmax, cu_q, cu_d, candidates, *, normalize, needs_q, needs_d, level=-1):
    """``backward`` of ``forward_packed``, from its argmax: (grad_q, grad_d) of the shapes of q and d, or None.

    Rows that won nothing, and rows outside every document, get 0. Raises as ``forward_packed`` does.
    """
    q, d = (x.resolve_neg() if x.stride(-1) == 1 else x.contiguous() for x in (q, d))
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format) if needs_q else None
    grad_d = torch.empty_like(d, memory_format=torch.contiguous_format) if needs_d else None
    g = g.to(torch.float32)
    argmax = argmax.contiguous()
    _cpu.backward(
        level % len(levels()),
        torch.get_num_threads(),
        *_source(q),
        *_source(d),
        address(cu_q),
        address(cu_d),
        0 if cu_d is None else len(cu_d) - 1,
        address(candidates),
        g.shape,
        argmax.data_ptr(),
        g.data_ptr(),
        g.stride(),
        address(grad_q),
        address(grad_d),
        normalize,
    )
    return grad_q, grad_d
