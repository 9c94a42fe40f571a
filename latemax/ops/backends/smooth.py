"""Smooth maxima: an online softmax, and a backward that recomputes it. By Triton's kernels, or on any device by blocks
of torch matmul.

The smooth maximum of similarities s_j is ``L = m + tau · log Σ_j exp((s_j - m) / tau)`` with m their maximum. Its
gradient in s_j is ``exp((s_j - L) / tau)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latemax.ops.backends.blocks import ROWS, blocks_of, padded, some, spans_of
from latemax.ops.backends.gather import clamped_norms, through_norm
from latemax.ops.problem import Batch, Gradients, Needs, Side

# similarities of one block: 2 MiB in float32, which stay in L2 with the rows that they come from
BLOCK = 1 << 19


class Piece(NamedTuple):
    """Dense queries and dense documents that all meet."""

    q: Side  # [n, l_q, dim]
    d: Side  # [m, l_d, dim]
    rows: slice  # of the scores
    slots: slice | list[int]  # their columns


class Rows(NamedTuple):
    """Query tokens of a piece, as one list of valid or zero rows."""

    first: int  # the first query
    end: int
    tokens: Tensor  # [r, dim] in the dtype of the scores
    norms: Tensor | None  # [r, 1]
    units: Tensor  # [r, dim]
    drop: Tensor | None  # bool [r], of masked tokens


def forward(b: Batch, tau: float, scores: Tensor, kernels: bool = False) -> None:
    """kernels: run Triton's, not blocks of torch matmul."""
    with torch.autocast(scores.device.type, enabled=False), torch.no_grad():
        for piece in _pieces(b, _dense_queries(b), kernels):
            if kernels:
                part = _call(piece, b, tau).scores()
                _fill_empty(piece, part, b.empty_score)
                scores[piece.rows, piece.slots] = part
                continue
            part = scores.new_empty(piece.q.items, piece.d.items)
            for rows in _rows(piece, b.normalize, scores.dtype):
                for first, end in _documents(piece.d, rows):
                    smooth = _smooth(some(piece.d, slice(first, end)), rows, tau, b.normalize)
                    if rows.drop is not None:
                        smooth = smooth.masked_fill(rows.drop, 0.0)
                    of_queries = smooth.view(end - first, rows.end - rows.first, -1).sum(-1)
                    part[rows.first : rows.end, first:end] = of_queries.T
            _fill_empty(piece, part, b.empty_score)
            scores[piece.rows, piece.slots] = part


def backward(b: Batch, tau: float, g: Tensor, needs: Needs, kernels: bool = False) -> Gradients:
    wide, q = b.score_dtype, _dense_queries(b)
    with torch.autocast(g.device.type, enabled=False), torch.no_grad():
        sum_q = torch.zeros(q.tokens.shape, dtype=wide, device=g.device) if needs.q else None
        grad_d = torch.zeros_like(b.d.tokens, memory_format=torch.contiguous_format) if needs.d else None
        for piece in _pieces(b, q, kernels):
            weights = g[piece.rows, piece.slots].to(wide)
            if kernels:
                call = _call(piece, b, tau)
                smooth = call.smooth()
                if sum_q is not None:
                    sum_q += call.grad_q(smooth, weights)
                if grad_d is not None:
                    sum_d = call.grad_d(smooth, weights)
                    if b.normalize:
                        tokens = piece.d.tokens.to(wide)
                        sum_d = through_norm(tokens, clamped_norms(tokens), sum_d)
                    _store_documents(b, piece, sum_d, grad_d)
                continue
            sum_d = torch.zeros(piece.d.tokens.shape, dtype=wide, device=g.device) if needs.d else None
            for rows in _rows(piece, b.normalize, wide):
                into = None if sum_q is None else sum_q[piece.rows][rows.first : rows.end].view(rows.tokens.shape)
                for first, end in _documents(piece.d, rows):
                    weight = weights[rows.first : rows.end, first:end].T.repeat_interleave(q.length, 1)
                    documents = some(piece.d, slice(first, end))
                    _add(documents, rows, weight, tau, b.normalize, into, None if sum_d is None else sum_d[first:end])
            if grad_d is not None and sum_d is not None:
                _store_documents(b, piece, sum_d, grad_d)
        if sum_q is not None and b.normalize:
            tokens = q.tokens.to(wide)
            sum_q = through_norm(tokens, clamped_norms(tokens), sum_q)
        return Gradients(None if sum_q is None else _store_queries(b, sum_q), grad_d)


