"""``warmup``: everything a call launches, compiled before the first call."""

from __future__ import annotations

from typing import Any

import torch

from latemax.arguments.batch import batch_of, corpus_batch, rerank_batch, varlen_batch
from latemax.ops import bounds as bound_operator
from latemax.ops import dispatch, operator, tiles
from latemax.ops.dispatch import Choice
from latemax.ops.problem import Batch
from latemax.quantized import quantize


def warmup(
    *,
    dim: int = 128,
    l_q: int = 32,
    n_q: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    q_masked: bool = False,
    d_masked: bool = False,
    own: bool = False,
    layout: str = "dense",
    normalize: bool = False,
    return_argmax: bool = False,
    q_weighted: bool = False,
    reduce: str = "sum",
    train: bool = False,
    q_kind: str | None = None,
    d_kind: str | None = None,
    bounds: bool = False,
    backend: str = "auto",
) -> Choice:
    """Compile what ``maxsim`` will launch for these shapes, so that the first real call compiles nothing, also inside a
    CUDA-graph capture. The number and length of documents do not matter: builds for short and long ones are compiled.

    Args:
        dim, l_q, n_q: as in q [n_q, l_q, dim]; of layout "varlen" l_q is the mean length.
        dtype: of q and d. device: where to compile and run one tiny problem.
        q_masked, d_masked, q_weighted: whether calls will pass q_mask, d_mask, q_weights.
        own: whether d will be [n_q, k, l_d, dim].
        layout: "dense" for ``maxsim`` and ``maxsim_pairs`` of tensors, "list" for a list of documents, "varlen" for
            ``maxsim_varlen``, "rerank" for ``rerank``, "corpus" for ``topk`` of anything but a list of queries, which
            takes "varlen".
        normalize, return_argmax, reduce, backend: as the calls will pass.
        train: also the backward kernels of both sides.
        q_kind, d_kind: the kind of QuantizedTokens that q and d will be; None for tokens of ``dtype``.
        bounds: compile what ``maxsim_bounds`` will launch instead, and of layout "corpus" the bounds of ``topk`` from
            codes. d is then of kind "int8".

    Returns:
        The choice for long documents, as ``explain`` returns it.

    Raises:
        ValueError: an unknown layout, or options that do not go together; else as ``maxsim``.
    """
    if layout not in ("dense", "list", "varlen", "rerank", "corpus"):
        raise ValueError(f"layout must be dense, list, varlen, rerank or corpus; got {layout!r}")
    if own and layout != "dense":
        raise ValueError(f"own candidates are of layout 'dense'; got {layout!r}")
    if bounds and (return_argmax or train or q_kind is not None or d_kind not in (None, "int8")):
        raise ValueError("bounds have no argmax and no gradient, and are those of a float q and d of kind 'int8'")
    form: dict[str, Any] = dict(
        dim=dim, l_q=l_q, n_q=n_q, dtype=dtype, device=device, q_masked=q_masked, d_masked=d_masked, own=own,
        layout=layout, normalize=normalize, q_weighted=q_weighted, reduce=reduce, q_kind=q_kind,
        d_kind="int8" if bounds else d_kind, backend=backend,
    )  # fmt: skip
    argmax = return_argmax or train
    for wanted in ("coarse", "exact") if bounds else ("",):
        run(16, return_argmax, train, bounds=wanted, **form)
        # one token more than each length at which tiles change; gradients do not depend on it
        for length in tiles.LENGTHS[:-1]:
            batch = run(length + 1, argmax, False, bounds=wanted, **form)
    if batch.q.tokens.is_cuda:
        torch.cuda.synchronize(batch.q.tokens.device)
    return dispatch.explain(batch, backend, argmax=argmax, bounds=wanted)


def run(
    l_d: int, return_argmax: bool, train: bool, *, dim: int, l_q: int, n_q: int, dtype: torch.dtype,
    device: torch.device | str, q_masked: bool = False, d_masked: bool = False, own: bool = False,
    layout: str = "dense", normalize: bool = False, q_weighted: bool = False, reduce: str = "sum",
    q_kind: str | None = None, d_kind: str | None = None, bounds: str = "", backend: str = "auto",
) -> Batch:  # fmt: skip
    """One tiny problem, with a document of l_d tokens. bounds: as ``Problem.bounds``."""
    q: Any = torch.zeros(n_q, l_q, dim, dtype=dtype, device=device)
    d: Any = torch.zeros(*((n_q,) if own else ()), 1, l_d, dim, dtype=dtype, device=device)
    q, d = q.flatten(0, 1) if layout == "varlen" else q, d if layout == "dense" else d[0]
    q = q.requires_grad_(train) if q_kind is None else quantize(q, q_kind)
    d = d.requires_grad_(train) if d_kind is None else quantize(d, d_kind)
    q_offsets, d_offsets = torch.arange(n_q + 1, device=device) * l_q, torch.arange(2, device=device) * l_d
    slots = torch.zeros(n_q, 1, dtype=torch.int64, device=device)
    q_mask = torch.ones(q.shape[:-1], dtype=torch.bool, device=device) if q_masked else None
    d_mask = torch.ones(d.shape[:-1], dtype=torch.bool, device=device) if d_masked else None
    q_weights = torch.ones(q.shape[:-1], dtype=dtype, device=device) if q_weighted else None
    options: dict[str, Any] = dict(normalize=normalize, q_weights=q_weights, reduce=reduce)
    with torch.set_grad_enabled(train):
        if layout == "dense":
            batch, _ = batch_of(q, d, q_mask, d_mask, **options)
        elif layout == "list":
            batch, _ = batch_of(q, [d], q_mask, None if d_mask is None else [d_mask], **options)
        elif layout == "varlen":
            batch = varlen_batch(q, d, q_offsets, d_offsets, q_mask, d_mask, **options)
        elif layout == "corpus":
            batch, _ = corpus_batch(q, d, d_offsets, q_mask, empty_score=0.0, **options)
        else:
            batch, _ = rerank_batch(q, d, d_offsets, slots, q_mask, **options)
        if bounds:
            bound_operator.maxsim_bounds(batch, backend, coarse=bounds == "coarse")
            return batch
        scores, _ = operator.maxsim(batch, return_argmax, backend)
        if scores.requires_grad:
            scores.sum().backward()
    return batch
