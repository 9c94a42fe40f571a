"""``BinaryScan``: a first stage that scores every document from one bit a number."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from latemax._progress import Bar
from latemax.quantized import QuantizedTokens, quantize
from latemax.search import corpus as corpora
from latemax.search import stream
from latemax.search.exact import topk
from latemax.search.tokens import concatenated


class BinaryScan:
    """A first stage: MaxSim of the query against the signs of every token, with the mean of its absolute values.

    It keeps ``ceil(dim / 8) + 4`` bytes a token in memory: 1/15 of float16 tokens of dim 384.

    Args:
        corpus: as in `topk`, without a mask; read once, in chunks.
        memory: bytes that chunks may take while quantizing, and while scoring. progress: a bar on stderr.

    Attributes:
        tokens: QuantizedTokens of kind "binary" [t_d, dim], on the CPU. offsets: int64 [n_d + 1].

    Raises:
        TypeError, ValueError: as `topk`; a token with NaN or infinity.
    """

    def __init__(self, corpus: Any, *, memory: int = 1 << 30, progress: bool = False):
        self.memory = memory
        self.tokens, self.offsets = encoded(corpora.of(corpus), "binary", memory, progress)

    def first(self, q: Tensor, q_mask: Tensor | None, n: int, within: Tensor | None = None) -> Tensor:
        """Candidates of every query, best first: int64 [n_q, n], -1 where ``within`` holds fewer.

        Args:
            q: [n_q, l_q, dim]. q_mask: [n_q, l_q] or None.
            n: how many.
            within: int64 indices of the documents to choose from; None is all.
        """
        most = len(self.offsets) - 1 if within is None else len(within)
        mask = None if q_mask is None else q_mask.cpu()
        found = topk(
            q.detach().cpu(), (self.tokens, self.offsets), min(n, most), mask,
            within=None if within is None else within.cpu(), memory=self.memory,
        )  # fmt: skip
        return F.pad(found.indices, (0, n - found.indices.shape[1]), value=-1)

    __call__ = first


def encoded(corpus: corpora.Corpus, kind: str, memory: int, progress: bool = False) -> tuple[QuantizedTokens, Tensor]:
    """The codes of all documents, on the CPU, and their offsets."""
    # two buffers of tokens and what quantize takes: float64 numbers, their absolute values and the codes
    row = 2 * corpus.token_bytes + 24 * corpus.dim
    parts: list[QuantizedTokens] = []
    bar = Bar(len(corpus), "quantizing ") if progress else None
    for (a, b), tokens in stream.chunks(corpus, corpora.runs(corpus, memory, row, 0), corpus.device):
        if not isinstance(tokens, QuantizedTokens):
            parts.append(quantize(tokens, kind).to("cpu"))
        else:
            parts.append(quantize(tokens.dequantize(), kind).to("cpu"))
        if bar is not None:
            bar.tick(b - a)
    return concatenated(parts), corpus.offsets
