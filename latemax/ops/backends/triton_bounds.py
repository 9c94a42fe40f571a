"""Bounds of scores by the Triton kernels, from 8-bit codes and a q of float16, bfloat16 or float32.

Query tokens are prepared here, in float64; latemax.kernels.bounds says what for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latemax.ops.backends import triton_launch
from latemax.ops.problem import Batch, Codes, Outputs, Side
from latemax.ops.tiles import Launch

EPS = 1e-12
EXPONENT = 0x7FF << 52  # of a float64


def forward(b: Batch, launch: Launch, lower: Tensor, upper: Tensor, *, coarse: bool) -> None:
    """Fills [n_q, n_d] twice. ``coarse``: q is rounded to 8 bits, and products are those of integers."""
    q, reach = _queries(b, coarse)
    triton_launch.forward(b._replace(q=q), launch, Outputs(lower, upper), reach)


def _queries(b: Batch, coarse: bool) -> tuple[Side, Tensor]:
    """(queries as they are multiplied, whose weights are float64 factors of maxima; Q and R, float32 [2, ...]).

    R is read only of 8 bits. A float token is brought to 2^15, so that what a GPU may flush to 0 in it is below 2^-29
    of its largest number (float16), or 2^-141, which ε covers.
    """
    s, dim = b.q, b.dim
    q = s.tokens.to(torch.float64)
    if s.mask is not None:
        q = q.masked_fill(~s.mask.unsqueeze(-1), 0.0)
    top = q.abs().amax(-1, keepdim=True)
    finite = top.isfinite()
    q, size = q.where(finite, 0.0), top.where(finite & (top > 0), 1.0)
    unit = size / 127 if coarse else (size.view(torch.int64) & EXPONENT).view(torch.float64) * 2.0**-15
    q = q / unit
    tokens = q.round().to(torch.int8) if coarse else q.to(s.tokens.dtype)
    length = torch.linalg.vector_norm(q, dim=-1)
    lost = torch.linalg.vector_norm(q - tokens.to(torch.float64), dim=-1) if coarse else length
    unit, finite = unit.squeeze(-1), finite.squeeze(-1)
    # a token of zeros reaches nowhere, however far a document token may be from its code: its factor is 0
    reach = torch.stack((length, lost)).masked_fill_(length == 0, 1.0) * (1 + 2.0**-18 + dim * 2.0**-23)
    reach[0].masked_fill_(top.squeeze(-1).isnan(), torch.nan)
    factor = unit / (length * unit).clamp_min(EPS) if b.normalize else unit
    # NaN: nothing is known
    factor = factor.where(length > 0, 0.0).masked_fill(~finite, torch.nan)
    if s.weights is not None:
        factor = factor * s.weights
    codes = Codes("int8", dim, reach[0]) if coarse else None
    return s._replace(tokens=tokens, weights=factor, codes=codes), reach.to(torch.float32)
