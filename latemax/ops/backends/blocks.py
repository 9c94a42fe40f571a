"""Late interaction by blocks of torch matmul and maximum: the CPU without the native kernel, and float64.

Each block of similarities is small enough to stay in L2. Everything is computed in float32 or float64 whatever the
input's dtype (a half-precision block is widened when it is read), so that a similarity is never rounded to half
precision. Document tokens are the rows of every product: the maximum over them is then elementwise over contiguous
query tokens. With few query tokens the product itself is faster the other way round. Measured on 2 Zen 4 cores at
(n_d 1000, l_d 512, dim 128): 47 ms against 50 at l_q 32, 46 against 29 at l_q 8.

Ragged documents of about one length are padded together, a block at a time, and the block runs as a dense problem.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from latemax.ops.backends import decode, gather
from latemax.ops.backends.base import Status, WrongDevice
from latemax.ops.backends.gather import clamped_norms, groups, l2_bytes
from latemax.ops.problem import Batch, Gradients, Needs, Outputs, Plan, Problem, Side

name = "blocks"
# query tokens that share one block: enough for the product to run at full rate
ROWS = 512
# with fewer query tokens than this, they are the rows of one product a document
FEW_ROWS = 32
# document tokens of one block at least, as long as its similarities stay under BLOCK_BYTES: shorter products run at
# half the rate (l_q 1024: 70 ms with 256 tokens, 43 with 2048)
TOKENS = 2048
BLOCK_BYTES = 16 << 20
# padded tokens of a block of ragged documents at most: enough for torch's matmul to run at full rate
RAGGED_TOKENS = 1 << 14
# sums of so many products of 8-bit codes are exact in float32: 127 · 127 · 1040 < 2^24
EXACT_DIMS = 1040
# the maximum so far [m, rows], and the index it came from or None
Running = tuple[Tensor, Tensor | None]


def status() -> Status:
    return Status(True, "blocked torch matmul")


def why_not(p: Problem, by_name: bool = False) -> str:
    return "" if p.device.type == "cpu" else WrongDevice(f"needs tensors on the CPU; got {p.device}")


def plan(p: Problem, by_name: bool = False) -> Plan:
    why = "asked for by name" if by_name else "the tensors are on the CPU"
    how = "bounds in blocks of torch float64" if p.bounds else "blocked torch matmul and maximum"
    return Plan(name, f"{why}: {how}")


def forward(b: Batch, plan: Plan, out: Outputs) -> None:
    if out.scores.numel():
        _ragged(b, out) if b.ragged else _dense(b, out)


def backward(b: Batch, plan: Plan, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
    return gather.backward(b, argmax, g, needs)


def _dense(b: Batch, out: Outputs) -> None:
    d, q_mask, d_mask = b.d.tokens, b.q.mask, b.d.mask
    (scores, argmax), codes = out, b.d.codes
    with torch.autocast(d.device.type, enabled=False), torch.no_grad():
        q, weights = _queries(b, scores.dtype)
        if q_mask is not None:
            q = q.masked_fill(~q_mask.unsqueeze(-1), 0.0)
        scale = None if codes is None else codes.scale
        if d.shape[-2]:
            for group in groups(d.dim() == 4, len(q), (d, scale, d_mask), (q, q_mask, weights, scores, argmax)):
                _forward_group(group, b)
        if b.mean:
            scores /= b.q.valid().clamp_(min=1).unsqueeze(1)
        _fill_empty(q_mask, d_mask, d.shape[-2], scores, argmax, b.empty_score)


def _queries(b: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(rows to multiply by, factors of the maxima or None). Codes stay integers, and their scale is a factor."""
    tokens, codes, weights = b.q.tokens, b.q.codes, b.q.weights
    if codes is None:
        q = tokens.to(dtype)
        return q / clamped_norms(q) if b.normalize else q, weights
    q = decode.integers(tokens, codes.kind, codes.dim, torch.float64 if codes.dim > EXACT_DIMS else dtype)
    factors = decode.unit_factors(q, codes.scale) if b.normalize else codes.scale.to(q.dtype)
    # a token of scale 0 is the zero vector, of which all similarities tie
    return q * (codes.scale != 0).unsqueeze(-1), factors if weights is None else weights * factors


