"""Choose a backend, allocate the outputs, run it. The one place where real op and fake meet: ``allocate``."""

from __future__ import annotations

import torch

from latemax import _check, reference
from latemax.ops import cpu_backend, cuda_backend, native_cpu_backend, select


def allocate(q: torch.Tensor, d: torch.Tensor, want_argmax: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [n_q, n_d] and argmax int32 [n_q, n_d, l_q], of no element where none is wanted."""
    n_q, l_q, n_d = q.shape[0], q.shape[1], d.shape[-3]
    double = torch.promote_types(q.dtype, d.dtype) == torch.float64
    scores = q.new_empty((n_q, n_d), dtype=torch.float64 if double else torch.float32)
    argmax = q.new_empty((n_q, n_d, l_q) if want_argmax else (0,), dtype=torch.int32)
    return scores, argmax


def choose(args: _check.Arguments, backend: str, *, normalize: bool, argmax: bool, train: bool) -> select.Choice:
    return select.choose(_check.problem(args, normalize=normalize, argmax=argmax, train=train), backend)


def forward(
    q: torch.Tensor,  # [n_q, l_q, dim]
    d: torch.Tensor,  # [n_d, l_d, dim] or [n_q, n_d, l_d, dim]
    q_mask: torch.Tensor | None,
    d_mask: torch.Tensor | None,
    normalize: bool,
    empty_score: float,
    want_argmax: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    args = _check.Arguments(q, d, q_mask, d_mask, False, False)
    choice = choose(args, backend, normalize=normalize, argmax=want_argmax, train=False)
    if choice.backend == "reference":
        scores, argmax = reference.maxsim(
            q, d, q_mask, d_mask, normalize=normalize, empty_score=empty_score, return_argmax=True
        )
        return scores, argmax if want_argmax else argmax.new_empty(0)
    scores, argmax = allocate(q, d, want_argmax)
    if choice.backend == "triton":
        from latemax.ops import triton_backend

        triton_backend.forward(
            q, d, q_mask, d_mask, scores, argmax, normalize=normalize, empty_score=empty_score, tile=choice.tile
        )
    elif choice.backend == "cuda":
        cuda_backend.forward(q, d, q_mask, d_mask, scores, argmax, normalize=normalize, empty_score=empty_score)
    else:
        run = native_cpu_backend if choice.native else cpu_backend
        run.forward(q, d, q_mask, d_mask, scores, argmax, normalize=normalize, empty_score=empty_score)
    return scores, argmax


def backward(
    g: torch.Tensor,  # [n_q, n_d]
    q: torch.Tensor,
    d: torch.Tensor,
    argmax: torch.Tensor,  # int32 [n_q, n_d, l_q]
    normalize: bool,
    needs_q: bool,
    needs_d: bool,
    backend: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients from the recorded winners; None for a side that needs none."""
    args = _check.Arguments(q, d, None, None, False, False)
    choice = choose(args, backend, normalize=normalize, argmax=True, train=True)
    if choice.backend in ("triton", "cuda"):
        from latemax.ops import triton_backend as run
    else:
        # the blocked gather runs on any device and is what backend="reference" differentiates with
        run = native_cpu_backend if choice.native else cpu_backend
    return run.backward(g, q, d, argmax, normalize=normalize, needs_q=needs_q, needs_d=needs_d)
