"""Late interaction by blocks of torch matmul and maximum, each block of similarities small enough to stay in L2.

Everything is taken in float32 or float64 whatever the input's dtype (a half-precision block is widened on its way in),
so that a similarity is never rounded to half precision. Document tokens are the rows of every product: the maximum over
them is then elementwise over contiguous query tokens. With few query tokens the product itself is faster the other way
round. Measured on 2 Zen 4 cores at (n_d 1000, l_d 512, dim 128): 47 ms against 50 at l_q 32, 46 against 29 at l_q 8.
"""

from __future__ import annotations

import functools
import math
import os

import torch

EPS = 1e-12
# query tokens that share one block: enough for the product to run at full rate
ROWS = 512
# fewer query tokens than this are the rows of a product for each document
FEW_ROWS = 32
# document tokens of one block at least, as far as its similarities stay under BLOCK_BYTES: shorter products run at half
# the rate (l_q 1024: 70 ms with 256 tokens, 43 with 2048)
TOKENS = 2048
BLOCK_BYTES = 16 << 20


@functools.cache
def l2_bytes() -> int:
    """L2 cache of one core; 1 MiB where the system does not say."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 1 << 20
    except (AttributeError, ValueError, OSError):
        return 1 << 20


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def clamped_norms(x: torch.Tensor) -> torch.Tensor:
    """max(‖row‖, eps), [..., 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(EPS)


def _groups(own: bool, n_q: int, shared: tuple, per_query: tuple):
    """Queries and the documents they meet: one group of all, or one a query with its own candidates.

    ``shared`` tensors lose their n_q axis in a group of one query, ``per_query`` tensors keep it.
    """
    if not own:
        yield (*shared, *per_query)
    else:
        for i in range(n_q):
            yield (
                *(None if x is None else x[i] for x in shared),
                *(None if x is None else x[i : i + 1] for x in per_query),
            )


def forward(q, d, q_mask, d_mask, scores, argmax, *, normalize, empty_score) -> None:
    """Fills scores [n_q, n_d] and, where it has elements, argmax int32 [n_q, n_d, l_q]."""
    if not scores.numel():
        return
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        q = q.to(scores.dtype)
        if q_mask is not None:
            q = q.masked_fill(~q_mask.unsqueeze(-1), 0.0)
        if normalize:
            q = q / clamped_norms(q)
        winners = argmax if argmax.numel() else None
        if d.shape[-2]:
            for group in _groups(d.dim() == 4, len(q), (d, d_mask), (q, q_mask, scores, winners)):
                _forward_group(*group, normalize)
        _empty(q_mask, d_mask, d.shape[-2], scores, winners, empty_score)


def _empty(q_mask, d_mask, l_d, scores, winners, empty_score) -> None:
    """Pairs whose document has no valid token, and queries that have none."""
    if l_d == 0:
        scores.fill_(empty_score)
        if winners is not None:
            winners.fill_(-1)
    elif d_mask is not None:
        empty = ~d_mask.any(-1)  # [n_d] or [n_q, n_d]
        scores.masked_fill_(empty, empty_score)
        if winners is not None:
            winners.masked_fill_(empty.unsqueeze(-1), -1)
    if q_mask is not None:
        scores.masked_fill_(~q_mask.any(-1, keepdim=True), 0.0)


def _forward_group(d, d_mask, q, q_mask, scores, winners, normalize) -> None:
    """q [n_q, l_q, dim] wide against d [n_d, l_d, dim]; scores [n_q, n_d], winners [n_q, n_d, l_q] or None."""
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
        best = position = None
        parts = [None] * len(columns)
        for start in range(0, end, tokens):
            size = min(tokens, end - start)
            block = d[n : n + m, start : start + size].to(q.dtype)
            norms = clamped_norms(block) if normalize else None
            masked = None if d_mask is None else ~d_mask[n : n + m, start : start + size].unsqueeze(-1)
            if documents_as_rows:
                block = block.reshape(-1, dim)
            for part, qt in enumerate(columns):
                out = buffer[: m * size * qt.shape[1]]
                if documents_as_rows:
                    sims = torch.mm(block, qt, out=out.view(m * size, -1)).view(m, size, -1)
                else:
                    sims = torch.bmm(qt.T.expand(m, -1, -1), block.mT, out=out.view(m, -1, size)).mT
                if norms is not None:
                    sims.div_(norms)
                if masked is not None:
                    sims.masked_fill_(masked, -math.inf)
                parts[part] = _running(parts[part], sims, start, winners is not None)
        for part in range(len(columns) if end else 0):
            best, position = parts[part]
            first = part * per_block
            past = first + best.shape[1] // l_q
            best = best.view(m, -1, l_q).transpose(0, 1)  # [queries, m, l_q]
            if winners is not None:
                position = position.view(m, -1, l_q).transpose(0, 1)
                if d_mask is not None:
                    # where every valid similarity is -inf a masked token ties with it: the first valid one wins
                    lead = d_mask[n : n + m].to(torch.uint8).argmax(-1).view(1, m, 1)
                    position = torch.where(best == -math.inf, lead, position)
                winners[first:past, n : n + m] = position
            if q_mask is not None:
                keep = q_mask[first:past].unsqueeze(1)
                best = best.masked_fill(~keep, 0.0)
                if winners is not None:
                    winners[first:past, n : n + m].masked_fill_(~keep, -1)
            torch.sum(best, -1, out=scores[first:past, n : n + m])


def _ends(d_mask, l_d) -> list[int] | None:
    """One past the last valid token of every document: what lies behind costs nothing."""
    if d_mask is None:
        return None
    return (d_mask * torch.arange(1, l_d + 1, device=d_mask.device)).amax(-1).tolist()


def _running(state, sims, start, want_position):
    """Running maximum over token blocks, first index on ties: sims [m, size, rows] -> [m, rows] twice (or None)."""
    if not want_position:
        best = sims.amax(1)
        return (best if state is None else torch.maximum(state[0], best)), None
    best, position = sims.max(1)
    position += start
    if state is None:
        return best, position
    old, old_position = state
    new = (best > old) | (best.isnan() & ~old.isnan())
    return torch.where(new, best, old), torch.where(new, position, old_position)


def backward(g, q, d, argmax, *, normalize, needs_q, needs_d):
    """(grad_q, grad_d) in the dtypes of q and d, or None for a side that needs none."""
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format) if needs_q else None
    grad_d = torch.zeros_like(d, memory_format=torch.contiguous_format) if needs_d else None
    if g.numel() and d.shape[-2]:
        with torch.autocast(q.device.type, enabled=False), torch.no_grad():
            for group in _groups(d.dim() == 4, len(q), (d, grad_d), (q, grad_q, g, argmax)):
                _backward_group(*group, normalize)
    return grad_q, grad_d