def _dense_queries(b: Batch) -> Side:
    return b.q if b.q.offsets is None else padded(b.q, spans_of(b.q.offsets))


def _call(piece: Piece, b: Batch, tau: float) -> Any:
    # imports triton: not before it is needed
    from latemax.ops.backends.smooth_triton import Call

    return Call(piece.q, piece.d, tau, b.normalize, b.dtype)


def _pieces(b: Batch, q: Side, kernels: bool) -> Iterator[Piece]:
    """Own candidates are one piece to the kernels, and a piece for each query to blocks."""
    if not q.items or not b.n_d:
        return
    everything = slice(None)
    if b.d.offsets is not None:
        of = spans_of(b.d.offsets)
        for numbers in blocks_of(list(range(len(of))), of):
            yield Piece(q, padded(b.d, [of[n] for n in numbers]), everything, numbers)
    elif b.own and not kernels:
        for a in range(q.items):
            mask = None if b.d.mask is None else b.d.mask[a]
            yield Piece(some(q, slice(a, a + 1)), Side(b.d.tokens[a], mask), slice(a, a + 1), everything)
    else:
        yield Piece(q, b.d, everything, everything)


def _rows(piece: Piece, normalize: bool, dtype: torch.dtype) -> Iterator[Rows]:
    q, fit = piece.q, BLOCK // max(1, piece.d.length)
    # somewhat fewer rows, if a document then fits in a block: similarities are computed once in backward
    per_block = max(1, (fit if ROWS // 2 <= fit < ROWS else ROWS) // q.length)
    for first in range(0, q.items, per_block):
        end = min(q.items, first + per_block)
        tokens = q.tokens[first:end].to(dtype).reshape(-1, q.tokens.shape[-1])
        drop = None if q.mask is None else ~q.mask[first:end].reshape(-1)
        if drop is not None:
            tokens = tokens.masked_fill(drop.unsqueeze(1), 0.0)
        norms = clamped_norms(tokens) if normalize else None
        yield Rows(first, end, tokens, norms, tokens if norms is None else tokens / norms, drop)


def _documents(d: Side, rows: Rows) -> Iterator[tuple[int, int]]:
    """Runs of documents whose similarities fit in a block; one that does not is cut by ``_token_blocks``."""
    step = max(1, BLOCK // (len(rows.tokens) * max(1, d.length)))
    return ((first, min(d.items, first + step)) for first in range(0, d.items, step))


def _token_blocks(d: Side, rows: Rows) -> Iterator[Side]:
    step = max(1, BLOCK // (len(rows.tokens) * d.items))
    for first in range(0, d.length, step):
        at = slice(first, first + step)
        yield Side(d.tokens[:, at], None if d.mask is None else d.mask[:, at])


def _similarities(d: Side, rows: Rows, normalize: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """[m, l, r], -inf where a document token is masked; the document tokens widened, and their norms."""
    tokens = d.tokens.to(rows.units.dtype)
    norms = clamped_norms(tokens) if normalize else None
    sims = torch.mm(tokens.reshape(-1, tokens.shape[-1]), rows.units.T).view(*tokens.shape[:2], -1)
    if norms is not None:
        sims.div_(norms)
    if d.mask is not None:
        sims.masked_fill_(~d.mask.unsqueeze(-1), -math.inf)
    return sims, tokens, norms


def _smooth(d: Side, rows: Rows, tau: float, normalize: bool) -> Tensor:
    """Smooth maxima [m, r]; -inf where every similarity is, also where there is none."""
    best = rows.units.new_full((d.items, len(rows.units)), -math.inf)
    total = torch.zeros_like(best)
    for block in _token_blocks(d, rows):
        sims, _, _ = _similarities(block, rows, normalize)
        new = torch.maximum(best, sims.amax(1))
        # inf - inf would be NaN
        base = new.masked_fill(new.isinf(), 0.0)
        total = total * ((best - base) / tau).exp_() + sims.sub_(base.unsqueeze(1)).div_(tau).exp_().sum(1)
        best = new
    return best + tau * total.log_()


def _add(
    d: Side, rows: Rows, weight: Tensor, tau: float, normalize: bool, sum_q: Tensor | None, sum_d: Tensor | None
) -> None:  # fmt: skip
    """Adds the gradients of some documents. weight [m, r]: that of each smooth maximum.

    Similarities are computed once where the tokens are one block, else again after the smooth maxima.
    """
    blocks = [*_token_blocks(d, rows)]
    smooth = _smooth(d, rows, tau, normalize) if len(blocks) > 1 else None
    start = 0
    for block in blocks:
        sims, tokens, norms = _similarities(block, rows, normalize)
        base = sims.amax(1) if smooth is None else smooth
        share = sims.sub_(base.masked_fill(base == -math.inf, 0.0).unsqueeze(1)).div_(tau).exp_()
        if smooth is None:
            total = share.sum(1)
            share.mul_((weight / total.masked_fill_(total == 0, 1.0)).unsqueeze(1))
        else:
            share.mul_(weight.unsqueeze(1))
        if block.mask is not None:
            share.masked_fill_(~block.mask.unsqueeze(-1), 0.0)
        if rows.drop is not None:
            share.masked_fill_(rows.drop, 0.0)
        flat, length = share.view(-1, share.shape[-1]), block.length
        # a token with NaN or infinity has only similarities of NaN and ±inf, so its shares are 0 or NaN already
        if sum_q is not None:
            units = tokens if norms is None else tokens / norms
            sum_q.addmm_(flat.T, units.nan_to_num(0.0, 0.0, 0.0).reshape(len(flat), -1))
        if sum_d is not None:
            given = torch.mm(flat, rows.units.nan_to_num(0.0, 0.0, 0.0)).view_as(tokens)
            sum_d[:, start : start + length] += given if norms is None else through_norm(tokens, norms, given)
        start += length


def _fill_empty(piece: Piece, part: Tensor, empty_score: float) -> None:
    """Documents without a valid token, and queries that have none."""
    q, d = piece.q, piece.d
    if not d.length:
        part.fill_(empty_score)
    elif d.mask is not None:
        part.masked_fill_(~d.mask.any(-1), empty_score)
    if q.mask is not None:
        part.masked_fill_(~q.mask.any(-1, keepdim=True), 0.0)


def _store_documents(b: Batch, piece: Piece, sum_d: Tensor, grad_d: Tensor) -> None:
    if b.d.offsets is None:
        (grad_d[piece.rows] if b.own else grad_d).copy_(sum_d)
        return
    of = spans_of(b.d.offsets)
    assert isinstance(piece.slots, list)
    for number, rows in zip(piece.slots, sum_d, strict=True):
        first, end = of[number]
        grad_d[first:end] = rows[: end - first]


def _store_queries(b: Batch, sum_q: Tensor) -> Tensor:
    if b.q.offsets is None:
        return sum_q.to(b.q.tokens.dtype)
    grad = torch.zeros_like(b.q.tokens, memory_format=torch.contiguous_format)
    for (first, end), rows in zip(spans_of(b.q.offsets), sum_q, strict=True):
        grad[first:end] = rows[: end - first]
    return grad
