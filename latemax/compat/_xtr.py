"""PyLate's XTR scores: a query token only sees the k document tokens of the whole batch that are nearest to it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latemax.compat._inputs import EMPTY_SCORE, as_tensor, check_padding


class XTRScores:
    """``pylate.scores.XTRScores``: every query against every document of every group, for the contrastive losses.

    Of each query token's k nearest document tokens, those of a document have a maximum; a document without one of
    them scores 0 for that query token. As in PyLate, so does one whose maximum is negative, unless all of its tokens
    are among the k. A score is the sum of the maxima, divided by how many are positive.

    Args:
        k: how many document tokens a query token retrieves from all documents of the batch.
        document_chunk_size: how many documents' similarities are in memory at once; None: all.
        padding: "exact": masked document tokens are absent, and sums are float32. "host": as in PyLate, a masked token
            has the lowest similarity, its document counts it, and similarities are of the input dtype.

    Example:
        >>> loss = losses.Contrastive(model, score_metric=XTRScores(k=128))
    """

    def __init__(self, k: int = 256, document_chunk_size: int | None = None, *, padding: str = "exact") -> None:
        check_padding(padding)
        self.k = k
        self.document_chunk_size = document_chunk_size
        self.padding = padding

    def __call__(
        self,
        queries_embeddings: Any,
        documents_embeddings: Any,
        queries_mask: Tensor | None = None,
        documents_mask: Tensor | None = None,
    ) -> Tensor:
        """float32 [n_q, g · n] of queries [n_q, l_q, dim] and groups [g, n, l_d, dim], one group a query.

        Args:
            queries_embeddings, documents_embeddings: tensors, arrays or nested lists.
            queries_mask: [n_q, l_q]; its values multiply the maxima.
            documents_mask: [g, n, l_d]; a token with 0 is masked.

        Raises:
            ValueError: fewer than k document tokens.
        """
        return xtr_group_scores(
            as_tensor(queries_embeddings), as_tensor(documents_embeddings), queries_mask, documents_mask, k=self.k,
            document_chunk_size=self.document_chunk_size, padding=self.padding,
        )  # fmt: skip


class XTRKDScores(XTRScores):
    """``pylate.scores.XTRKDScores``: the scores of ``XTRScores`` for every query's own group, for distillation."""

    def __call__(
        self,
        queries_embeddings: Any,
        documents_embeddings: Any,
        queries_mask: Tensor | None = None,
        documents_mask: Tensor | None = None,
    ) -> Tensor:
        """float32 [n_q, n] of queries [n_q, l_q, dim] and own documents [n_q, n, l_d, dim]."""
        documents = as_tensor(documents_embeddings)
        scores = super().__call__(queries_embeddings, documents, queries_mask, documents_mask)
        n_q, n = documents.shape[:2]
        return scores.view(n_q, n_q, n).diagonal().T


def xtr_group_scores(
    queries_embeddings: Tensor,
    documents_embeddings: Tensor,
    queries_mask: Tensor | None,
    documents_mask: Tensor | None,
    *,
    k: int,
    document_chunk_size: int | None,
    padding: str = "exact",
) -> Tensor:
    """``XTRScores._score``: tensors in, ``[n_q, g · n]`` out. See ``XTRScores``."""
    check_padding(padding)
    q, d = queries_embeddings, documents_embeddings.flatten(0, 1)
    n_q, l_q = q.shape[:2]
    n_d, l_d = d.shape[:2]
    if not 1 <= k <= n_d * l_d:
        raise ValueError(f"k must be from 1 to the {n_d * l_d} document tokens of the batch, got {k}")
    keep = None if documents_mask is None else documents_mask.reshape(n_d, l_d) != 0
    if padding == "exact":
        q, d = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, d))
    low = -math.inf if padding == "exact" else torch.finfo(q.dtype).min
    rows, tokens = q.flatten(0, 1), d.flatten(0, 1)
    found, token = _nearest(rows.detach(), d.detach(), keep, k, low, document_chunk_size or n_d)
    # Best first: a document's first token among the k has its maximum. Column n_d takes masked tokens.
    document = token // l_d if padding == "host" else torch.where(found == low, n_d, token // l_d)
    places = torch.arange(k, device=q.device).expand_as(document)
    first = torch.full((len(rows), n_d + 1), k, device=q.device).scatter_reduce(1, document, places, "amin")[:, :n_d]
    retrieved = first < k
    token = token.gather(1, first.clamp(max=k - 1))
    maxima = (rows.unsqueeze(1) * tokens[token]).sum(dim=-1)
    if padding == "host":
        best = found.gather(1, first.clamp(max=k - 1))
        maxima = torch.where(best == low, best, maxima)
    counts = document.new_zeros(len(rows), n_d + 1).scatter_add(1, document, torch.ones_like(document))
    valid = l_d if keep is None or padding == "host" else keep.sum(dim=1)
    missing = counts[:, :n_d] < valid
    # a token that was not retrieved counts as a similarity of 0
    maxima = torch.where(retrieved & ~(missing & (maxima < 0)), maxima, EMPTY_SCORE).view(n_q, l_q, n_d)
    if queries_mask is not None:
        maxima = maxima * queries_mask.unsqueeze(-1)
    positive = (maxima > 0).float().sum(dim=1).clamp(min=1e-3)
    return (maxima.sum(dim=1) / positive).float()


def _nearest(rows: Tensor, d: Tensor, keep: Tensor | None, k: int, low: float, chunk: int) -> tuple[Tensor, Tensor]:
    """The k largest similarities of every row [n, dim] to the tokens of d [n_d, l_d, dim], best first, and the tokens.

    Masked tokens have the similarity ``low``.
    """
    parts = []
    for start in range(0, len(d), chunk):
        s = rows @ d[start : start + chunk].flatten(0, 1).T
        if keep is not None:
            s.masked_fill_(~keep[start : start + chunk].flatten(), low)
        values, tokens = s.topk(min(k, s.shape[1]))
        parts.append((values, tokens + start * d.shape[1]))
        if len(parts) == 2:
            values, tokens = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
            values, order = values.topk(min(k, values.shape[1]))
            parts = [(values, tokens.gather(1, order))]
    return parts[0]
