"""The public functions: arguments, shapes and errors. The work is done behind ``latemax.ops``."""

from __future__ import annotations

import math

import torch

from latemax import _check, _ragged
from latemax.ops import launch, schema, select

__all__ = ["explain", "maxsim", "maxsim_pairs", "warmup"]


def maxsim(
    q,
    d,
    q_mask=None,
    d_mask=None,
    *,
    normalize: bool = False,
    empty_score: float = -math.inf,
    return_argmax: bool = False,
    backend: str = "auto",
):
    """Late interaction: ``score = Σ_{i valid} max_{j valid} <q_i, d_j>``.

    The formula is ColBERT's (Khattab and Zaharia, SIGIR 2020, eq. 3). The [l_q, l_d] similarities are never written to
    memory. Differentiable once in q and d; the gradient of every maximum goes to its recorded winner.

    Args:
        q: query tokens [l_q, dim] or [n_q, l_q, dim]; or a list of n_q tensors [l_i, dim]; or a jagged nested tensor.
        d: document (image patch) tokens [l_d, dim], [n_d, l_d, dim], or own candidates of every query
            [n_q, k, l_d, dim]; or a list of n_d tensors [l_j, dim]; or a jagged nested tensor. float16, bfloat16,
            float32 or float64, promoted together with q; both on one device.
        q_mask: bool, int or float of shape ``q.shape[:-1]``; nonzero = keep. Beside a list: a list of [l_i].
        d_mask: likewise ``d.shape[:-1]``. Masked tokens influence nothing, whatever they hold.
        normalize: score unit vectors: every token divided by ``max(‖token‖₂, 1e-12)``, in float32.
        empty_score: the score of a document without a valid token.
        return_argmax: also return which document token won for each query token.
        backend: "auto", "triton", "cuda", "cpu" or "reference". Never falls back in silence: see ``explain``.

    Returns:
        scores, float32 (float64 if the promoted dtype is): [n_q, n_d], or [n_q, k] for own candidates; the axis of a
        2-D side is dropped. With return_argmax also int32 [..., l_q]: ties go to the lowest index; -1 for masked query
        tokens and for documents without a valid token. A query without a valid token scores 0.

    Raises:
        TypeError: q, d or a mask is no tensor, of another dtype or layout; an option of another type.
        ValueError: shapes, devices or dims that do not go together; an unknown backend.
        RuntimeError: the backend asked for cannot run here (the message says why).

    Example:
        >>> scores = maxsim(query_tokens, page_tokens, d_mask=page_mask)  # [n_q, n_d]
        >>> best = scores.topk(5).indices
    """
    empty_score = _check.options(
        normalize=normalize, empty_score=empty_score, return_argmax=return_argmax, backend=backend
    )
    args = _arguments(q, d, q_mask, d_mask)
    return _score(args, normalize, empty_score, return_argmax, backend)


def maxsim_pairs(
    q,
    d,
    q_mask=None,
    d_mask=None,
    *,
    normalize: bool = False,
    empty_score: float = -math.inf,
    return_argmax: bool = False,
    backend: str = "auto",
):
    """Row b of q against row b of d alone: the diagonal of ``maxsim``, without the b × b product.

    Args:
        q: [b, l_q, dim], or a list of b tensors [l_i, dim], or a jagged nested tensor.
        d: [b, l_d, dim], or a list of b tensors [l_j, dim], or a jagged nested tensor.
        q_mask, d_mask, normalize, empty_score, return_argmax, backend: as ``maxsim``.

    Returns:
        scores [b]; with return_argmax also int32 [b, l_q]. Dtypes and errors as ``maxsim``.
    """
    empty_score = _check.options(
        normalize=normalize, empty_score=empty_score, return_argmax=return_argmax, backend=backend
    )
    args = _arguments(q, d, q_mask, d_mask, pairs=True)
    return _score(args, normalize, empty_score, return_argmax, backend)


def explain(
    q,
    d,
    q_mask=None,
    d_mask=None,
    *,
    normalize: bool = False,
    return_argmax: bool = False,
    backend: str = "auto",
) -> select.Choice:
    """Which backend and tile ``maxsim`` would run for these arguments, and why. Runs nothing.

    Returns:
        Choice(backend, why, tile, notes): tile is None outside the Triton backend; notes say what a call would do
        besides, such as padding a list.

    Raises:
        As ``maxsim``.
    """
    _check.options(normalize=normalize, empty_score=0.0, return_argmax=return_argmax, backend=backend)
    args = _arguments(q, d, q_mask, d_mask)
    train = torch.is_grad_enabled() and (args.q.requires_grad or args.d.requires_grad)
    choice = launch.choose(args, backend, normalize=normalize, argmax=return_argmax or train, train=train)
    return select.annotate(choice, tuple(name for name, x in (("q", q), ("d", d)) if _ragged.is_ragged(x)))


def warmup(
    *,
    dim: int = 128,
    l_q: int = 32,
    n_q: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device="cuda",
    q_masked: bool = False,
    d_masked: bool = False,
    own: bool = False,
    normalize: bool = False,
    return_argmax: bool = False,
    train: bool = False,
    backend: str = "auto",
) -> select.Choice:
    """Compile ahead what ``maxsim`` will launch for these shapes, so that the first real call, inside a CUDA-graph
    capture too, compiles nothing. The number and length of documents do not matter to it.

    Args:
        dim, l_q, n_q: as in q [n_q, l_q, dim].
        dtype: of q and d. device: where to compile and run one tiny problem.
        q_masked, d_masked: whether calls will pass q_mask, d_mask. own: whether d will be [n_q, k, l_d, dim].
        normalize, return_argmax, backend: as the calls will pass. train: also the backward kernels of both sides.

    Returns:
        The choice made, as ``explain`` gives it.

    Raises:
        As ``maxsim``.
    """
    q = torch.zeros(n_q, l_q, dim, dtype=dtype, device=device, requires_grad=train)
    d = torch.zeros(*((n_q,) if own else ()), 1, 16, dim, dtype=dtype, device=device, requires_grad=train)
    masks = dict(
        q_mask=q.new_ones(q.shape[:-1], dtype=torch.bool) if q_masked else None,
        d_mask=d.new_ones(d.shape[:-1], dtype=torch.bool) if d_masked else None,
    )
    flags = dict(normalize=normalize, return_argmax=return_argmax, backend=backend)
    with torch.set_grad_enabled(train):
        out = maxsim(q, d, **masks, **flags)
        if train:
            (out[0] if return_argmax else out).sum().backward()
        choice = explain(q, d, **masks, **flags)
    if q.is_cuda:
        torch.cuda.synchronize(q.device)
    return choice


def _arguments(q, d, q_mask, d_mask, *, pairs: bool = False) -> _check.Arguments:
    ragged_q, ragged_d = _ragged.is_ragged(q), _ragged.is_ragged(d)
    if ragged_q:
        q, q_mask = _ragged.pad("q", q, q_mask, d)
    if ragged_d:
        d, d_mask = _ragged.pad("d", d, d_mask, q)
    return _check.arguments(q, d, q_mask, d_mask, pairs=pairs)


def _score(args: _check.Arguments, normalize: bool, empty_score: float, return_argmax: bool, backend: str):
    scores, argmax = schema.maxsim(args, normalize, empty_score, return_argmax, backend)
    if args.one_document:
        scores, argmax = scores.squeeze(1), argmax.squeeze(1) if return_argmax else argmax
    if args.one_query:
        scores, argmax = scores.squeeze(0), argmax.squeeze(0) if return_argmax else argmax
    return (scores, argmax) if return_argmax else scores
