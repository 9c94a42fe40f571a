"""The scoring functions of colpali-engine (0.3.18): retrieval scores, and the scores of its losses."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from latemax import maxsim, maxsim_pairs
from latemax.compat._inputs import EMPTY_SCORE, Items, check_padding, nonzero_rows, retrieval_scores

__all__ = ["explicit_negatives_loss", "maxsim_inbatch", "maxsim_kd", "score_multi_vector"]


def score_multi_vector(
    qs: Items, ps: Items, batch_size: int = 128, device: str | torch.device | None = None, *, padding: str = "exact"
) -> Tensor:
    """``BaseVisualRetrieverProcessor.score_multi_vector``: every query against every page.

    Args:
        qs: queries [n_q, l_q, dim], or a list of n_q tensors [l_i, dim].
        ps: pages [n_p, l_p, dim], or a list of n_p tensors [l_i, dim].
        batch_size: how many queries and pages are moved to ``device`` at once.
        device: where to score; None: "cuda:0" if there is one, else the CPU.
        padding: "exact": every row of a list is a token, and the zero rows of a tensor are padding. "host": as
            colpali-engine, where zero padding may have the maximum.

    Returns:
        float32 [n_q, n_p] on the CPU. A page without a token scores 0.

    Raises:
        ValueError: no queries, no pages, or an unknown ``padding``; also as ``latemax.maxsim``.

    Example:
        >>> scores = score_multi_vector(query_embeddings, page_embeddings)
    """
    check_padding(padding)
    if len(qs) == 0:
        raise ValueError("No queries provided")
    if len(ps) == 0:
        raise ValueError("No passages provided")
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return retrieval_scores(qs, ps, batch_size, torch.device(device), padding).to("cpu", torch.float32)


def maxsim_inbatch(query: Tensor, doc: Tensor, *, padding: str = "exact") -> Tensor:
    """``colpali_engine.utils.maxsim.maxsim_inbatch``: [b_q, b_d] from query [b_q, l_q, dim] and doc [b_d, l_d, dim].

    Args:
        query, doc: padded with zero rows.
        padding: "exact": zero rows of doc are padding; float32 scores (float64 of float64). "host": zero rows are
            tokens, as in colpali-engine; the scores are of the input dtype.

    Returns:
        scores [b_q, b_d], differentiable in both. A document without a token scores 0.
    """
    return _padded(query, doc, padding)


def maxsim_kd(query: Tensor, doc: Tensor, *, padding: str = "exact") -> Tensor:
    """``colpali_engine.utils.maxsim.maxsim_kd``: [b, n] from query [b, l_q, dim] and its own doc [b, n, l_d, dim].

    Arguments and results are otherwise those of ``maxsim_inbatch``.
    """
    return _padded(query, doc, padding)


def explicit_negatives_loss(
    self: Any,
    query_embeddings: Tensor,
    doc_embeddings: Tensor,
    neg_doc_embeddings: Tensor,
    offset: int = 0,
    *,
    padding: str = "exact",
) -> Tensor:
    """``forward`` of ``ColbertNegativeCELoss`` and ``ColbertPairwiseNegativeCELoss``, positives included.

    Args:
        self: the loss. With ``use_smooth_max`` its own ``forward`` runs.
        query_embeddings: [b, l_q, dim]. doc_embeddings: positives [b', l_d, dim], those of the queries from ``offset``.
        neg_doc_embeddings: negatives of every query [b, n, l_n, dim].
        padding: as in ``maxsim_inbatch``. The in-batch term scores by the host's ``maxsim_inbatch``: patch that too.

    Returns:
        the loss, a scalar.
    """
    check_padding(padding)
    if self.use_smooth_max:
        own = inspect.unwrap(type(self).forward)
        return own(self, query_embeddings, doc_embeddings, neg_doc_embeddings, offset)
    own_documents = doc_embeddings[offset : offset + len(query_embeddings)]
    positives = _padded(query_embeddings, own_documents, padding, pairs=True)
    negatives = maxsim_kd(query_embeddings, neg_doc_embeddings, padding=padding)
    if self.normalize_scores:
        lengths = (query_embeddings[:, :, 0] != 0).sum(dim=1)
        positives, negatives = (self._apply_normalization(x, lengths) for x in (positives, negatives))
    loss = torch.nn.functional.softplus((negatives - positives.unsqueeze(1)) / self.temperature).mean()
    weight = self.in_batch_term_weight
    if weight > 0:
        in_batch = self.inner_loss if hasattr(self, "inner_loss") else self.inner_pairwise
        loss = loss * (1 - weight) + in_batch(query_embeddings, doc_embeddings, offset) * weight
    return loss


def _padded(query: Tensor, doc: Tensor, padding: str, *, pairs: bool = False) -> Tensor:
    check_padding(padding)
    score = maxsim_pairs if pairs else maxsim
    if padding == "host":
        return score(query, doc).to(torch.promote_types(query.dtype, doc.dtype))
    return score(query, doc, d_mask=nonzero_rows(doc), empty_score=EMPTY_SCORE)
