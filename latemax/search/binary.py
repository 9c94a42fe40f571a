"""``BinaryScan``: a first stage that scores every document from one bit a number."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from latemax._progress import Bar
from latemax.quantized import QuantizedTokens, quantize
from latemax.search import corpus as corpora
from latemax.search import stream
from latemax.search.exact import topk
from latemax.search.first import Column, FirstStage, check_finite
from latemax.search.tokens import concatenated, floats


class BinaryScan(FirstStage):
    """A first stage: MaxSim of the query against the signs of every token, with the mean of its absolute values.

    It keeps ``ceil(dim / 8) + 4`` bytes per token in memory: 1/15 of float16 tokens of dim 384.

    Args:
        corpus: as in `topk`, without a mask; read once, in chunks.
        normalize: as in the search that follows: queries are scored by cosine.
        memory: bytes that chunks may take while quantizing, and while scoring. progress: a bar on stderr.

    Attributes:
        tokens: QuantizedTokens of kind "binary" [t_d, dim], on the CPU. offsets: int64 [n_d + 1].

    Raises:
        TypeError, ValueError: as `topk`; a token with NaN or infinity.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("normalize",)
    # quantize takes float64 numbers, their absolute values and the codes
    WORKING: ClassVar[int] = 24

    def __init__(self, corpus: Any, *, normalize: bool = False, memory: int = 1 << 30, progress: bool = False):
        self.normalize = bool(normalize)
        super().__init__(corpus, memory, progress)

    @property
    def tokens(self) -> QuantizedTokens:
        return QuantizedTokens(self.columns["codes"], self.columns["scale"], None, "binary", self.dim)

    def _columns(self) -> dict[str, Column]:
        return {"codes": Column(-(-self.dim // 8), dtype=torch.uint8), "scale": Column()}

    def _lengths(self, corpus: corpora.Corpus) -> Tensor:
        return corpus.offsets.diff()

    def _encode(self, tokens: Tensor, offsets: Tensor, lengths: Tensor, out: dict[str, Tensor]) -> None:
        made = quantize(tokens, "binary")
        out["codes"].copy_(made.codes)
        out["scale"].copy_(made.scale)

    def _first(self, q: Tensor, q_mask: Tensor | None, n: int, within: Tensor | None) -> Tensor:
        q, q_mask = q.cpu(), None if q_mask is None else q_mask.cpu()
        options: dict[str, Any] = dict(within=within, normalize=self.normalize, memory=self.memory)
        return topk(q, (self.tokens, self.offsets), n, q_mask, **options).indices


def encoded(corpus: corpora.Corpus, kind: str, memory: int, progress: bool = False) -> tuple[QuantizedTokens, Tensor]:
    """The codes of all documents, on the CPU, and their offsets; ValueError for a token that is not finite, named."""
    # two buffers of tokens and what quantize takes
    row = 2 * corpus.token_bytes + BinaryScan.WORKING * corpus.dim
    parts: list[QuantizedTokens] = []
    bar = Bar(len(corpus), "quantizing ") if progress else None
    for (a, b), tokens in stream.chunks(corpus, corpora.runs(corpus, memory, row, 0), corpus.device):
        numbers = floats(tokens)
        check_finite(numbers, corpus, a)
        parts.append(quantize(numbers, kind).to("cpu"))
        if bar is not None:
            bar.tick(b - a)
    return concatenated(parts), corpus.offsets
