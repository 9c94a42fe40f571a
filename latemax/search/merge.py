"""The k best of what was seen so far, with one order everywhere: score falling, then index rising, NaN last."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TopK(NamedTuple):
    """The best documents of every query, best first."""

    scores: Tensor  # [n_q, k] float32 or float64
    indices: Tensor  # [n_q, k] int64


def best(scores: Tensor, indices: Tensor, k: int) -> TopK:
    """The first k [n_q, k] of [n_q, n] where equal scores stand by rising index already; k may exceed n."""
    # torch.topk leaves the order of ties open; a stable sort keeps the one that stands. Rising order of 0 - score puts
    # NaN last, and makes -0 and 0 the one key that a radix sort would tell apart.
    order = (0.0 - scores).sort(dim=-1, stable=True).indices[:, :k]
    return TopK(scores.gather(1, order), indices.gather(1, order))


def merge(kept: TopK, scores: Tensor, first: int, k: int) -> TopK:
    """``kept``, all of lower index, and a chunk's scores [n_q, n] of documents first … first + n - 1."""
    indices = torch.arange(first, first + scores.shape[1], device=scores.device).expand(len(scores), -1)
    # so that what is sorted together is at most 2k wide
    chunk = best(scores, indices, k)
    return best(torch.cat([kept.scores, chunk.scores], 1), torch.cat([kept.indices, chunk.indices], 1), k)
