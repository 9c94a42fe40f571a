"""Scores of a corpus chunk by chunk, of which the k best stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latemax.api import maxsim, score_corpus
from latemax.arguments import ragged
from latemax.search import corpus as corpora
from latemax.search import stream
from latemax.search.merge import TopK, merge
from latemax.search.tokens import mapped

# Of a chunk's scores, at once: the scores, their keys, the order as int64, a sort's copy of both, and the indices.
SCORE_BYTES = 48
# Two chunks that are copied take a quarter of the corpus, at least and at most so much, whatever the memory. Nothing is
# scored while the first one is read, and pages are slow to touch for the first time: 98 MB of cached tokens on a Zen 3
# core took 158 ms of processor time as one chunk, 108 ms with 32 MB; a store of 1 GB on 2 Zen 4 cores 1.7 s with 1 GB,
# 1.1 s with 64 to 256 MB. A GPU wants few and long copies.
LEAST_COPIED, MOST_COPIED = 1 << 25, 1 << 27


def is_one(q: Any) -> bool:
    """Whether q, which was checked, is one query [l_q, dim]."""
    return not ragged.is_ragged(q) and len(q.shape) == 2


class Scan:
    """What `topk` keeps while it goes through a corpus.

    Args:
        q, q_mask: the queries, on the device that scores. options: of `maxsim`.
        k: how many are kept. budget: bytes for a chunk of tokens and its scores.
    """

    def __init__(self, q: Any, q_mask: Any, k: int, budget: int, options: dict[str, Any]):
        self.q, self.q_mask, self.k, self.budget, self.options = q, q_mask, k, budget, options
        self.one_query = is_one(q)
        self.n_q = 1 if self.one_query else len(q)
        self.q_tokens = sum(map(len, q)) if ragged.is_ragged(q) else self.n_q * q.shape[-2]
        self.device: torch.device = (q[0] if isinstance(q, (list, tuple)) else q).device
        self.kept: TopK | None = None
        # of `reserve`
        self._copied: int | None = None
        self._buffers: list[Any] | None = None

    def runs(self, corpus: corpora.Corpus) -> list[tuple[int, int]]:
        """Runs of documents that the budget holds; ValueError for a document that it does not."""
        return corpora.runs(corpus, *self._limits(corpus), self.n_q * SCORE_BYTES)

    def reserve(self, corpus: corpora.Corpus) -> None:
        """Keeps the buffers for parts of a corpus from one call of `chunks` to the next."""
        self._copied = self._copied_bytes(corpus)
        budget, row = self._limits(corpus)
        self._buffers = stream.reserved(corpus, budget // max(1, row), self.device)

    def _limits(self, corpus: corpora.Corpus) -> tuple[int, int]:
        """(bytes of a run with its scores, bytes of a token)."""
        moves = corpus.device != self.device
        if not (moves or corpus.copies):
            return self.budget, 0
        row = corpus.token_bytes * (2 if moves or not corpus.resident else 1)
        largest = int(corpus.offsets.diff().max()) * row + self.n_q * SCORE_BYTES if len(corpus) else 0
        return min(self.budget, max(self._copied or self._copied_bytes(corpus), largest)), row

    def _copied_bytes(self, corpus: corpora.Corpus) -> int:
        if corpus.device != self.device:
            return MOST_COPIED
        return min(MOST_COPIED, max(LEAST_COPIED, int(corpus.offsets[-1]) * corpus.token_bytes // 4))

    def check(self, corpus: corpora.Corpus) -> None:
        """Raises what a search with wrong masks or weights would raise."""
        self._score(corpus, 0, 0, corpus.view(0, 0).to(self.device))

    def chunks(self, corpus: corpora.Corpus, runs: list[tuple[int, int]]) -> Any:
        """((a, b), scores [n_q, b - a]) of runs of documents."""
        for (a, b), tokens in stream.chunks(corpus, runs, self.device, self._buffers):
            scores = self._score(corpus, a, b, tokens)
            yield (a, b), scores.unsqueeze(0) if self.one_query else scores

    def _score(self, corpus: corpora.Corpus, a: int, b: int, tokens: Any) -> Tensor:
        keep = corpus.keep(a, b)
        if keep is None:
            offsets = corpus.offsets[a : b + 1] - corpus.offsets[a]
            return score_corpus(self.q, tokens, offsets, self.q_mask, **self.options)
        documents = mapped(lambda x: x.unflatten(0, (b - a, keep.shape[1])), tokens)
        return maxsim(self.q, documents, self.q_mask, keep.to(tokens.device), **self.options)

    def keep(self, scores: Tensor, indices: Tensor) -> None:
        """Takes scores [n_q, n] of documents of rising number, int64 [n]."""
        if self.kept is None:
            nothing = torch.empty(self.n_q, 0, dtype=torch.int64, device=scores.device)
            self.kept = TopK(scores[:, :0], nothing)
        self.kept = merge(self.kept, scores, indices.to(scores.device), self.k)
