"""The oracle: late interaction in plain PyTorch, for any float dtype and device.

It writes every similarity to memory and exists to be obviously correct. The fast backends are tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["maxsim", "smooth_maxsim"]

Tokens = Tensor | Sequence[Tensor]
Mask = Tensor | Sequence[Tensor | None] | None
Weights = Tensor | Sequence[Tensor] | None
Scores = Tensor | tuple[Tensor, Tensor]


def maxsim(
    q: Tokens,
    d: Tokens,
    q_mask: Mask = None,
    d_mask: Mask = None,
    *,
    normalize: bool = False,
    empty_score: float = -math.inf,
    return_argmax: bool = False,
    q_weights: Weights = None,
    reduce: str = "sum",
) -> Scores:
    """Score queries against documents: ``score = Σ_{i valid} w_i max_{j valid} <q_i, d_j>``.

    The formula is ColBERT's late interaction (Khattab and Zaharia, SIGIR 2020, eq. 3). Inputs are not checked: a wrong
    shape raises whatever torch raises.

    Args:
        q: float tokens ``[l_q, dim]`` or ``[n_q, l_q, dim]``, or a list of ``[l_i, dim]``.
        d: float tokens ``[l_d, dim]`` or ``[n_d, l_d, dim]``, own candidates ``[n_q, k, l_d, dim]``, or a list of
            ``[l_j, dim]``.
        q_mask: ``q.shape[:-1]``, nonzero = keep; for a list of queries a list of ``[l_i]`` or None.
        d_mask: ``d.shape[:-1]``, nonzero = keep; for a list of documents a list of ``[l_j]`` or None.
        normalize: divide every token by ``max(‖token‖₂, 1e-12)`` first, as ``torch.nn.functional.normalize`` does.
        empty_score: the score of a document without a valid token.
        return_argmax: also return the index of the best document token of each query token.
        q_weights: the factors ``w``, float ``q.shape[:-1]``; for a list of queries a list of ``[l_i]``. None is 1.
        reduce: "sum", or "mean", which divides the sum by the number of valid query tokens.

    Returns:
        Scores ``[n_q, n_d]`` or ``[n_q, k]``, without the axis of a 2-D side; float64 if the promoted dtype of ``q``
        and ``d`` is float64, else float32. With ``return_argmax`` also int32 ``[..., l_q]``: ties go to the lowest
        index; -1 marks a masked query token, or a document without a valid token.

    Example:
        >>> maxsim(torch.eye(2), torch.eye(2))
        tensor(2.)
    """
    if not (isinstance(q, Tensor) and isinstance(d, Tensor)):
        return _lists(q, d, q_mask, d_mask, normalize, empty_score, return_argmax, q_weights, reduce)
    masks = cast("tuple[Tensor | None, Tensor | None]", (q_mask, d_mask))
    weights = cast("Tensor | None", q_weights)
    with torch.autocast(q.device.type, enabled=False):
        return _dense(q, d, *masks, normalize, empty_score, return_argmax, weights, reduce)


def _dense(
    q: Tensor,
    d: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    normalize: bool,
    empty_score: float,
    return_argmax: bool,
    weights: Tensor | None,
    reduce: str,
) -> Scores:
    sims, q_keep, valid = _similarities(q, d, q_mask, d_mask, normalize)
    dtype, one_query, one_document = sims.dtype, q.dim() == 2, d.dim() == 2
    best = sims.detach().amax(-1, keepdim=True)
    positions = torch.arange(sims.shape[-1], device=sims.device)
    hit = ((sims == best) | sims.isnan()) & valid
    index = torch.where(hit, positions, sims.shape[-1]).amin(-1)  # [n_q, n_d, l_q]; l_d where no token is valid
    found = index < sims.shape[-1]
    value = sims.gather(-1, torch.where(found, index, 0).unsqueeze(-1)).squeeze(-1)

    counted = q_keep.unsqueeze(1) & found
    value = torch.where(counted, value, 0.0)
    if weights is not None:
        weights = torch.where(q_keep, weights.to(dtype), 0.0)
        value = torch.where(counted, value * weights.unsqueeze(1), 0.0)
    scores = value.sum(-1)
    if reduce == "mean":
        scores = scores / q_keep.sum(-1, keepdim=True).clamp(min=1)
    empty = ~valid.any(-1).squeeze(-1) & q_keep.any(-1, keepdim=True)  # [n_q, n_d]
    scores = torch.where(empty, empty_score, scores)
    argmax = torch.where(counted, index, -1).to(torch.int32)
    if one_document:
        scores, argmax = scores.squeeze(1), argmax.squeeze(1)
    if one_query:
        scores, argmax = scores.squeeze(0), argmax.squeeze(0)
    return (scores, argmax) if return_argmax else scores


def _similarities(
    q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities [n_q, n_d, l_q, l_d], -inf where a document token is masked; valid query tokens [n_q, l_q]; valid
    document tokens [n_q or 1, n_d, 1, l_d]."""
    dtype = torch.float64 if torch.promote_types(q.dtype, d.dtype) == torch.float64 else torch.float32
    one_query, one_document, own = q.dim() == 2, d.dim() == 2, d.dim() == 4
    q_keep = torch.ones(q.shape[:-1], dtype=torch.bool, device=q.device) if q_mask is None else q_mask != 0
    d_keep = torch.ones(d.shape[:-1], dtype=torch.bool, device=d.device) if d_mask is None else d_mask != 0
    q = torch.where(q_keep.unsqueeze(-1), q.to(dtype), 0.0)
    d = torch.where(d_keep.unsqueeze(-1), d.to(dtype), 0.0)
    if one_query:
        q, q_keep = q.unsqueeze(0), q_keep.unsqueeze(0)
    if one_document:
        d, d_keep = d.unsqueeze(0), d_keep.unsqueeze(0)
    if d.shape[-2] == 0:
        # one masked token, so that no reduction below is over an empty axis
        d, d_keep = F.pad(d, (0, 0, 0, 1)), F.pad(d_keep, (0, 1))
    if normalize:
        q, d = F.normalize(q, dim=-1, eps=1e-12), F.normalize(d, dim=-1, eps=1e-12)

    sims = torch.einsum("qic,qkjc->qkij" if own else "qic,kjc->qkij", q, d)
    valid = (d_keep if own else d_keep.unsqueeze(0)).unsqueeze(2)  # [n_q or 1, n_d, 1, l_d]
    return torch.where(valid, sims, -math.inf), q_keep, valid


