"""Choose a backend, allocate the outputs, run it. The one place where real op and fake meet: ``allocate``."""

from __future__ import annotations

import torch

from latemax import _check, reference
from latemax.ops import cpu_backend, cuda_backend, native_cpu_backend, packed, select


def allocate(
    q: torch.Tensor, d: torch.Tensor, want_argmax: bool, packing: _check.Packing = _check.DENSE
) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [n_q, n_d] and argmax int32 [n_q, n_d, l_q], of no element where none is wanted.

    The winners of query tokens that lie end to end are [n_d, t_q].
    """
    _, n_q, n_d, l_q, _, _ = _check.sizes(q, d, packing)
    scores = q.new_empty((n_q, n_d), dtype=_check.score_dtype(q.dtype, d.dtype))
    shape = (n_q, n_d, l_q) if packing.cu_q is None else (n_d, l_q)
    return scores, q.new_empty(shape if want_argmax else (0,), dtype=torch.int32)


# what decides choice and launch of a forward → how to launch it again
_again: dict = {}


def _form(q, d, q_mask, d_mask, normalize: bool, want_argmax: bool, backend: str) -> tuple:
    """All that choice of backend and tile, build and launch arguments of a forward depend on, but for the values and
    addresses of tensors and empty_score."""
    return (
        q.shape, q.stride(), q.dtype, d.shape, d.stride(), d.dtype, q.device, q.data_ptr() & 15, d.data_ptr() & 15,
        None if q_mask is None else q_mask.stride(), None if d_mask is None else d_mask.stride(),
        normalize, want_argmax, backend, torch.get_float32_matmul_precision(), q.is_neg(), d.is_neg(),
    )  # fmt: skip


def choose(args: _check.Arguments, backend: str, *, normalize: bool, argmax: bool, train: bool) -> select.Choice:
    return select.choose(_check.problem(args, normalize=normalize, argmax=argmax, train=train), backend)


def forward(
    q: torch.Tensor,  # [n_q, l_q, dim], or with cu_q [t_q, dim]
    d: torch.Tensor,  # [n_d, l_d, dim] or [n_q, n_d, l_d, dim], or with cu_d [t_d, dim]
    q_mask: torch.Tensor | None,
    d_mask: torch.Tensor | None,
    normalize: bool,
    empty_score: float,
    want_argmax: bool,
    backend: str,
    cu_q: torch.Tensor | None = None,
    cu_d: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (scores, argmax or None where none is wanted)."""
    packing = _check.DENSE if cu_q is None and cu_d is None else _check.Packing(cu_q, cu_d, candidates)
    form = None
    if packing is _check.DENSE and (q.is_cuda or backend == "triton"):
        form = _form(q, d, q_mask, d_mask, normalize, want_argmax, backend)
        again = _again.get(form)
        if again is not None and (out := again(q, d, q_mask, d_mask, empty_score)) is not None:
            return out
    args = _check.Arguments(q, d, q_mask, d_mask, False, False, packing)
    choice = choose(args, backend, normalize=normalize, argmax=want_argmax, train=False)
    flags = dict(normalize=normalize, empty_score=empty_score)
    if choice.backend == "reference":
        if packing is not _check.DENSE:
            scores, argmax = packed.reference_forward(q, d, q_mask, d_mask, packing, **flags)
        else:
            scores, argmax = reference.maxsim(q, d, q_mask, d_mask, return_argmax=True, **flags)
        return scores, argmax if want_argmax else None
    scores, argmax = allocate(q, d, want_argmax, packing)
    if choice.backend == "triton":
        from latemax.ops import triton_backend

        again = triton_backend.forward(q, d, q_mask, d_mask, scores, argmax, tile=choice.tile, packing=packing, **flags)
        if form is not None and again is not None:
            if len(_again) >= 4096:
                _again.clear()
            _again[form] = again
    elif choice.backend == "cuda" and packing is _check.DENSE:
        cuda_backend.forward(q, d, q_mask, d_mask, scores, argmax, **flags)
    elif choice.backend == "cuda":
        cuda_backend.forward_packed(q, d, q_mask, d_mask, cu_d, candidates, scores, argmax, **flags)
    elif packing is _check.DENSE:
        run = native_cpu_backend if choice.native else cpu_backend
        run.forward(q, d, q_mask, d_mask, scores, argmax, **flags)
    else:
        run = native_cpu_backend if choice.native else packed
        run.forward_packed(q, d, q_mask, d_mask, *packing, scores, argmax, **flags)
    return scores, argmax if want_argmax else None


def backward(
    g: torch.Tensor,  # [n_q, n_d]
    q: torch.Tensor,
    d: torch.Tensor,
    argmax: torch.Tensor,  # int32 [n_q, n_d, l_q], or with cu_q [n_d, t_q]
    normalize: bool,
    needs_q: bool,
    needs_d: bool,
    backend: str,
    cu_q: torch.Tensor | None = None,
    cu_d: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients from the recorded winners; None for a side that needs none."""
    packing = _check.DENSE if cu_q is None and cu_d is None else _check.Packing(cu_q, cu_d, candidates)
    args = _check.Arguments(q, d, None, None, False, False, packing)
    choice = choose(args, backend, normalize=normalize, argmax=True, train=True)
    needs = dict(needs_q=needs_q, needs_d=needs_d)
    if choice.backend in ("triton", "cuda"):
        from latemax.ops import triton_backend

        if candidates is None or not needs_d:
            return triton_backend.backward(g, q, d, argmax, packing=packing, normalize=normalize, **needs)
        # several queries may name one document: its owner would have to know them all
        grad_q, _ = triton_backend.backward(
            g, q, d, argmax, packing=packing, normalize=normalize, needs_q=needs_q, needs_d=False
        )
        _, grad_d = packed.backward_packed(g, q, d, argmax, *packing, normalize=normalize, needs_q=False, needs_d=True)
        return grad_q, grad_d
    # in torch the blocked gather runs on any device and is what backend="reference" differentiates with
    if packing is _check.DENSE:
        run = native_cpu_backend if choice.native else cpu_backend
        return run.backward(g, q, d, argmax, normalize=normalize, **needs)
    run = native_cpu_backend if choice.native else packed
    return run.backward_packed(g, q, d, argmax, *packing, normalize=normalize, **needs)
