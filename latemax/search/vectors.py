"""First stages of one vector per document: the search for the largest inner products."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from latemax.search.first import Column, FirstStage

ENGINES = ("auto", "faiss", "torch")
# Scores that are in memory at once.
SCORES = 1 << 25


class OneVector(FirstStage):
    """A first stage of one vector per document, found by inner product with one vector a query.

    Args:
        corpus, memory, progress: as in `FirstStage`.
        engine: "faiss" (``pip install "latemax[faiss]"``), "torch" (an exact matrix product), or "auto": faiss if it
            is installed. `engine` of the object says which it is.
        factory: faiss's description of the index: "Flat" (exact, no copy of the vectors), or such as "HNSW32" or
            "IVF1024,Flat", which is built next to the vectors.

    Raises:
        ImportError: engine="faiss" without faiss.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("engine", "factory")

    def __init__(self, corpus: Any, *, engine: str, factory: str, memory: int, progress: bool):
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
        faiss = None
        if engine != "torch":
            try:
                import faiss
            except ImportError as error:
                if engine == "faiss":
                    raise ImportError("engine='faiss' needs faiss: pip install faiss-cpu") from error
        if faiss is None and factory != "Flat":
            raise ValueError(f"factory needs engine='faiss' (pip install faiss-cpu), got {factory!r}")
        self.engine, self.factory = "torch" if faiss is None else "faiss", factory
        super().__init__(corpus, memory, progress)

    def _width(self) -> int:
        raise NotImplementedError

    def _query(self, q: Tensor, q_mask: Tensor | None) -> Tensor:
        """float32 [n_q, width] of q [n_q, l_q, dim], whose masked tokens are 0."""
        raise NotImplementedError

    def _columns(self) -> dict[str, Column]:
        return {"vectors": Column(self._width())}

    @property
    def vectors(self) -> Tensor:
        """[n_d, width] float32 on the CPU."""
        return self.columns["vectors"]

    def _changed(self) -> None:
        self._index = None
        if self.factory != "Flat":
            import faiss

            self._index = faiss.index_factory(self._width(), self.factory, faiss.METRIC_INNER_PRODUCT)
            self._index.train(self.vectors.numpy())
            self._index.add(self.vectors.numpy())

    def _first(self, q: Tensor, q_mask: Tensor | None, n: int, within: Tensor | None) -> Tensor:
        wanted = self._query(q, q_mask).cpu()
        if within is not None:
            return within[best_products(wanted, self.vectors[within], n)]
        if self.engine == "torch":
            return best_products(wanted, self.vectors, n)
        if self._index is not None:
            return torch.from_numpy(self._index.search(wanted.numpy(), n)[1])
        import faiss

        found = faiss.knn(wanted.numpy(), self.vectors.numpy(), n, metric=faiss.METRIC_INNER_PRODUCT)[1]
        return torch.from_numpy(found.astype("int64"))


def best_products(q: Tensor, vectors: Tensor, n: int) -> Tensor:
    """The n vectors of largest inner product with each of q [n_q, width], best first: int64 [n_q, n]."""
    step = max(n, SCORES // len(q))
    kept = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64)
    for start in range(0, len(vectors), step):
        scores = q @ vectors[start : start + step].T
        top = scores.topk(min(n, scores.shape[1]), dim=-1)
        both = torch.cat([kept[0], top.values], 1), torch.cat([kept[1], top.indices + start], 1)
        order = both[0].topk(min(n, both[0].shape[1]), dim=-1)
        kept = order.values, both[1].gather(1, order.indices)
    return kept[1]
