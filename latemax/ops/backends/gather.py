"""Gradients from the recorded argmax in plain torch, on any device.

grad_q gathers the document tokens that argmax names; grad_d adds query tokens up at them. The product of a query token
and the sum gathered for it, before its weight is applied, is the gradient of that weight.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from latemax.ops.backends import decode
from latemax.ops.problem import Batch, Gradients, Needs, Side

EPS = 1e-12
# float32 rows gathered at once
BLOCK_BYTES = 64 << 20
# sums over whole documents, where d needs a gradient, stay within a block of this size
SUM_BYTES = 4 << 20


@functools.cache
def l2_bytes() -> int:
    """L2 cache of one core; 1 MiB where the system does not say."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 1 << 20
    except (AttributeError, ValueError, OSError):
        return 1 << 20


def clamped_norms(x: Tensor) -> Tensor:
    """max(‖row‖, eps), [..., 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(EPS)


def groups(
    own: bool, n_q: int, shared: tuple[Tensor | None, ...], per_query: tuple[Tensor | None, ...]
) -> Iterator[tuple]:
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


def backward(b: Batch, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
    if b.ragged or b.d.codes is not None:
        return ragged(b, argmax, g, needs)
    q, d, weights = b.q.tokens, b.d.tokens, b.q.weights
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format) if needs.q else None
    grad_d = torch.zeros_like(d, memory_format=torch.contiguous_format) if needs.d else None
    grad_weights = None if weights is None or not needs.weights else torch.zeros_like(weights)
    if g.numel() and d.shape[-2]:
        with torch.autocast(q.device.type, enabled=False), torch.no_grad():
            for group in groups(b.own, len(q), (d, grad_d), (q, weights, grad_q, grad_weights, g, argmax)):
                _dense_group(group, b.normalize, b.score_dtype)
    return Gradients(grad_q, grad_d, grad_weights)


def _dense_group(group: tuple, normalize: bool, wide: torch.dtype) -> None:
    """Fills the gradients in place, a block of documents at a time."""
    d, grad_d, q, weights, grad_q, grad_weights, g, argmax = group
    (n_q, l_q, dim), (n_d, l_d) = q.shape, d.shape[:2]
    rows = q.reshape(-1, dim).to(wide).contiguous()
    q_norms = clamped_norms(rows) if normalize else rows
    units = rows / q_norms if normalize else rows
    factors = None if weights is None else weights.reshape(-1, 1)
    counted = units if factors is None else units * factors
    sum_q = torch.zeros_like(rows)
    # picked rows stay in L2; sums over whole documents, where d has a gradient, stay within a block
    docs = max(1, l2_bytes() * torch.get_num_threads() // (rows.numel() * rows.element_size()))
    docs = min(docs, max(1, SUM_BYTES // (l_d * dim * rows.element_size())))
    for n in range(0, n_d, docs):
        m = min(docs, n_d - n)
        best = argmax[:, n : n + m].transpose(0, 1).reshape(m, -1)  # [m, n_q * l_q]
        won = best >= 0
        flat = (best.clamp(min=0) + l_d * torch.arange(m, device=d.device).unsqueeze(1)).reshape(-1)
        weight = g[:, n : n + m].T.to(wide).unsqueeze(-1).expand(m, n_q, l_q).reshape(m, -1, 1)
        # on a GPU (backend="reference") asking would wait for the device
        lost = None if d.device.type == "cpu" and bool(won.all()) else ~won.unsqueeze(-1)
        if grad_q is not None or grad_weights is not None:
            picked = d[n : n + m].reshape(-1, dim).index_select(0, flat).to(wide)
            if normalize:
                picked /= clamped_norms(picked)
            sum_q += weighted(picked.view(m, -1, dim), weight, lost).sum(0)
        if grad_d is not None:
            given = weighted(counted.expand(m, -1, -1), weight, lost).reshape(-1, dim)
            total = given.new_zeros(m * l_d, dim).index_add_(0, flat, given)
            if normalize:
                block = d[n : n + m].reshape(-1, dim).to(wide)
                total = through_norm(block, clamped_norms(block), total)
            grad_d[n : n + m] = total.view(m, l_d, dim)
    if grad_weights is not None:
        torch.sum((units * sum_q).view(n_q, l_q, dim), -1, out=grad_weights)
    if grad_q is not None:
        if factors is not None:
            sum_q *= factors
        if normalize:
            sum_q = through_norm(rows, q_norms, sum_q)
        grad_q.copy_(sum_q.view_as(grad_q))


def ragged(b: Batch, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
    """Any form, dense ones too: query rows are taken as one list, whichever query they belong to."""
    b = b._replace(q=decode.decoded(b.q, b.score_dtype))
    q, d, q_offsets, d_offsets = b.q.tokens, b.d.tokens, b.q.offsets, b.d.offsets
    n_q, n_d, l_q, l_d, dim = b.q.items, b.n_d, b.q.length, b.d.length, b.dim
    candidates, wide = b.candidates, b.score_dtype
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        rows, docs = q.reshape(-1, dim).to(wide), d.reshape(-1, d.shape[-1])
        if q_offsets is None:
            owner = torch.arange(n_q, device=q.device).repeat_interleave(l_q)
            argmax = argmax.permute(1, 0, 2).reshape(n_d, n_q * l_q)
        else:
            # rows after the last offset count as the last query's here; their argmax is -1
            at = torch.arange(len(rows), device=q.device)
            owner = (torch.searchsorted(q_offsets, at, right=True) - 1).clamp(max=n_q - 1)
        q_norms = clamped_norms(rows) if b.normalize else rows
        units = rows / q_norms if b.normalize else rows
        factors = None if b.q.weights is None else b.q.weights.reshape(-1, 1)
        counted = units if factors is None else units * factors
        sum_q = torch.zeros_like(rows)
        sum_d = torch.zeros(docs.shape if needs.d else (0, dim), dtype=wide, device=d.device)
        step = max(1, BLOCK_BYTES // max(1, 2 * rows.numel() * rows.element_size()))
        for first in range(0, n_d if len(rows) and len(docs) else 0, step):
            best = argmax[first : first + step]  # [c, rows]
            won = best >= 0
            c = torch.arange(first, first + len(best), device=d.device)
            if d_offsets is not None and candidates is not None:
                # the argmax of an invalid candidate is -1
                numbers = candidates[:, first : first + step].clamp(0, max(0, len(d_offsets) - 2))
                base = d_offsets[numbers.T[:, owner]]
            elif d_offsets is not None:
                base = d_offsets[c].unsqueeze(1)
            else:
                base = (owner * n_d + c.unsqueeze(1) if b.own else c.unsqueeze(1)) * l_d
            flat = torch.where(won, base + best, 0).reshape(-1)
            weight = g[:, first : first + step].T[:, owner].to(wide).unsqueeze(-1)  # [c, rows, 1]
            lost = ~won.unsqueeze(-1)
            if needs.q or needs.weights:
                picked = _picked(b.d, docs, flat, wide)
                if b.normalize:
                    picked /= clamped_norms(picked)
                sum_q += weighted(picked.view(*won.shape, dim), weight, lost).sum(0)
            if needs.d:
                given = weighted(counted.expand(len(best), -1, -1), weight, lost).reshape(-1, dim)
                if d.is_cuda:
                    # sorts by row first: repeatable, which index_add is not
                    sum_d.index_put_((flat,), given, accumulate=True)
                else:
                    sum_d.index_add_(0, flat, given)
        grad_weights = (units * sum_q).sum(-1).view(q.shape[:-1]) if needs.weights else None
        if factors is not None:
            sum_q *= factors
        if b.normalize and needs.q:
            sum_q = through_norm(rows, q_norms, sum_q)
        if b.normalize and needs.d:
            docs = docs.to(wide)
            sum_d = through_norm(docs, clamped_norms(docs), sum_d)
        return Gradients(
            sum_q.view(q.shape).to(q.dtype) if needs.q else None,
            sum_d.view(d.shape).to(d.dtype) if needs.d else None,
            grad_weights,
        )


def _picked(s: Side, docs: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
    """Some of the document tokens, as numbers."""
    rows = docs.index_select(0, at)
    if s.codes is None:
        return rows.to(dtype)
    codes = s.codes.each(lambda x: x.reshape(-1).index_select(0, at))
    return decode.decoded(Side(rows, codes=codes), dtype).tokens


def weighted(rows: Tensor, weight: Tensor, lost: Tensor | None) -> Tensor:
    """rows [m, r, dim] · weight [m, r, 1], 0 where argmax is -1."""
    product = rows * weight
    return product if lost is None else product.masked_fill_(lost, 0.0)


def through_norm(x: Tensor, norms: Tensor, g: Tensor) -> Tensor:
    """Gradient of x / max(‖x‖, eps) given the gradient g of its output; a clamped norm is a constant.

    A row with no gradient gets 0, whatever (a masked NaN) it holds.
    """
    unit = x / norms
    along = torch.where(norms > EPS, (unit * g).sum(-1, keepdim=True), 0.0)
    return torch.where((g != 0).any(-1, keepdim=True), (g - unit * along) / norms, 0.0)
