"""The native CPU kernels (csrc/cpu): float16, bfloat16 and float32 on the CPU, where they were built.

Nothing is copied or widened here: the kernels take addresses, shapes and strides as they come.
"""

from __future__ import annotations

import functools
import importlib

import torch

try:
    _cpu = importlib.import_module("latemax.ops._cpu")
    _why_not = ""
except ImportError as error:
    _cpu = None
    _why_not = "not built" if isinstance(error, ModuleNotFoundError) else str(error)

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
    return _DTYPES[x.dtype], x.data_ptr(), x.shape, x.stride()


def _documents(d: torch.Tensor) -> tuple:
    """As _source, of four axes: documents that queries share have a stride of 0 over them."""
    if d.dim() == 4:
        return _source(d)
    return _DTYPES[d.dtype], d.data_ptr(), (1, *d.shape), (0, *d.stride())


def _mask(mask: torch.Tensor | None, four: bool = False) -> tuple:
    if mask is None:
        return 0, None
    stride = mask.stride()
    return mask.data_ptr(), (0, *stride) if four and len(stride) == 2 else stride


def forward(q, d, q_mask, d_mask, scores, argmax, *, normalize, empty_score, level=-1) -> None:
    """Fills scores [n_q, n_d] and, where it has elements, argmax int32 [n_q, n_d, l_q].

    ``level`` picks one of ``levels()``; the best by default.
    """
    q, d = q.resolve_neg(), d.resolve_neg()
    _cpu.forward(
        level % len(levels()),
        torch.get_num_threads(),
        *_source(q),
        *_documents(d),
        *_mask(q_mask),
        *_mask(d_mask, True),
        scores.data_ptr(),
        argmax.data_ptr() if argmax.numel() else 0,
        normalize,
        empty_score,
    )


def forward_packed(
    q: torch.Tensor,  # [n_q, l_q, dim]
    d: torch.Tensor,  # [t_d, dim]
    q_mask: torch.Tensor | None,  # [n_q, l_q]
    offsets: torch.Tensor,  # int64 [n_documents + 1] contiguous
    candidates: torch.Tensor | None,  # int64 [n_q, k] contiguous, -1 for none
    scores: torch.Tensor,  # [n_q, n_documents] or [n_q, k]
    argmax: torch.Tensor,
    *,
    normalize,
    empty_score,
    level=-1,
) -> None:
    """``forward`` over documents that lie end to end; with candidates, of the documents they name where they lie.

    Raises:
        ValueError: offsets that fall or leave d; a candidate that is no document.
    """
    q, d = q.resolve_neg(), d.resolve_neg()
    _cpu.forward_packed(
        level % len(levels()),
        torch.get_num_threads(),
        *_source(q),
        *_source(d),
        *_mask(q_mask),
        offsets.data_ptr(),
        len(offsets) - 1,
        0 if candidates is None else candidates.data_ptr(),
        scores.shape[1],
        scores.data_ptr(),
        argmax.data_ptr() if argmax.numel() else 0,
        normalize,
        empty_score,
    )


def backward(g, q, d, argmax, *, normalize, needs_q, needs_d, level=-1):
    """(grad_q, grad_d) in the dtypes of q and d, or None for a side that needs none."""
    q, d = (x.resolve_neg() if x.stride(-1) == 1 else x.contiguous() for x in (q, d))
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format) if needs_q else None
    grad_d = torch.empty_like(d, memory_format=torch.contiguous_format) if needs_d else None
    g = g.to(torch.float32)
    argmax = argmax.contiguous()
    _cpu.backward(
        level % len(levels()),
        torch.get_num_threads(),
        *_source(q),
        *_documents(d),
        argmax.data_ptr(),
        g.data_ptr(),
        g.stride(),
        d.dim() == 4,
        0 if grad_q is None else grad_q.data_ptr(),
        0 if grad_d is None else grad_d.data_ptr(),
        normalize,
    )
    return grad_q, grad_d
