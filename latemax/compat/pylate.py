"""The ColBERT scores and ``rank.rerank`` of PyLate (1.6.0)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latemax import maxsim, maxsim_pairs
from latemax.compat._inputs import (
    EMPTY_SCORE,
    as_items,
    as_scored,
    as_tensor,
    check_padding,
    to_device,
    weighted,
    with_zero_rows,
)
from latemax.compat._xtr import XTRKDScores, XTRScores, xtr_group_scores

__all__ = [
    "ColBERTScores", "XTRKDScores", "XTRScores", "colbert_kd_scores", "colbert_scores", "colbert_scores_pairwise",
    "rerank", "xtr_group_scores",
]  # fmt: skip

BACKENDS = ("auto", "torch", "flash", "lik")


def colbert_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
    *,
    padding: str = "exact",
) -> Tensor:
    """``pylate.scores.colbert_scores``: every query against every document.

    Args:
        queries_embeddings: [n_q, l_q, dim]: a tensor, an array, or nested lists.
        documents_embeddings: [n_d, l_d, dim], likewise.
        queries_mask: [n_q, l_q] or broadcast to it; its values multiply the similarities.
        documents_mask: [n_d, l_d] or broadcast to it. "exact": a token with 0 is excluded from the maximum. "host":
            values multiply the similarities, so that a masked token scores 0 and may win, as in PyLate.
        backend: PyLate's names are accepted (the environment's ``PYLATE_SCORES_BACKEND`` if None) and have no effect.
        padding: "exact" or "host": how documents_mask is applied; "host" also gives the scores PyLate's dtype.

    Returns:
        scores [n_q, n_d], differentiable; float32 (float64 of float64) if exact. A document without a token scores 0.

    Raises:
        ValueError: an unknown backend or padding; a mask that does not fit; a negative query mask if exact.
    """
    return _score(queries_embeddings, documents_embeddings, queries_mask, documents_mask, backend, padding)


def colbert_kd_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
    *,
    padding: str = "exact",
) -> Tensor:
    """``pylate.scores.colbert_kd_scores``: every query against its own documents [n_q, k, l_d, dim] → [n_q, k].

    ``documents_mask`` is [n_q, k, l_d]; all else is as in ``colbert_scores``.
    """
    return _score(queries_embeddings, documents_embeddings, queries_mask, documents_mask, backend, padding)


def colbert_group_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
    *,
    padding: str = "exact",
) -> Tensor:
    """``pylate.scores.ColBERTScores()``: every query against every document of every group.

    Args:
        documents_embeddings: groups [g, n, l_d, dim], one group a query; documents_mask: [g, n, l_d].

    Returns:
        scores [n_q, g · n]; document j of group i is in column ``i · n + j``. All else is as in ``colbert_scores``.
    """
    documents = as_tensor(documents_embeddings)
    if documents_mask is not None:
        documents_mask = as_mask("documents_mask", documents_mask, documents).flatten(0, 1)
    return _score(queries_embeddings, documents.flatten(0, 1), queries_mask, documents_mask, backend, padding)


class ColBERTScores:
    """``pylate.scores.ColBERTScores``: the default ``score_metric`` of the contrastive losses.

    Args:
        padding: as in ``colbert_scores``.
    """

    def __init__(self, *, padding: str = "exact") -> None:
        check_padding(padding)
        self.padding = padding

    def __call__(
        self,
        queries_embeddings: Any,
        documents_embeddings: Any,
        queries_mask: Any = None,
        documents_mask: Any = None,
        backend: str | None = None,
    ) -> Tensor:
        return colbert_group_scores(
            queries_embeddings, documents_embeddings, queries_mask, documents_mask, backend, padding=self.padding
        )


def colbert_scores_pairwise(
    queries_embeddings: Any, documents_embeddings: Any, backend: str | None = None, *, padding: str = "exact"
) -> Tensor:
    """``pylate.scores.colbert_scores_pairwise``: query i against document i.

    Args:
        queries_embeddings: [b, l_q, dim], or a list of [l_i, dim]: tensors, arrays or nested lists.
        documents_embeddings: likewise; the longer side is cut, as by ``zip``.
        backend, padding: as in ``colbert_scores``; nothing is padded here.

    Returns:
        scores [b].
    """
    check_padding(padding)
    check_backend(backend)
    n = min(len(queries_embeddings), len(documents_embeddings))
    q, d = _pairs_side(queries_embeddings[:n]), _pairs_side(documents_embeddings[:n])
    scores = maxsim_pairs(q, d, empty_score=EMPTY_SCORE)
    return scores.to(torch.promote_types(q[0].dtype, d[0].dtype)) if padding == "host" else scores


def rerank(
    documents_ids: Sequence[Sequence[int | str]],
    queries_embeddings: Any,
    documents_embeddings: Any,
    device: str | None = None,
    *,
    padding: str = "exact",
) -> list[list[dict[str, Any]]]:
    """``pylate.rank.rerank``: the documents of every query, best first.

    Args:
        documents_ids: for every query the ids of its documents.
        queries_embeddings: for every query [l_q, dim]; a single 2-D array or tensor is one query.
        documents_embeddings: for every query a list of [l_i, dim], or [n, l_d, dim]: tensors, arrays or nested lists.
        device: where to score; None: the device of the queries.
        padding: "exact": documents are scored as they are. "host": a document shorter than the longest of its query
            also has PyLate's zero row, and the scores are rounded to the input dtype.

    Returns:
        for every query a list of ``{"id": …, "score": float}``, descending; equal scores keep their order.
    """
    check_padding(padding)
    results: list[list[dict[str, Any]]] = []
    for query, ids, documents in zip(
        _with_query_axis(queries_embeddings), documents_ids, _with_query_axis(documents_embeddings), strict=False
    ):
        if not len(documents):
            results.append([])
            continue
        q = as_tensor(query)
        q = q if device is None else q.to(device)
        if not isinstance(documents, (list, tuple)):
            d = to_device(as_tensor(documents), q.device)
        elif padding == "exact" and q.is_cpu:
            d = as_scored(documents)
        else:
            d = to_device(as_items(documents), q.device)
        if padding == "host" and isinstance(d, list):
            d = with_zero_rows(d)
        scores = maxsim(q, d, empty_score=EMPTY_SCORE)
        if padding == "host":
            scores = scores.to(torch.promote_types(q.dtype, d[0].dtype))
        best, order = scores.sort(descending=True, stable=True)
        ranked = zip(order.tolist(), best.tolist(), strict=True)
        results.append([{"id": ids[i], "score": score} for i, score in ranked])
    return results


def check_backend(backend: str | None) -> None:
    name = (os.environ.get("PYLATE_SCORES_BACKEND", "auto") if backend is None else backend).lower()
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of 'auto', 'torch', 'flash', 'lik'; got {name!r}")


def as_mask(name: str, mask: Any, tokens: Tensor) -> Tensor:
    """A mask in any form → a tensor of the tokens' leading shape on their device; axes of 1 are expanded."""
    mask = mask if isinstance(mask, Tensor) else torch.as_tensor(mask)
    shape = tokens.shape[:-1]
    if mask.dim() != len(shape) or any(m not in (1, n) for m, n in zip(mask.shape, shape, strict=True)):
        raise ValueError(f"{name} must be {list(shape)} or broadcast to it; got shape {list(mask.shape)}")
    return mask.to(tokens.device).expand(shape)


