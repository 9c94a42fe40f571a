"""The scoring functions of colpali-engine (0.3.18): retrieval scores, and the scores of its losses."""

from __future__ import annotations

import torch
from torch import Tensor

from latemax import maxsim
from latemax.compat._inputs import EMPTY_SCORE, Items, check_padding, nonzero_rows, retrieval_scores

__all__ = ["maxsim_inbatch", "maxsim_kd", "score_multi_vector"]


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


def _padded(query: Tensor, doc: Tensor, padding: str) -> Tensor:
    check_padding(padding)
    if padding == "host":
        return maxsim(query, doc).to(torch.promote_types(query.dtype, doc.dtype))
    return maxsim(query, doc, d_mask=nonzero_rows(doc), empty_score=EMPTY_SCORE)
