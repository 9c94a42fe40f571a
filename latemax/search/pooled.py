"""First stages of means: one per document (`MeanPool`), or one per row of its patches (`RowPool`)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from latemax.search import corpus as corpora
from latemax.search.exact import topk
from latemax.search.first import Column, FirstStage, owners
from latemax.search.vectors import OneVector


class MeanPool(OneVector):
    """A first stage: every image as the mean of its tokens, every query as the mean of its own, ranked by cosine.

    Args:
        corpus: as in `topk`, without a mask; read once, in chunks. A document without a token is the zero vector.
        engine: "faiss" (``pip install "latemax[faiss]"``), "torch" (an exact matrix product), or "auto": faiss if it
            is installed. `engine` of the object says which it is.
        factory: faiss's description of the index, such as "Flat" (exact), "IVF1024,Flat" or "HNSW32".
        memory: bytes that chunks may take while pooling. progress: a bar on stderr.

    Attributes:
        vectors: [n_d, dim] float32 on the CPU, of length 1.

    Raises:
        ImportError: engine="faiss" without faiss.
        TypeError, ValueError: as `topk`; a token with NaN or infinity.

    Example:
        >>> first = MeanPool(store)
        >>> found = latemax.two_stage(q, store, 10, first, n_candidates=500)
        >>> first.save("pages/mean.first")
    """

    def __init__(
        self, corpus: Any, *, engine: str = "auto", factory: str = "Flat", memory: int = 1 << 30, progress: bool = False
    ):
        super().__init__(corpus, engine=engine, factory=factory, memory=memory, progress=progress)

    def _width(self) -> int:
        return self.dim

    def _encode(self, tokens: Tensor, offsets: Tensor, lengths: Tensor, out: dict[str, Tensor]) -> None:
        sums = out["vectors"].zero_()
        sums.index_add_(0, owners(offsets), tokens.float().cpu())
        sums.copy_(F.normalize(sums, dim=-1))

    def _query(self, q: Tensor, q_mask: Tensor | None) -> Tensor:
        return F.normalize(q.float().sum(1), dim=-1)


class RowPool(FirstStage):
    """A first stage: every row of patches as its mean, of length 1; queries are scored by MaxSim over the means.

    A document with a grid (rows, cols) in its store becomes ``rows`` vectors, any other of l tokens about √l, each of
    consecutive tokens. They are kept in the corpus's dtype, of codes in float32.

    Args:
        corpus, memory, progress: as in `MeanPool`.
        normalize: as in the search that follows: queries are scored by cosine.

    Raises:
        TypeError, ValueError: as `topk`; a token with NaN or infinity.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("normalize", "dtype_name")

    def __init__(self, corpus: Any, *, normalize: bool = False, memory: int = 1 << 30, progress: bool = False):
        self.normalize = bool(normalize)
        super().__init__(corpus, memory, progress)

    def _prepare(self, corpus: corpora.Corpus) -> None:
        floating = corpus.dtype.is_floating_point
        self.dtype_name = str(corpus.dtype).removeprefix("torch.") if floating else "float32"

    def _columns(self) -> dict[str, Column]:
        return {"means": Column(self.dim, dtype=getattr(torch, self.dtype_name))}

    def _lengths(self, corpus: corpora.Corpus) -> Tensor:
        lengths = corpus.offsets.diff()
        found = lengths.sqrt().round().to(torch.int64)
        rows = corpus.grid_rows()
        return found if rows is None else torch.where(rows > 0, rows, found)

    def _encode(self, tokens: Tensor, offsets: Tensor, lengths: Tensor, out: dict[str, Tensor]) -> None:
        owner, counts = owners(offsets), offsets.diff()
        place = torch.arange(len(owner)) - offsets[owner]
        # of a grid, token r · cols + c: row r
        row = place * lengths[owner] // counts[owner] + (lengths.cumsum(0) - lengths)[owner]
        sums = torch.zeros(len(out["means"]), self.dim)
        sums.index_add_(0, row, tokens.float().cpu())
        out["means"].copy_(F.normalize(sums, dim=-1))

    def _first(self, q: Tensor, q_mask: Tensor | None, n: int, within: Tensor | None) -> Tensor:
        q, q_mask = q.cpu(), None if q_mask is None else q_mask.cpu()
        pooled = (self.columns["means"], self.offsets)
        options: dict[str, Any] = dict(within=within, normalize=self.normalize, memory=self.memory)
        return topk(q, pooled, n, q_mask, **options).indices