def _score(q: Any, d: Any, q_mask: Any, d_mask: Any, backend: str | None, padding: str) -> Tensor:
    check_padding(padding)
    check_backend(backend)
    q, d = as_tensor(q), as_tensor(d)
    q_mask = None if q_mask is None else as_mask("queries_mask", q_mask, q)
    d_mask = None if d_mask is None else as_mask("documents_mask", d_mask, d)
    if padding == "exact":
        if q_mask is not None:
            q, q_mask = weighted(q, q_mask)
        d_mask = None if d_mask is None else d_mask != 0
        return maxsim(q, d, q_mask, d_mask, empty_score=EMPTY_SCORE)
    # PyLate multiplies the similarities, which is to scale the tokens
    dtype = torch.promote_types(q.dtype, d.dtype)
    for mask in (q_mask, d_mask):
        dtype = dtype if mask is None else torch.promote_types(dtype, mask.dtype)
    q = q if q_mask is None else q * q_mask.unsqueeze(-1)
    d = d if d_mask is None else d * d_mask.unsqueeze(-1)
    return maxsim(q, d).to(dtype)


def _pairs_side(x: Any) -> Tensor | list[Tensor]:
    return x if isinstance(x, Tensor) and x.is_floating_point() else as_items(x)


def _with_query_axis(x: Any) -> Any:
    return x[None] if getattr(x, "ndim", None) == 2 else x
