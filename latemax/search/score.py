"""Scoring packed documents: the one place where search meets the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from latemax.api import maxsim


def score_packed(q, tokens: Tensor, offsets: Tensor, q_mask=None, **options) -> Tensor:
    """Scores [n_q, n_d] of documents end to end: tokens [t_d, dim], offsets int64 [n_d + 1] on the CPU."""
    lengths = offsets.diff()
    n_d = len(lengths)
    if n_d and lengths[0] and (lengths == lengths[0]).all():
        return maxsim(q, tokens.view(n_d, -1, tokens.shape[1]), q_mask, **options)
    return maxsim(q, list(tokens.split(lengths.tolist())), q_mask, **options)


def score_candidates(
    q: Tensor, tokens: Tensor, offsets: Tensor, candidates: Tensor, q_mask=None, *, empty_score: float, **options
) -> Tensor:
    """Scores [n_q, k] of the documents that candidates int64 [n_q, k] name; -1, no document, scores empty_score."""
    rows = []
    bounds = offsets.tolist()
    for i, own in enumerate(candidates.tolist()):
        documents = [tokens[bounds[c] : bounds[c + 1]] if c >= 0 else tokens[:0] for c in own]
        mask = None if q_mask is None else q_mask[i]
        rows.append(maxsim(q[i], documents, mask, empty_score=empty_score, **options))
    # an empty slot scores empty_score even for a query without a token
    return torch.where(candidates < 0, empty_score, torch.stack(rows))
