"""The k best of what was seen so far, with one order everywhere: score falling, then index rising, NaN last."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Ranking(NamedTuple):
    scores: Tensor
    indices: Tensor


class TopK(_Ranking):
    """The best documents of every query, best first; a pair ``scores, indices``.

    Attributes:
        scores: [n_q, k] float32 or float64. indices: [n_q, k] int64; of one query [l_q, dim], [k] each.
        argmax: int32 [n_q, k, l_q], the token of its document that each query token's maximum is; None unless asked
            for. -1 for masked query tokens, and where a document or a slot is empty.
        stats: what `latemax.topk` read of a corpus with codes: ``{"documents", "rescored", "bytes"}``, how many there
            were to rank, how many were scored from their own tokens, and the bytes of codes and tokens that were read.
            None elsewhere.
    """

    argmax: Tensor | None
    stats: dict[str, Any] | None

    def __new__(
        cls,
        scores: Tensor,
        indices: Tensor,
        argmax: Tensor | None = None,
        stats: dict[str, Any] | None = None,
    ) -> TopK:
        self = super().__new__(cls, scores, indices)
        self.argmax, self.stats = argmax, stats
        return self

    @classmethod
    def _make(cls, iterable: Iterable[Tensor]) -> TopK:
        return cls(*iterable)

    def _replace(self, **changes: Any) -> TopK:
        return TopK(**{**self._asdict(), "argmax": self.argmax, "stats": self.stats, **changes})

    def row(self, i: int) -> TopK:
        """The ranking of query i: scores [k], indices [k], argmax [k, l_q]."""
        return TopK(self.scores[i], self.indices[i], None if self.argmax is None else self.argmax[i], self.stats)


def best(scores: Tensor, indices: Tensor, k: int) -> TopK:
    """The first k [n_q, k] of [n_q, n] where equal scores are in order of index already; k may exceed n."""
    # torch.topk leaves the order of ties open; a stable sort keeps the one it finds. Rising order of 0 - score puts
    # NaN last, and makes -0 and 0 the one key that a radix sort would tell apart.
    order = (0.0 - scores).sort(dim=-1, stable=True).indices[:, :k]
    return TopK(scores.gather(1, order), indices.gather(1, order))


def merge(kept: TopK, scores: Tensor, indices: Tensor, k: int) -> TopK:
    """``kept``, and scores [n_q, n] of other documents of rising number, int64 [n]."""
    # so that what is sorted together is at most 2k wide
    chunk = best(scores, indices.expand(len(scores), -1), k)
    order = torch.cat([kept.indices, chunk.indices], 1).sort(dim=-1)
    return best(torch.cat([kept.scores, chunk.scores], 1).gather(1, order.indices), order.values, k)
