"""Exact top-k of a corpus that has 8-bit codes: codes are streamed, and only documents that may be among the k best are
read and scored.

A code bounds what its token's score can be. A document is left out if even its upper bound, with the most that the
scoring kernel can round it up, is below the k-th best lower bound, with the most that it can round that down. Bounds of
an 8-bit query come first. Those of the float query follow for what survives, at the end and in one call: starting
threads for a few documents takes longer than their bounds. The tokens themselves are last.

Where the bounds are loose, codes cost more than they save. Documents are taken in blocks: where a block shows that more
than LOOSE of its documents would survive, the next documents are scored without codes, twice as many every time, and
then another block is tried.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latemax._progress import Bar
from latemax.bounds import bound_corpus
from latemax.quantized import QuantizedTokens
from latemax.search import corpus as corpora
from latemax.search import stream
from latemax.search.margin import LARGEST, Margin, largest_norms
from latemax.search.scan import SCORE_BYTES, Scan
from latemax.search.tokens import concatenated

# Share of documents that survive, above which a search stops using codes: after the bounds of an 8-bit query, and after
# those of the float query too, where a whole block needed both (with AVX2 they take as long as scores of the tokens).
LOOSE, LOOSE_TWICE = 0.3, 0.1
# Documents of a block and of the first one after a gap, and of the first gap, as shares of the corpus.
BLOCK, SAMPLE, GAP = 0.05, 0.01, 0.15
# A gap has at least this many bytes of tokens, times tokens of queries: 2^27 bytes for 64, which take some 80 ms. A
# sample takes 2 ms of its own, however small the corpus is.
GAP_WORK = 1 << 33
# Bounds of the float query are taken to be at least this share as wide as those of an 8-bit one (mostly it is half):
# where even that would leave a block loose, they are not computed.
NARROWEST = 0.25
# A sample of fewer documents says little.
FEW = 20
# Shares of the memory: codes with their bounds, and documents that wait to be scored; the rest is for their tokens.
CODES_MEMORY, WAITING_MEMORY = 0.3, 0.1
# Bounds of a query and a document: both as float32 and as float64 with their margin, and what sorts them.
BOUND_BYTES = 2 * SCORE_BYTES


def codes_of(codes: Any, corpus: corpora.Corpus) -> corpora.Corpus:
    """The codes of a corpus in memory, checked to have its lengths.

    Raises:
        TypeError, ValueError: naming ``codes``, the rule and what came.
    """
    first = codes[0] if isinstance(codes, (list, tuple)) and codes else codes
    if not isinstance(first, QuantizedTokens) or first.kind != "int8":
        came = first.kind if isinstance(first, QuantizedTokens) else type(first).__name__
        raise TypeError(f"codes must be 'auto', 'off' or QuantizedTokens of kind 'int8', got {came}")
    if not corpus.resident or corpus.dtype == torch.int8 or corpus.keep(0, 0) is not None:
        raise ValueError("codes must be 'auto' or 'off' with a store, a corpus of codes or a d_mask")
    found = corpora.of(codes)
    if found.dim != corpus.dim or not torch.equal(found.offsets, corpus.offsets):
        raise ValueError(
            f"codes must have the dim and the lengths of corpus; got dim {found.dim} and {corpus.dim}, {len(found)} "
            f"documents of {int(found.offsets[-1])} tokens and {len(corpus)} of {int(corpus.offsets[-1])}"
        )
    return found


def fits(scan: Scan, searched: corpora.Corpus) -> bool:
    """Whether the memory holds the largest document twice, as codes and as tokens, and codes can pay."""
    if searched.codes is None or not scan.n_q or scan.k > LOOSE * len(searched):
        return False
    longest = int(searched.offsets.diff().max())
    codes = longest * _code_bytes(searched) + scan.n_q * BOUND_BYTES
    tokens = 2 * longest * searched.token_bytes + scan.n_q * SCORE_BYTES
    share = CODES_MEMORY + WAITING_MEMORY
    return codes <= scan.budget * CODES_MEMORY and tokens <= scan.budget * (1 - share)


def _code_bytes(searched: corpora.Corpus) -> int:
    """Two buffers, what survives of one, and the norms of tokens."""
    assert searched.codes is not None
    return 3 * searched.codes.token_bytes + 16


class Rough(NamedTuple):
    """What bounds of the float query need: documents' codes, a copy, and what is known of them."""

    tokens: Any
    lengths: Tensor  # int64 [m] on the CPU
    margin: Tensor  # float64 [n_q, m]
    unknown: Tensor  # bool [m]


