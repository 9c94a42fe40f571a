"""``Muvera``: fixed-dimensional encodings, whose inner product estimates MaxSim."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from latemax.arguments import check
from latemax.search import corpus as corpora
from latemax.search.first import owners
from latemax.search.vectors import OneVector

MAX_BITS = 10


class Muvera(OneVector):
    """A first stage: one vector per document and query, whose inner product estimates MaxSim (arXiv 2405.19504).

    ``repetitions`` times, random planes cut the space into 2^bits clusters. For each cluster a document keeps the mean
    of its tokens there (or, if there is none, its token that differs in the fewest planes), and a query the sum of its
    tokens. Random signs project each of these to ``projection`` numbers, so a vector has repetitions · 2^bits ·
    projection numbers, 5,120 by default. Nothing is learned, so documents can come and go.

    Args:
        corpus, engine, factory, memory, progress: as in `MeanPool`.
        repetitions: more give a better estimate at a proportional cost. bits: planes of a repetition, 0 to 10.
        projection: numbers per cluster, at most dim, which keeps the tokens as they are.
        normalize: as in the search that follows: tokens are taken at length 1.
        seed: of planes and signs.

    Raises:
        ImportError: engine="faiss" without faiss.
        TypeError, ValueError: as `topk`; a token with NaN or infinity; numbers outside the ranges above.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = (
        *OneVector.SETTINGS, "repetitions", "bits", "projection", "normalize", "seed",
    )  # fmt: skip
    LEARNED: ClassVar[tuple[str, ...]] = ("planes", "signs")

    def __init__(
        self, corpus: Any, *, repetitions: int = 20, bits: int = 5, projection: int = 8, normalize: bool = False,
        seed: int = 0, engine: str = "auto", factory: str = "Flat", memory: int = 1 << 30, progress: bool = False,
    ):  # fmt: skip
        check.check_positive("repetitions", repetitions)
        check.check_positive("projection", projection)
        if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits <= MAX_BITS:
            raise ValueError(f"bits must be an int from 0 to {MAX_BITS}, got {bits!r}")
        self.repetitions, self.bits, self.projection = repetitions, bits, projection
        self.normalize, self.seed = bool(normalize), seed
        super().__init__(corpus, engine=engine, factory=factory, memory=memory, progress=progress)

    def _prepare(self, corpus: corpora.Corpus) -> None:
        dim, made = corpus.dim, torch.Generator().manual_seed(self.seed)
        if self.projection > dim:
            raise ValueError(f"projection must be at most dim, {dim}; got {self.projection}")
        self.planes = torch.randn(self.repetitions, dim, self.bits, generator=made)
        if self.projection == dim:
            self.signs = torch.eye(dim).expand(self.repetitions, dim, dim)
        else:
            signs = torch.randint(0, 2, (self.repetitions, dim, self.projection), generator=made)
            self.signs = (2.0 * signs - 1) / math.sqrt(self.projection)

    def _width(self) -> int:
        return self.repetitions * 2**self.bits * self.projection

    def _parts(self, tokens: Tensor, repetition: int) -> tuple[Tensor, Tensor]:
        """(cluster int64 [t], projection float32 [t, projection]) of tokens [t, dim]."""
        sides = (tokens @ self.planes[repetition]) > 0
        cluster = (sides * 2 ** torch.arange(self.bits)).sum(-1)
        return cluster, tokens @ self.signs[repetition]

    def _encode(self, tokens: Tensor, offsets: Tensor, lengths: Tensor, out: dict[str, Tensor]) -> None:
        tokens, n, clusters = self._plain(tokens), len(offsets) - 1, 2**self.bits
        owner, last = owners(offsets), len(tokens)
        vectors = out["vectors"].view(n, self.repetitions, clusters, self.projection)
        code = torch.arange(clusters)
        differ = torch.zeros(clusters, clusters)
        for bit in range(self.bits):
            differ += ((code[:, None] ^ code) >> bit) & 1
        for repetition in range(self.repetitions):
            cluster, projected = self._parts(tokens, repetition)
            cell = owner * clusters + cluster
            count = torch.zeros(n * clusters).index_add_(0, cell, torch.ones(last))
            sums = torch.zeros(n * clusters, self.projection).index_add_(0, cell, projected)
            sums /= count.clamp(min=1).unsqueeze(-1)
            # the first token of each cluster; of an empty one, that of the cluster with fewest sides different
            leader = torch.full((n * clusters,), last).scatter_reduce_(0, cell, torch.arange(last), "amin")
            empty = count.view(n, clusters) == 0
            nearest = torch.empty(n, clusters, dtype=torch.int64)
            # n · clusters² numbers in all, a few documents at a time
            step = max(1, (1 << 22) // clusters**2)
            for a in range(0, n, step):
                away = differ + torch.where(empty[a : a + step], math.inf, 0.0).unsqueeze(1)
                nearest[a : a + step] = away.argmin(-1)
            # a document without a token stays zero
            fill = empty & ~empty.all(1, keepdim=True)
            documents, _ = fill.nonzero(as_tuple=True)
            tokens_of = leader[documents * clusters + nearest[fill]]
            sums.view(n, clusters, -1)[fill] = projected[tokens_of]
            vectors[:, repetition] = sums.view(n, clusters, -1)

    def _query(self, q: Tensor, q_mask: Tensor | None) -> Tensor:
        n, clusters = len(q), 2**self.bits
        tokens = self._plain(q.reshape(-1, q.shape[-1]))
        owner = torch.arange(n).repeat_interleave(q.shape[1])
        parts = []
        for repetition in range(self.repetitions):
            cluster, projected = self._parts(tokens, repetition)
            sums = torch.zeros(n * clusters, self.projection)
            parts.append(sums.index_add_(0, owner * clusters + cluster, projected).view(n, -1))
        return torch.cat(parts, 1)

    def _plain(self, tokens: Tensor) -> Tensor:
        tokens = tokens.float().cpu()
        return F.normalize(tokens, dim=-1) if self.normalize else tokens
