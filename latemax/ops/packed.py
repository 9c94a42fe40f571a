"""Tokens that lie end to end, in plain torch: what serves the CPU where the native kernel was not built or the dtype is
float64, what backend="reference" runs, and the gradient of corpus tokens that several queries' candidates name.

Documents of about one length are padded together, a block at a time; the block goes through ``cpu_backend``.
"""

from __future__ import annotations

import itertools

import torch
from torch.nn.utils.rnn import pad_sequence

from latemax import reference
from latemax._check import Packing, score_dtype, sizes
from latemax.ops import cpu_backend

# document tokens padded together at most: long enough for torch's matmul to run at full rate
BLOCK_TOKENS = 1 << 14
# float32 rows picked at once for a gradient
BLOCK_BYTES = 64 << 20


def _spans(cu: torch.Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu.tolist()))


def _padded(x: torch.Tensor, mask: torch.Tensor | None, spans) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x and their mask, [n, longest, dim] and [n, longest], at least one token long."""
    least = x.new_zeros(1, x.shape[1])
    keep = torch.ones(len(x), dtype=torch.bool, device=x.device) if mask is None else mask
    tokens = pad_sequence([x[a:b] for a, b in spans] + [least], batch_first=True)[:-1]
    return tokens, pad_sequence([keep[a:b] for a, b in spans] + [keep.new_zeros(1)], batch_first=True)[:-1]


def _blocks(numbers: list[int], spans):
    """Slots of ``numbers``, those of like length together, BLOCK_TOKENS padded tokens at a time."""
    order = sorted(range(len(numbers)), key=lambda slot: spans[numbers[slot]][1] - spans[numbers[slot]][0])
    block = []
    for slot in order:
        length = spans[numbers[slot]][1] - spans[numbers[slot]][0]
        if block and length * (len(block) + 1) > BLOCK_TOKENS:
            yield block
            block = []
        block.append(slot)
    if block:
        yield block


def forward_packed(q, d, q_mask, d_mask, cu_q, cu_d, candidates, scores, argmax, *, normalize, empty_score) -> None:
    """Fills scores [n_q, n_d] and, where it has elements, argmax: int32 [n_q, n_d, l_q], or with cu_q [n_d, t_q]."""
    n_q, n_c = scores.shape
    if not scores.numel():
        return
    if cu_q is not None:
        query_spans = _spans(cu_q)
        q, q_mask = _padded(q, q_mask, query_spans)
    winners = argmax
    if argmax.numel():
        winners = argmax.new_full((n_q, n_c, q.shape[1]), -1)
    flags = dict(normalize=normalize, empty_score=empty_score)
    if cu_d is None:
        cpu_backend.forward(q, d, q_mask, d_mask, scores, winners, **flags)
    else:
        spans = [*_spans(cu_d), (0, 0)]  # candidate -1 is the empty one at the end
        rows = [(slice(None), list(range(n_c)))]
        if candidates is not None:
            rows = [(slice(a, a + 1), numbers) for a, numbers in enumerate(candidates.tolist())]
        for at, numbers in rows:
            for block in _blocks(numbers, spans):
                docs, keep = _padded(d, d_mask, [spans[numbers[slot]] for slot in block])
                part = scores.new_empty(len(q[at]), len(block))
                won = argmax.new_empty((*part.shape, q.shape[1]) if argmax.numel() else (0,))
                masks = (None if q_mask is None else q_mask[at], keep)
                cpu_backend.forward(q[at], docs, *masks, part, won, **flags)
                scores[at, block] = part
                if argmax.numel():
                    winners[at, block] = won
    if not argmax.numel():
        return
    if cu_q is None:
        argmax.copy_(winners)
        return
    argmax.fill_(-1)
    for a, (first, past) in enumerate(query_spans):
        argmax[:, first:past] = winners[a, :, : past - first]


def reference_forward(q, d, q_mask, d_mask, packing: Packing, *, normalize, empty_score):
    """(scores, argmax) of the oracle, as ``forward_packed`` fills them: every pair alone."""
    own, n_q, n_c, l_q, _, _ = sizes(q, d, packing)
    cu_q, cu_d, candidates = packing
    scores = q.new_empty(n_q, n_c, dtype=score_dtype(q.dtype, d.dtype))
    argmax = q.new_full((n_q, n_c, l_q) if cu_q is None else (n_c, l_q), -1, dtype=torch.int32)
    if cu_d is not None:
        spans = [*_spans(cu_d), (0, 0)]
        documents = [d[a:b] for a, b in spans]
        keeps = [None if d_mask is None else d_mask[a:b] for a, b in spans]
    for a, (first, past) in enumerate([(0, l_q)] * n_q if cu_q is None else _spans(cu_q)):
        query, keep = (q[a], q_mask) if cu_q is None else (q[first:past], q_mask)
        if keep is not None:
            keep = keep[a] if cu_q is None else keep[first:past]
        for c in range(n_c):
            if cu_d is None:
                at = (a, c) if own else (c,)
                document, d_keep = d[at], None if d_mask is None else d_mask[at]
            else:
                number = c if candidates is None else int(candidates[a, c])
                document, d_keep = documents[number], keeps[number]
            scores[a, c], won = reference.maxsim(
                query, document, keep, d_keep, normalize=normalize, empty_score=empty_score, return_argmax=True
            )
            (argmax[a, c] if cu_q is None else argmax[c, first:past]).copy_(won)
    return scores, argmax


def backward_packed(g, q, d, argmax, cu_q, cu_d, candidates, *, normalize, needs_q, needs_d):
    """(grad_q, grad_d) in the dtypes and shapes of q and d, or None for a side that needs none. Any device."""
    own, n_q, n_c, l_q, l_d, dim = sizes(q, d, Packing(cu_q, cu_d, candidates))
    wide = score_dtype(q.dtype, d.dtype)
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        rows, docs = q.reshape(-1, dim).to(wide), d.reshape(-1, dim)
        if cu_q is None:
            owner = torch.arange(n_q, device=q.device).repeat_interleave(l_q)
            argmax = argmax.permute(1, 0, 2).reshape(n_c, n_q * l_q)
        else:
            # rows behind the last offset are the last query's here; nothing of theirs has a winner
            at = torch.arange(len(rows), device=q.device)
            owner = (torch.searchsorted(cu_q, at, right=True) - 1).clamp(max=n_q - 1)
        q_norms = cpu_backend.clamped_norms(rows) if normalize else None
        units = rows / q_norms if normalize else rows
        sum_q = torch.zeros_like(rows) if needs_q else None
        sum_d = torch.zeros(docs.shape, dtype=wide, device=d.device) if needs_d else None
        step = max(1, BLOCK_BYTES // max(1, 2 * rows.numel() * rows.element_size()))
        for first in range(0, n_c if len(rows) and len(docs) else 0, step):
            winner = argmax[first : first + step]  # [c, rows]
            won = winner >= 0
            c = torch.arange(first, first + len(winner), device=d.device)
            if candidates is not None:
                # a number that is no document has won nothing
                numbers = candidates[:, first : first + step].clamp(0, max(0, len(cu_d) - 2))
                base = cu_d[numbers.T[:, owner]]
            elif cu_d is not None:
                base = cu_d[c].unsqueeze(1)
            else:
                base = (owner * n_c + c.unsqueeze(1) if own else c.unsqueeze(1)) * l_d
            flat = torch.where(won, base + winner, 0).reshape(-1)
            weight = g[:, first : first + step].T[:, owner].to(wide).unsqueeze(-1)  # [c, rows, 1]
            lost = ~won.unsqueeze(-1)
            if needs_q:
                picked = docs.index_select(0, flat).to(wide)
                if normalize:
                    picked /= cpu_backend.clamped_norms(picked)
                sum_q += cpu_backend.weighted(picked.view(*won.shape, dim), weight, lost).sum(0)
            if needs_d:
                given = cpu_backend.weighted(units.expand(len(winner), -1, -1), weight, lost).reshape(-1, dim)
                if d.is_cuda:
                    # sorts by row first: repeatable, which index_add is not
                    sum_d.index_put_((flat,), given, accumulate=True)
                else:
                    sum_d.index_add_(0, flat, given)
        if normalize and needs_q:
            sum_q = cpu_backend.through_norm(rows, q_norms, sum_q)
        if normalize and needs_d:
            docs = docs.to(wide)
            sum_d = cpu_backend.through_norm(docs, cpu_backend.clamped_norms(docs), sum_d)
        return (
            sum_q.view(q.shape).to(q.dtype) if needs_q else None,
            sum_d.view(d.shape).to(d.dtype) if needs_d else None,
        )