class Search:
    """One search; `scan.kept` is its result.

    Args:
        scan: scores documents and keeps the k best. searched: the corpus, with codes. margin: of the scoring kernel.
        options: of `bound_corpus`.
    """

    def __init__(self, scan: Scan, searched: corpora.Corpus, margin: Margin, options: dict[str, Any], bar: Bar | None):
        assert searched.codes is not None
        self.scan, self.searched, self.codes, self.margin = scan, searched, searched.codes, margin
        # bounds hold whatever computes them
        self.options, self.bar, self.n = options | {"backend": "auto"}, bar, len(searched)
        total = scan.budget
        self.waiting_bytes = total * WAITING_MEMORY
        budget, row = int(total * CODES_MEMORY), _code_bytes(searched)
        self.runs = corpora.runs(self.codes, budget, row, scan.n_q * BOUND_BYTES)
        rows = budget // row
        self._most = max(1, int(BLOCK * self.n))
        self._sample = min(self._most, max(FEW, int(SAMPLE * self.n)))
        self._buffers = stream.reserved(self.codes, rows, scan.device)
        scan.budget = int(total * (1 - CODES_MEMORY - WAITING_MEMORY))
        scan.reserve(searched)
        # what the k best documents so far score at least, float64 [n_q, k]; a document counts once
        self.floor = torch.full((scan.n_q, scan.k), -math.inf, dtype=torch.float64, device=scan.device)
        # another bound of that, which documents raise that the floor has counted with less: float64 [n_q, 1]
        self.level = self.floor[:, -1:]
        # documents that may be among the k best: int64 [m] on the CPU, their upper bounds [n_q, m], and what finer
        # bounds need; what they take in bytes
        self.waiting: list[tuple[Tensor, Tensor, Rough | None]] = []
        self._held = 0
        self.rescored = self.bytes = 0
        # whether bounds of the float query are tighter than those of an 8-bit one
        self.finer = True

    def run(self) -> dict[str, Any]:
        """Goes through the corpus; returns the statistics of `TopK`."""
        work = int(self.searched.offsets[-1]) * self.searched.token_bytes * self.scan.q_tokens
        a, gap = 0, max(1, round(GAP * self.n), self.n * GAP_WORK // max(1, work))
        while a < self.n:
            # a sample first: nothing more is read before it is known
            a, tight = self._blocks(self._planned(a, self._sample)[:1])
            if tight and a < self.n:
                a, tight = self._blocks(self._planned(a, self._most))
            if not tight and a < self.n:
                end = min(self.n, a + gap)
                numbers = self._loose()
                self._score(torch.cat([numbers, torch.arange(a, end, device="cpu")]), seen=len(numbers))
                self._tick(end - a)
                a, gap = end, 2 * gap
        self._score_waiting()
        return {"documents": self.n, "rescored": self.rescored, "bytes": self.bytes}

    def _planned(self, a: int, size: int) -> list[tuple[int, int]]:
        """Blocks of at most ``size`` documents from a on."""
        found = []
        for _, end in self.runs:
            while a < end:
                found.append((a, min(end, a + size)))
                a = found[-1][1]
        return found

    def _blocks(self, blocks: list[tuple[int, int]]) -> tuple[int, bool]:
        """Takes blocks until the bounds of one are loose; returns where it stopped, and whether they were tight."""
        end = blocks[0][0]
        for (a, end), tokens in stream.chunks(self.codes, blocks, self.scan.device, self._buffers):
            tight = self._block(a, end, tokens)
            self._tick(end - a)
            if not tight:
                return end, False
            # twice, as it is concatenated
            if 2 * self._held > self.waiting_bytes:
                self._score_waiting()
        return end, True

    def _tick(self, documents: int) -> None:
        if self.bar is not None:
            self.bar.tick(documents)

    def _block(self, a: int, b: int, tokens: Any) -> bool:
        """Bounds of documents a … b - 1, of which those that may be among the k best wait; whether that is few."""
        offsets = self.codes.offsets[a : b + 1] - self.codes.offsets[a]
        self.bytes += len(tokens) * self.codes.token_bytes
        largest = largest_norms(tokens.scale, tokens.error, offsets, self.codes.dim)
        margin = self.margin.of(largest)
        # a token that is not finite, or so large that a kernel's sum may overflow: nothing is known
        unknown = ~(largest < LARGEST)
        lower, upper = self._bounds(tokens, offsets, margin, unknown, coarse=True)
        floor, tight = self._judged(lower, upper, LOOSE)
        finer = self.finer
        if not tight and finer:
            finer = self._may_be_tight(lower, upper)
        if not tight and finer:
            # all at once: most of them are needed
            low, high = self._bounds(tokens, offsets, margin, unknown, coarse=False)
            # where no instruction multiplies an 8-bit query faster, both bounds are computed alike
            self.finer = bool((low > lower).any() or (high < upper).any())
            lower, upper = torch.maximum(lower, low), torch.minimum(upper, high)
            floor, tight = self._judged(lower, upper, LOOSE_TWICE)
            finer = False
        self.floor = floor
        alive = (upper >= self._least()).any(0).nonzero().flatten()
        numbers, rough = alive.cpu(), None
        if finer and len(numbers):
            part = corpora.Flat(tokens, offsets).some(numbers)
            rough = Rough(part, offsets.diff()[numbers], margin[:, alive], unknown[alive])
            self._held += len(part) * self.codes.token_bytes + 8 * margin[:, alive].numel()
        self._held += 8 * (self.scan.n_q + 1) * len(numbers)
        self.waiting.append((a + numbers, upper[:, alive], rough))
        return tight

    def _judged(self, lower: Tensor, upper: Tensor, loose: float) -> tuple[Tensor, bool]:
        """The floor with documents of these bounds [n_q, n], and whether at most a share ``loose`` of them survives."""
        floor, n = self._raised(lower), lower.shape[1]
        # the k-th best of all documents is about as good as the block's share of k
        rank = min(n, max(1, math.ceil(self.scan.k * n / self.n)))
        level = torch.maximum(floor[:, -1:], lower.topk(rank, dim=1).values[:, -1:])
        return floor, float((upper >= level).any(0).double().mean()) <= loose

    def _may_be_tight(self, lower: Tensor, upper: Tensor) -> bool:
        """Whether bounds of the float query may be tight where these of an 8-bit one, [n_q, n], are loose."""
        middle, half = (lower + upper) / 2, NARROWEST / 2 * (upper - lower)
        # infinite bounds stay as they are
        known = middle.isfinite()
        lower, upper = torch.where(known, middle - half, lower), torch.where(known, middle + half, upper)
        return self._judged(lower, upper, LOOSE_TWICE)[1]

    def _least(self) -> Tensor:
        """What a document's upper bound must reach, float64 [n_q, 1]."""
        return torch.maximum(self.floor[:, -1:], self.level)

    def _bounds(
        self, tokens: Any, offsets: Tensor, margin: Tensor, unknown: Tensor, *, coarse: bool
    ) -> tuple[Tensor, Tensor]:
        """What the scores of the tokens are at least and at most, as a kernel computes them: float64 [n_q, n]."""
        lower, upper = bound_corpus(self.scan.q, tokens, offsets, self.scan.q_mask, **self.options, coarse=coarse)
        if self.scan.one_query:
            lower, upper = lower.unsqueeze(0), upper.unsqueeze(0)
        lower, upper = lower.double() - margin, upper.double() + margin
        lower = torch.where(lower.isnan() | unknown, -math.inf, lower)
        return lower, torch.where(upper.isnan() | unknown, math.inf, upper)

    def _raised(self, lower: Tensor) -> Tensor:
        """The floor with documents of ``lower`` [n_q, n]."""
        return torch.cat([self.floor, lower], 1).topk(self.scan.k, dim=1).values

    def _loose(self) -> Tensor:
        """What survived of the last block, whose bounds were loose: it waits no longer, as most of it is scored."""
        numbers, upper, _ = self.waiting.pop()
        self._held -= 8 * (self.scan.n_q + 1) * len(numbers)
        return self._chosen(numbers, upper)

    def _chosen(self, numbers: Tensor, upper: Tensor) -> Tensor:
        """Those of documents with these upper bounds that are to be scored."""
        return numbers[(upper >= self._least()).any(0).cpu()]

    def _score_waiting(self) -> None:
        """Scores what waits, after the bounds of the float query for what has only those of an 8-bit one."""
        found, rough, tokens = [], [], []
        for numbers, upper, x in self.waiting:
            # the floor has risen since most of them were found
            alive = (upper >= self._least()).any(0).nonzero().flatten()
            at = alive.cpu()
            found.append((numbers[at], upper[:, alive]))
            if x is not None and len(at):
                rough.append((*found.pop(), x.lengths[at], x.margin[:, alive], x.unknown[alive]))
                tokens += corpora.Flat(x.tokens, F.pad(x.lengths.cumsum(0), (1, 0))).views(at)
        self.waiting, self._held = [], 0
        if rough:
            numbers, lengths, unknown = (torch.cat([x[i] for x in rough]) for i in (0, 2, 4))
            known, margin = (torch.cat([x[i] for x in rough], 1) for i in (1, 3))
            offsets = F.pad(lengths.cumsum(0), (1, 0))
            lower, upper = self._bounds(concatenated(tokens), offsets, margin, unknown, coarse=False)
            if lower.shape[1] >= self.scan.k:
                self.level = torch.maximum(self.level, lower.topk(self.scan.k, dim=1).values[:, -1:])
            found.append((numbers, torch.minimum(upper, known)))
        if found:
            numbers, upper = torch.cat([x for x, _ in found]), torch.cat([x for _, x in found], 1)
            numbers = self._chosen(numbers, upper).sort().values
            self._score(numbers, seen=len(numbers))

    def _score(self, numbers: Tensor, *, seen: int) -> None:
        """Scores documents of rising number from their tokens. The floor has counted the first ``seen``."""
        searched = self.searched
        base, documents = (
            (searched.whole, searched.documents[numbers])
            if isinstance(searched, corpora.Subset)
            else (searched, numbers)
        )
        part = corpora.Subset(base, documents)
        self.rescored += len(numbers)
        self.bytes += int(part.offsets[-1]) * part.token_bytes
        for (a, b), scores in self.scan.chunks(part, self.scan.runs(part)):
            self.scan.keep(scores, numbers[a:b])
            if b > seen:
                known = scores[:, max(0, seen - a) :].double()
                self.floor = self._raised(torch.where(known.isnan(), -math.inf, known))
