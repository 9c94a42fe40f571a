"""Bounds of scores from 8-bit codes in torch float64, on any device.

With a code x̂_j of a token x_j and ‖x_j - x̂_j‖ <= e_j, the similarity <q_i, x_j> is within ‖q_i‖ · e_j of <q_i, x̂_j>.
Every rounding of the computation below is part of the margin. A product of dim terms is off by at most
(dim + 1) · 2^-53 · ‖q_i‖ · ‖x̂_j‖ in whatever order it is summed; scales, norms and sums add fewer than dim + 16 such
terms, so (dim + 8) · 2^-51 = 4 · (dim + 8) · 2^-53 covers them all. Codes are integers: only a float64 q underflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latemax.ops.backends.blocks import ROWS, dense_parts
from latemax.ops.backends.gather import EPS, groups
from latemax.ops.problem import Batch
from latemax.quantized import rounded_up

# bytes of a block of similarities, margins and decoded tokens
BLOCK_BYTES = 16 << 20
# numbers of q up to here: no sum of products leaves the range of float64
LARGEST = 2.0**850


def forward(b: Batch, lower: Tensor, upper: Tensor) -> None:
    """Fills [n_q, n_d] twice. d is int8 codes with their error, q numbers."""
    with torch.autocast(lower.device.type, enabled=False), torch.no_grad():
        for at, slots, part in dense_parts(b):
            lower[at, slots], upper[at, slots] = _dense(part, lower.dtype)


def _slack(n: int) -> float:
    """Covers the rounding of fewer than 2 · n + 20 operations."""
    return (n + 8) * 2.0**-51


def _dense(b: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(lower, upper), [n_q, n_d]."""
    d, codes, d_mask, weights = b.d.tokens, b.d.codes, b.d.mask, b.q.weights
    assert codes is not None and codes.error is not None
    q = b.q.tokens.to(torch.float64)
    n_q, l_q, dim = q.shape
    keep = q.new_ones((n_q, l_q), dtype=torch.bool) if b.q.mask is None else b.q.mask
    q = q.masked_fill(~keep.unsqueeze(-1), 0.0)
    unknown, wrong = (x.flatten(1).any(-1, keepdim=True) for x in (q.abs() > LARGEST, q.isnan()))  # [n_q, 1]
    if b.normalize:
        q = q / _norms(q).clamp_min_(EPS)
    # as factors of the margin: at least the norms of real numbers
    norms = _norms(q).squeeze(-1) * (1 + _slack(dim))
    weights = None if weights is None else weights.to(torch.float64)
    low, high = q.new_zeros(n_q, b.n_d), q.new_zeros(n_q, b.n_d)
    if d.shape[-2]:
        shared = (d, codes.scale, codes.error, d_mask)
        for group in groups(d.dim() == 4, n_q, shared, (q, norms, keep, weights, low, high)):
            _group(group, b.normalize, 2.0**-1000 if b.q.tokens.dtype == torch.float64 else 0.0)
    if b.mean:
        count = keep.sum(-1, keepdim=True).clamp_(min=1)
        low, high = low / count, high / count
    # weights that are not finite, or too large
    low = torch.where(low < math.inf, low, -math.inf)
    high = torch.where(high > -math.inf, high, math.inf)
    empty = torch.zeros_like(low, dtype=torch.bool) if d.shape[-2] else torch.ones_like(low, dtype=torch.bool)
    if d_mask is not None:
        empty |= ~d_mask.any(-1)
    if dtype == torch.float32:
        low, high = -rounded_up(-low), rounded_up(high)
    for x, least in ((low, -math.inf), (high, math.inf)):
        x.masked_fill_(unknown, least).masked_fill_(wrong, math.nan).masked_fill_(empty, b.empty_score)
        x.masked_fill_(~keep.any(-1, keepdim=True), 0.0)
    return low, high


def _norms(x: Tensor) -> Tensor:
    """[..., 1], scaled so that no square leaves the range of float64."""
    largest = x.abs().amax(-1, keepdim=True)
    return torch.linalg.vector_norm(x / largest.where(largest > 0, 1.0), dim=-1, keepdim=True) * largest


def _group(group: tuple, normalize: bool, least_margin: float) -> None:
    d, scale, error, d_mask, q, norms, keep, weights, low, high = group
    (n_q, l_q, dim), (n_d, l_d) = q.shape, d.shape[:2]
    queries = max(1, ROWS // l_q)
    for i in range(0, n_q, queries):
        some = slice(i, i + queries)
        rows, lengths = q[some].reshape(-1, dim).T, norms[some].reshape(-1)
        tokens = max(1, BLOCK_BYTES // (8 * (dim + 3 * rows.shape[1])))
        docs = max(1, tokens // l_d)
        for n in range(0, n_d, docs):
            best: tuple[Tensor, Tensor] | None = None
            for start in range(0, l_d, tokens):
                at = slice(n, n + docs), slice(start, start + tokens)
                codes = d[at].to(torch.float64)
                factor, reach = _reach(codes, scale[at], error[at], normalize)
                sims = (codes.reshape(-1, dim) @ rows).view(*codes.shape[:2], -1) * factor
                # an unknown token may be anywhere, whatever q is
                margin = torch.where(reach == math.inf, math.inf, reach * lengths + least_margin)
                if d_mask is not None:
                    masked = ~d_mask[at].unsqueeze(-1)
                    sims, margin = sims.masked_fill_(masked, -math.inf), margin.masked_fill_(masked, 0.0)
                part = (sims - margin).amax(1), (sims + margin).amax(1)  # [docs, rows]
                best = part if best is None else (torch.maximum(best[0], part[0]), torch.maximum(best[1], part[1]))
            assert best is not None
            least, most = (x.view(len(x), -1, l_q).transpose(0, 1) for x in best)  # [queries, docs, l_q]
            if weights is not None:
                w = weights[some].unsqueeze(1)
                least, most = (torch.where(w < 0, y, x) * w for x, y in ((least, most), (most, least)))
            counted = keep[some].unsqueeze(1)
            for x, sign, out in ((least, -1.0, low), (most, 1.0, high)):
                x = x.masked_fill(~counted, 0.0)
                out[some, n : n + docs] = x.sum(-1) + sign * _slack(l_q) * x.abs().sum(-1)


def _reach(codes: Tensor, scale: Tensor, error: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """(factor of every code, how far its token may be from it at most), float64 [docs, tokens, 1].

    Unit vectors: x / max(‖x‖, eps) is x projected on the ball of radius eps, over eps, and a projection moves no two
    points apart: their distance is at most e / eps. Where both norms are above eps it is also at most
    2e / (‖x‖ + ‖x̂‖) (Dunkl and Williams, 1964), with ‖x‖ >= ‖x̂‖ - e.
    """
    slack = _slack(codes.shape[-1])
    scale, error = scale.to(torch.float64).unsqueeze(-1), error.to(torch.float64).unsqueeze(-1)
    length = torch.linalg.vector_norm(codes, dim=-1, keepdim=True) * scale
    if not normalize:
        return scale, (error + slack * length) * (1 + slack)
    least = length * (1 - slack) - error  # of ‖x‖
    near = torch.where(least >= EPS * (1 + slack), 2 * error / (length + least), error / EPS)
    near = torch.where(error == math.inf, math.inf, near.clamp_max(2.0))
    factor = scale / length.clamp_min(EPS)
    return factor, (near + slack) * (1 + slack)