def _fill_empty(
    q_mask: Tensor | None, d_mask: Tensor | None, l_d: int, scores: Tensor, argmax: Tensor | None, empty_score: float
) -> None:
    """Pairs whose document has no valid token, and queries that have none."""
    if l_d == 0:
        scores.fill_(empty_score)
        if argmax is not None:
            argmax.fill_(-1)
    elif d_mask is not None:
        empty = ~d_mask.any(-1)  # [n_d] or [n_q, n_d]
        scores.masked_fill_(empty, empty_score)
        if argmax is not None:
            argmax.masked_fill_(empty.unsqueeze(-1), -1)
    if q_mask is not None:
        scores.masked_fill_(~q_mask.any(-1, keepdim=True), 0.0)


def _forward_group(group: tuple, b: Batch) -> None:
    """q [n_q, l_q, dim] in the dtype of products, d [n_d, l_d, dim]; scores [n_q, n_d], argmax [n_q, n_d, l_q]."""
    d, scale, d_mask, q, q_mask, weights, scores, argmax = group
    (n_q, l_q, dim), (n_d, l_d) = q.shape, d.shape[:2]
    per_block = min(n_q, max(1, ROWS // l_q))
    rows = per_block * l_q
    widened = 0 if d.dtype == q.dtype else dim
    token_bytes = (rows + widened) * q.element_size()
    least = min(TOKENS, max(64, BLOCK_BYTES // token_bytes))
    tokens = max(least, l2_bytes() * torch.get_num_threads() // token_bytes)
    docs = min(n_d, max(1, tokens // l_d))
    tokens = min(tokens, l_d) if docs == 1 else l_d
    buffer = q.new_empty(docs * tokens * rows)
    ends = _ends(d_mask, l_d)
    columns = [q[first : first + per_block].reshape(-1, dim).T.contiguous() for first in range(0, n_q, per_block)]
    documents_as_rows = rows >= FEW_ROWS
    for n in range(0, n_d, docs):
        m = min(docs, n_d - n)
        end = l_d if ends is None else max(ends[n : n + m])
        parts: list[Running | None] = [None] * len(columns)
        for start in range(0, end, tokens):
            size = min(tokens, end - start)
            at = slice(n, n + m), slice(start, start + size)
            block, factors = _documents(b, d[at], None if scale is None else scale[at], q.dtype)
            masked = None if d_mask is None else ~d_mask[at].unsqueeze(-1)
            if documents_as_rows:
                block = block.reshape(-1, dim)
            for part, qt in enumerate(columns):
                out = buffer[: m * size * qt.shape[1]]
                if documents_as_rows:
                    sims = torch.mm(block, qt, out=out.view(m * size, -1)).view(m, size, -1)
                else:
                    sims = torch.bmm(qt.T.expand(m, -1, -1), block.mT, out=out.view(m, -1, size)).mT
                if factors is not None:
                    sims.mul_(factors) if scale is not None else sims.div_(factors)
                if masked is not None:
                    sims.masked_fill_(masked, -math.inf)
                parts[part] = _running(parts[part], sims, start, argmax is not None)
        for part, running in enumerate(parts):
            if running is None:
                continue
            best, position = running
            first = part * per_block
            last = first + best.shape[1] // l_q
            best = best.view(m, -1, l_q).transpose(0, 1)  # [queries, m, l_q]
            if position is not None:
                position = position.view(m, -1, l_q).transpose(0, 1)
                if d_mask is not None:
                    # where every valid similarity is -inf a masked token ties with it: the first valid one wins
                    lead = d_mask[n : n + m].to(torch.uint8).argmax(-1).view(1, m, 1)
                    position = torch.where(best == -math.inf, lead, position)
                argmax[first:last, n : n + m] = position
            if weights is not None:
                best = best * weights[first:last].unsqueeze(1)
            if q_mask is not None:
                keep = q_mask[first:last].unsqueeze(1)
                best = best.masked_fill(~keep, 0.0)
                if argmax is not None:
                    argmax[first:last, n : n + m].masked_fill_(~keep, -1)
            total = scores[first:last, n : n + m]
            if best.dtype == total.dtype:
                torch.sum(best, -1, out=total)
            else:
                total.copy_(best.sum(-1))


def _documents(b: Batch, tokens: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(a block [m, size, dim] to multiply by, what divides its similarities or None; where tokens are codes, what
    multiplies them)."""
    codes = b.d.codes
    if codes is None or scale is None:
        block = tokens.to(dtype)
        return block, clamped_norms(block) if b.normalize else None
    block = decode.integers(tokens, codes.kind, codes.dim, dtype)
    if b.normalize:
        return block, decode.unit_factors(block, scale).unsqueeze(-1)
    if b.q.codes is not None:
        return block, scale.unsqueeze(-1).to(dtype)
    # scaled before the product, which then overflows only where a similarity does
    return block.mul_(scale.unsqueeze(-1)), None


def _ends(d_mask: Tensor | None, l_d: int) -> list[int] | None:
    """The end of every document: the index after its last valid token. Tokens after it cost nothing."""
    if d_mask is None:
        return None
    return (d_mask * torch.arange(1, l_d + 1, device=d_mask.device)).amax(-1).tolist()


def _running(state: Running | None, sims: Tensor, start: int, want_position: bool) -> Running:
    """Running maximum over token blocks, first index on ties: sims [m, size, rows] → [m, rows] twice (or None)."""
    if not want_position:
        best = sims.amax(1)
        return (best if state is None else torch.maximum(state[0], best)), None
    best, position = sims.max(1)
    position += start
    if state is None:
        return best, position
    old, old_position = state
    assert old_position is not None
    new = (best > old) | (best.isnan() & ~old.isnan())
    return torch.where(new, best, old), torch.where(new, position, old_position)


def spans_of(offsets: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(offsets.tolist()))


def padded(s: Side, spans: list[tuple[int, int]]) -> Side:
    """Ragged items as [n, longest, ...] with a mask, at least one token long."""

    def pad(x: Tensor) -> Tensor:
        least = x.new_zeros(1, *x.shape[1:])
        return pad_sequence([x[first:last] for first, last in spans] + [least], batch_first=True)[:-1]

    keep = torch.ones(len(s.tokens), dtype=torch.bool, device=s.tokens.device) if s.mask is None else s.mask
    codes = None if s.codes is None else s.codes.each(pad)
    return Side(pad(s.tokens), pad(keep), weights=None if s.weights is None else pad(s.weights), codes=codes)


def some(s: Side, at: slice) -> Side:
    """Some of dense items."""
    mask, weights = (None if x is None else x[at] for x in (s.mask, s.weights))
    return Side(s.tokens[at], mask, weights=weights, codes=None if s.codes is None else s.codes.each(lambda x: x[at]))


def blocks_of(numbers: list[int], spans: list[tuple[int, int]]) -> Iterator[list[int]]:
    """Slots of ``numbers``, those of similar length together, RAGGED_TOKENS padded tokens at a time."""

    def length(slot: int) -> int:
        first, last = spans[numbers[slot]]
        return last - first

    block: list[int] = []
    for slot in sorted(range(len(numbers)), key=length):
        if block and length(slot) * (len(block) + 1) > RAGGED_TOKENS:
            yield block
            block = []
        block.append(slot)
    if block:
        yield block


def dense_parts(b: Batch) -> Iterator[tuple[slice, Any, Batch]]:
    """(rows of scores, columns of scores, a dense batch for them); ragged queries are padded to the longest."""
    q = b.q if b.q.offsets is None else padded(b.q, spans_of(b.q.offsets))
    if b.d.offsets is None:
        yield slice(None), slice(None), b._replace(q=q)
        return
    spans = [*spans_of(b.d.offsets), (0, 0)]  # candidate -1 is the empty document at the end
    rows = [(slice(None), list(range(b.n_d)))]
    if b.candidates is not None:
        rows = [(slice(a, a + 1), numbers) for a, numbers in enumerate(b.candidates.tolist())]
    for at, numbers in rows:
        query = some(q, at)
        for block in blocks_of(numbers, spans):
            docs = padded(b.d, [spans[numbers[slot]] for slot in block])
            yield at, block, b._replace(q=query, d=docs, candidates=None)


def _ragged(b: Batch, out: Outputs) -> None:
    n_q, n_d = out.scores.shape
    query_spans = [] if b.q.offsets is None else spans_of(b.q.offsets)
    l_q = max((last - first for first, last in query_spans), default=1) if b.q.offsets is not None else b.q.length
    argmax = None if out.argmax is None else out.argmax.new_full((n_q, n_d, max(1, l_q)), -1)
    for at, slots, part in dense_parts(b):
        scores = out.scores.new_empty(part.q.items, part.n_d)
        best = None if argmax is None else argmax.new_empty((*scores.shape, part.q.length))
        _dense(part, Outputs(scores, best))
        out.scores[at, slots] = scores
        if argmax is not None and best is not None:
            argmax[at, slots] = best
    if out.argmax is None or argmax is None:
        return
    if b.q.offsets is None:
        out.argmax.copy_(argmax)
        return
    out.argmax.fill_(-1)
    for a, (first, last) in enumerate(query_spans):
        out.argmax[:, first:last] = argmax[a, :, : last - first]