def _backward_group(d, grad_d, q, grad_q, g, argmax, normalize) -> None:
    """Gathers winners for grad_q, sums into owned document blocks for grad_d; fills both in place."""
    (n_q, l_q, dim), (n_d, l_d) = q.shape, d.shape[:2]
    wide = _wide(torch.promote_types(q.dtype, d.dtype))
    rows = q.reshape(-1, dim).to(wide).contiguous()
    q_norms = clamped_norms(rows) if normalize else None
    units = rows / q_norms if normalize else rows
    sum_q = torch.zeros_like(rows)
    # picked rows stay in L2; sums over whole documents, where d has a gradient, stay within a block
    docs = max(1, l2_bytes() * torch.get_num_threads() // (rows.numel() * rows.element_size()))
    docs = min(docs, max(1, BLOCK_BYTES // 4 // (l_d * dim * rows.element_size())))
    for n in range(0, n_d, docs):
        m = min(docs, n_d - n)
        winner = argmax[:, n : n + m].transpose(0, 1).reshape(m, -1)  # [m, n_q * l_q]
        won = winner >= 0
        flat = (winner.clamp(min=0) + l_d * torch.arange(m, device=d.device).unsqueeze(1)).reshape(-1)
        weight = g[:, n : n + m].T.to(wide).unsqueeze(-1).expand(m, n_q, l_q).reshape(m, -1, 1)
        # on a GPU (backend="reference") asking would wait for the device
        lost = None if d.device.type == "cpu" and bool(won.all()) else ~won.unsqueeze(-1)
        if grad_q is not None:
            picked = d[n : n + m].reshape(-1, dim).index_select(0, flat).to(wide)
            if normalize:
                picked /= clamped_norms(picked)
            sum_q += weighted(picked.view(m, -1, dim), weight, lost).sum(0)
        if grad_d is not None:
            given = weighted(units.expand(m, -1, -1), weight, lost).reshape(-1, dim)
            total = given.new_zeros(m * l_d, dim).index_add_(0, flat, given)
            if normalize:
                block = d[n : n + m].reshape(-1, dim).to(wide)
                total = through_norm(block, clamped_norms(block), total)
            grad_d[n : n + m] = total.view(m, l_d, dim)
    if grad_q is not None:
        if normalize:
            sum_q = through_norm(rows, q_norms, sum_q)
        grad_q.copy_(sum_q.view_as(grad_q))


def weighted(rows: torch.Tensor, weight: torch.Tensor, lost: torch.Tensor | None) -> torch.Tensor:
    """rows [m, r, dim] · weight [m, r, 1], 0 where no document token won."""
    product = rows * weight
    return product if lost is None else product.masked_fill_(lost, 0.0)


def through_norm(x: torch.Tensor, norms: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Gradient of x / max(‖x‖, eps) given the gradient g of its output; a clamped norm is a constant.

    A row that won nothing gets 0, whatever (a masked NaN) it holds.
    """
    unit = x / norms
    along = torch.where(norms > EPS, (unit * g).sum(-1, keepdim=True), 0.0)
    return torch.where((g != 0).any(-1, keepdim=True), (g - unit * along) / norms, 0.0)