def _items(tokens: Tokens, mask: Mask) -> tuple[Sequence[Tensor], Sequence[Tensor | None], bool]:
    """Items, their masks, and whether they are a single one without an axis of items."""
    if isinstance(tokens, Tensor) and tokens.dim() == 2:
        return [tokens], [cast("Tensor | None", mask)], True
    return list(tokens), [None] * len(tokens) if mask is None else list(mask), False


def _lists(
    q: Tokens,
    d: Tokens,
    q_mask: Mask,
    d_mask: Mask,
    normalize: bool,
    empty_score: float,
    return_argmax: bool,
    q_weights: Weights,
    reduce: str,
) -> Scores:
    """A list on either side: scores each pair separately, so that padding cannot be a source of error."""
    queries, q_masks, one_query = _items(q, q_mask)
    documents, d_masks, one_document = _items(d, d_mask)
    _, weights, _ = _items(q, q_weights)
    l_q = max([len(query) for query in queries], default=1)
    rows = []
    for query, qm, weight in zip(queries, q_masks, weights, strict=True):
        cells = []
        for document, dm in zip(documents, d_masks, strict=True):
            score, argmax = maxsim(
                query, document, qm, dm, normalize=normalize, empty_score=empty_score, return_argmax=True,
                q_weights=weight, reduce=reduce,
            )  # fmt: skip
            cells.append((score, F.pad(argmax, (0, l_q - len(query)), value=-1)))
        rows.append(cells)
    either = (list(queries) + list(documents))[0]
    empty = either.new_zeros(len(queries), len(documents))
    scores = torch.stack([torch.stack([s for s, _ in row]) for row in rows]) if empty.numel() else empty.float()
    argmax = (
        torch.stack([torch.stack([a for _, a in row]) for row in rows])
        if empty.numel()
        else empty.new_zeros((*empty.shape, l_q), dtype=torch.int32)
    )
    scores, argmax = (x.squeeze(1) if one_document else x for x in (scores, argmax))
    scores, argmax = (x.squeeze(0) if one_query else x for x in (scores, argmax))
    return (scores, argmax) if return_argmax else scores


def smooth_maxsim(
    q: Tokens,
    d: Tokens,
    q_mask: Mask = None,
    d_mask: Mask = None,
    *,
    tau: float,
    normalize: bool = False,
    empty_score: float = -math.inf,
) -> Tensor:
    """``maxsim`` with every maximum replaced by ``tau · log Σ_j exp(<q_i, d_j> / tau)``.

    Args:
        tau: temperature; the smooth maximum is at most ``tau · log l_d`` above the maximum.
        q, d, q_mask, d_mask, normalize, empty_score: as ``maxsim``.

    Returns:
        Scores as ``maxsim``.

    Example:
        >>> smooth_maxsim(torch.eye(2), torch.eye(2), tau=0.1)
        tensor(2.0000)
    """
    if not (isinstance(q, Tensor) and isinstance(d, Tensor)):
        queries, q_masks, one_query = _items(q, q_mask)
        documents, d_masks, one_document = _items(d, d_mask)
        options: dict[str, Any] = dict(tau=tau, normalize=normalize, empty_score=empty_score)
        pairs = [
            smooth_maxsim(x, y, x_mask, y_mask, **options)
            for x, x_mask in zip(queries, q_masks, strict=True)
            for y, y_mask in zip(documents, d_masks, strict=True)
        ]
        either = (list(queries) + list(documents))[0]
        scores = torch.stack(pairs) if pairs else either.new_zeros(0).float()
        scores = scores.view(len(queries), len(documents))
        scores = scores.squeeze(1) if one_document else scores
        return scores.squeeze(0) if one_query else scores
    masks = cast("tuple[Tensor | None, Tensor | None]", (q_mask, d_mask))
    with torch.autocast(q.device.type, enabled=False):
        sims, q_keep, valid = _similarities(q, d, *masks, normalize)
        # a row of -inf has no gradient: torch's logsumexp would give it NaN
        nothing = (sims == -math.inf).all(-1)
        smooth = tau * torch.where(nothing.unsqueeze(-1), 0.0, sims / tau).logsumexp(-1)
        smooth = torch.where(nothing, -math.inf, smooth)
        found = valid.any(-1).squeeze(-1)  # [n_q or 1, n_d]
        counted = q_keep.unsqueeze(1) & found.unsqueeze(-1)
        scores = torch.where(counted, smooth, 0.0).sum(-1)
        scores = torch.where(~found & q_keep.any(-1, keepdim=True), empty_score, scores)
        scores = scores.squeeze(1) if d.dim() == 2 else scores
        return scores.squeeze(0) if q.dim() == 2 else scores
