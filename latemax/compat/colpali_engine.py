"""The scoring functions of colpali-engine (0.3.18): retrieval scores, and the scores of its losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latemax import maxsim, maxsim_pairs, smooth_maxsim
from latemax.compat._inputs import EMPTY_SCORE, Items, check_padding, nonzero_rows, retrieval_scores

__all__ = ["explicit_negatives_loss", "inbatch_scores", "maxsim_inbatch", "maxsim_kd", "score_multi_vector"]


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


def inbatch_scores(self: Any, query_embeddings: Tensor, doc_embeddings: Tensor, *, padding: str = "exact") -> Tensor:
    """``ColbertModule._inbatch_scores``, which every in-batch loss calls.

    Args:
        self: the loss. With ``use_smooth_max`` the maxima are ``latemax.smooth_maxsim`` of its ``tau``.
        query_embeddings: [b_q, l_q, dim]. doc_embeddings: [b_d, l_d, dim].
        padding: as in ``maxsim_inbatch``.

    Returns:
        scores [b_q, b_d], divided by the lengths of the queries if the loss normalizes.
    """
    scores = _padded(query_embeddings, doc_embeddings, padding, tau=_tau(self))
    if self.normalize_scores:
        scores = self._apply_normalization(scores, _lengths(query_embeddings))
    return scores


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
        self: the loss. With ``use_smooth_max`` the maxima are ``latemax.smooth_maxsim`` of its ``tau``.
        query_embeddings: [b, l_q, dim]. doc_embeddings: positives [b', l_d, dim], those of the queries from ``offset``.
        neg_doc_embeddings: negatives of every query [b, n, l_n, dim].
        padding: as in ``maxsim_inbatch``. The in-batch term scores by the host's ``_inbatch_scores``: patch that too.

    Returns:
        the loss, a scalar.
    """
    own_documents, tau = doc_embeddings[offset : offset + len(query_embeddings)], _tau(self)
    positives = _padded(query_embeddings, own_documents, padding, pairs=True, tau=tau)
    negatives = _padded(query_embeddings, neg_doc_embeddings, padding, tau=tau)
    if self.normalize_scores:
        lengths = _lengths(query_embeddings)
        positives, negatives = (self._apply_normalization(x, lengths) for x in (positives, negatives))
    loss = torch.nn.functional.softplus((negatives - positives.unsqueeze(1)) / self.temperature).mean()
    weight = self.in_batch_term_weight
    if weight > 0:
        in_batch = self.inner_loss if hasattr(self, "inner_loss") else self.inner_pairwise
        loss = loss * (1 - weight) + in_batch(query_embeddings, doc_embeddings, offset) * weight
    return loss


def _tau(loss: Any) -> float | None:
    return loss.tau if loss.use_smooth_max else None


def _lengths(query: Tensor) -> Tensor:
    """The lengths by which colpali-engine normalizes: tokens that do not begin with 0."""
    return (query[:, :, 0] != 0).sum(dim=1)


def _padded(query: Tensor, doc: Tensor, padding: str, *, pairs: bool = False, tau: float | None = None) -> Tensor:
    """Scores by maxima, or by smooth maxima with ``tau``; with ``pairs``, of query i and document i."""
    check_padding(padding)
    if pairs and tau is not None:
        return _padded(query, doc.unsqueeze(1), padding, tau=tau).squeeze(1)  # own candidates, one of each query
    options: dict[str, Any] = {}
    if padding == "exact":
        options = dict(d_mask=nonzero_rows(doc), empty_score=EMPTY_SCORE)
    if tau is None:
        scores = (maxsim_pairs if pairs else maxsim)(query, doc, **options)
    else:
        scores = smooth_maxsim(query, doc, tau=tau, **options)
    return scores if padding == "exact" else scores.to(torch.promote_types(query.dtype, doc.dtype))
