"""``Lemur``: a learned map of query tokens, under which a document is one vector that estimates MaxSim."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from latemax.api import score_corpus
from latemax.arguments import arrays, check
from latemax.search import corpus as corpora
from latemax.search.first import check_finite, finite
from latemax.search.tokens import floats
from latemax.search.vectors import OneVector

BATCH, RATE, CLIP = 256, 3e-3, 0.5
# Of the mean square of a feature: keeps the least squares solvable where features repeat each other.
RIDGE = 1e-3


class Lemur(OneVector):
    """A first stage: learned features of query tokens and one vector per document, after LEMUR (arXiv 2601.21853).

    A token x has features ψ(x) = layer norm(GELU(A x + b)), learned so that a linear map of them gives the maximum over
    each of some sample documents' tokens. With ψ fixed, a document is the vector w for which w · ψ(x) is closest to its
    own maxima over sample tokens x, by least squares; a query is the sum of its tokens' features. Sample tokens are
    scored against every document, which is what building costs. New documents need nothing to be learned again.

    Args:
        corpus, engine, factory, memory, progress: as in `MeanPool`.
        queries: tokens [t, dim] as those of queries to come; None samples tokens of the corpus, which suits queries
            that are images. For text queries, pass samples of them.
        width: numbers of a vector.
        documents: to learn from. tokens: sample tokens to learn from. solve: sample tokens of the least squares; at
            least ``width``.
        epochs: passes over the sample tokens.
        normalize: as in the search that follows: tokens are taken at length 1.
        seed: of the samples and of the learning. Equal builds need the same number of threads.

    Raises:
        ImportError: engine="faiss" without faiss.
        TypeError, ValueError: as `topk`; a token with NaN or infinity; numbers below 1; solve below width; no token to
            learn from.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = (*OneVector.SETTINGS, "width", "normalize")
    LEARNED: ClassVar[tuple[str, ...]] = ("layer", "bias", "gain", "shift", "sample", "solver")

    def __init__(
        self, corpus: Any, *, queries: Any = None, width: int = 512, documents: int = 1024, tokens: int = 8192,
        solve: int = 2048, epochs: int = 4, normalize: bool = False, seed: int = 0, engine: str = "auto",
        factory: str = "Flat", memory: int = 1 << 30, progress: bool = False,
    ):  # fmt: skip
        numbers = dict(width=width, documents=documents, tokens=tokens, solve=solve, epochs=epochs)
        for name, number in numbers.items():
            check.check_positive(name, number)
        if solve < width:
            raise ValueError(f"solve must be at least width, {width}; got {solve}")
        self.width, self.normalize = width, bool(normalize)
        self._options = queries, documents, tokens, solve, epochs, seed
        super().__init__(corpus, engine=engine, factory=factory, memory=memory, progress=progress)
        del self._options

    def _width(self) -> int:
        return self.width

    def _prepare(self, corpus: corpora.Corpus) -> None:
        queries, documents, n_tokens, solve, epochs, seed = self._options
        made = torch.Generator().manual_seed(seed)
        full = corpus.offsets.diff().nonzero().flatten()
        if not len(full):
            raise ValueError(f"corpus must hold a token to learn from, got {len(corpus)} documents without one")
        sampled = full[torch.randperm(len(full), generator=made)[:documents]].sort().values
        chosen = corpora.Subset(corpus, sampled)
        content = floats(chosen.view(0, len(chosen))).cpu()
        check_finite(content, chosen, 0)
        pool = content if queries is None else arrays.as_tensor("queries", queries)
        check.check_tokens("queries", pool, (2,), "[t, dim]")
        if pool.shape[1] != corpus.dim or not len(pool):
            raise ValueError(f"queries must be at least one token of dim {corpus.dim}; got shape {list(pool.shape)}")
        if not finite(pool.detach()):
            raise ValueError("queries must be finite, got NaN or infinity")
        order = torch.randperm(len(pool), generator=made)
        x = pool.detach().cpu()[order[:n_tokens]]
        wanted = self._maxima(x, content, chosen.offsets)
        self._learn(x, (wanted - wanted.mean()) / wanted.std().clamp(min=1e-12), epochs, made)
        # in the documents' dtype, in which they are scored against every one
        self.sample = pool.detach().cpu()[order[torch.arange(solve) % len(order)]].to(content.dtype)
        features = self._features(self.sample).double()
        squares = features.T @ features
        squares.diagonal().add_(RIDGE * squares.diagonal().mean())
        self.solver = torch.cholesky_solve(features.T, torch.linalg.cholesky(squares)).float()

    def _maxima(self, x: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
        """float32 [n, n_d]: MaxSim of n queries of one token each; of an empty document 0."""
        with torch.no_grad():
            options: dict[str, Any] = dict(normalize=self.normalize, empty_score=0.0)
            return score_corpus(x.unsqueeze(1).to(tokens.device), tokens, offsets, **options).float().cpu()

    def _learn(self, x: Tensor, wanted: Tensor, epochs: int, made: torch.Generator) -> None:
        """Adam on the mean square error of [n, documents], with the rate falling to zero."""
        x, n = self._plain(x), wanted.shape[1]

        def drawn(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, generator=made) / rows**0.5).requires_grad_()

        self.layer, self.bias = drawn(self.dim, self.width), torch.zeros(self.width).requires_grad_()
        self.gain, self.shift = torch.ones(self.width).requires_grad_(), torch.zeros(self.width).requires_grad_()
        last, constant = drawn(self.width, n), torch.zeros(n).requires_grad_()
        weights = [self.layer, self.bias, self.gain, self.shift, last, constant]
        adam = torch.optim.Adam(weights, lr=RATE)
        steps = epochs * -(-len(x) // BATCH)
        falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
        with torch.enable_grad():
            for _ in range(epochs):
                for batch in torch.randperm(len(x), generator=made).split(BATCH):
                    adam.zero_grad()
                    F.mse_loss(self._features(x[batch]) @ last + constant, wanted[batch]).backward()
                    torch.nn.utils.clip_grad_norm_(weights, CLIP)
                    adam.step()
                    falling.step()
        for name in ("layer", "bias", "gain", "shift"):
            setattr(self, name, getattr(self, name).detach())

    def _features(self, x: Tensor) -> Tensor:
        """float32 [n, width] of tokens [n, dim]."""
        hidden = F.gelu(torch.addmm(self.bias, self._plain(x), self.layer))
        return F.layer_norm(hidden, (self.width,), self.gain, self.shift)

    def _encode(self, tokens: Tensor, offsets: Tensor, lengths: Tensor, out: dict[str, Tensor]) -> None:
        out["vectors"].copy_((self.solver @ self._maxima(self.sample, tokens, offsets)).T)

    def _query(self, q: Tensor, q_mask: Tensor | None) -> Tensor:
        with torch.no_grad():
            features = self._features(q.reshape(-1, self.dim)).view(len(q), -1, self.width)
        if q_mask is not None:
            features = features * q_mask.cpu().unsqueeze(-1)
        return features.sum(1)

    def _plain(self, x: Tensor) -> Tensor:
        x = x.float().cpu()
        return F.normalize(x, dim=-1) if self.normalize else x
