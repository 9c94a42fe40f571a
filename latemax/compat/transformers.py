"""``score_retrieval`` of the ColPali, ColQwen2 and ColModernVBert processors of transformers (5.24.0)."""

from __future__ import annotations

import torch
from torch import Tensor

from latemax.compat._inputs import Items, check_padding, retrieval_scores

__all__ = ["score_retrieval"]


def score_retrieval(
    query_embeddings: Items,
    passage_embeddings: Items,
    batch_size: int = 128,
    output_dtype: torch.dtype | None = None,
    output_device: torch.device | str = "cpu",
    *,
    padding: str = "exact",
) -> Tensor:
    """The processors' ``score_retrieval``, without ``self``: every query against every passage.

    Args:
        query_embeddings: [n_q, l_q, dim], or a list of n_q tensors [l_i, dim].
        passage_embeddings: [n_p, l_p, dim], or a list of n_p tensors [l_i, dim], of the queries' device and dtype.
        batch_size: with ``padding="host"`` the passages that are padded together; nothing is batched otherwise.
        output_dtype: of the scores; None: the dtype of the embeddings. bfloat16 makes ties of close scores: pass
            ``torch.float32`` to rank by.
        output_device: of the scores.
        padding: "exact": every row of a list is a token, and the zero rows of a tensor are padding. "host": as
            transformers, where zero padding may have the maximum.

    Returns:
        scores [n_q, n_p]. They are float32 (float64 of float64) until the cast to ``output_dtype``. A passage without
        a token scores 0.

    Raises:
        ValueError: no queries, no passages, two devices, two dtypes, or an unknown ``padding``; also as
            ``latemax.maxsim``.
    """
    check_padding(padding)
    if len(query_embeddings) == 0:
        raise ValueError("No queries provided")
    if len(passage_embeddings) == 0:
        raise ValueError("No passages provided")
    if query_embeddings[0].device != passage_embeddings[0].device:
        raise ValueError("Queries and passages must be on the same device")
    dtype = query_embeddings[0].dtype
    if dtype != passage_embeddings[0].dtype:
        raise ValueError("Queries and passages must have the same dtype")
    scores = retrieval_scores(query_embeddings, passage_embeddings, batch_size, query_embeddings[0].device, padding)
    return scores.to(output_dtype or dtype).to(output_device)
