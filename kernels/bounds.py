"""Bounds of scores, from 8-bit codes of document tokens and how far these are from the tokens.

The forward kernel multiplies q̂_i for the query token f_i · q_i, and the code x̂_j for the token x_j. Let ‖q_i‖ <= Q_i,
‖q_i - q̂_i‖ <= R_i, ‖x_j - x̂_j‖ <= a_j, ‖x̂_j‖ <= b_j, and let the computed product s_ij of q̂_i and x̂_j be off by at most
ε · Q_i · b_j. Then

    |<q_i, x_j> - s_ij| <= |<q_i, x_j - x̂_j>| + |<q_i - q̂_i, x̂_j>| + ε · Q_i · b_j <= Q_i · (a_j + ε · b_j) + R_i · b_j.

latemax.ops.backends.triton_bounds makes q̂, f, Q and R in float64. In units of 2^-22, ε holds

- of a sum of n products c_k · q̂_k, each of them exact: n · Σ|c_k · q̂_k|, as tensor cores align the terms and cut them
  off. n is dim, or 2 · dim in two halves, of which the second adds less than 2^-6 to Σ|c_k · q̂_k| <= ‖c‖ · ‖q̂‖; 0 for
  sums of integers.
- of a query token in halves, which lose 2^-16 of it: 64, in place of R_i. Only tokens of 8 bits have R_i > 0.
- of the code's norm, where it counts: dim / 4. Sums of squares are exact up to 1040 dims.
- of the conversion of a sum to float32, its factor, their product, s - r and s + r: less than 64.

Q and R are large by a relative 2^-18, which covers the few roundings of r, fused or not.
"""

import triton
import triton.language as tl

from latemax.kernels.common import NO_NORM
from latemax.kernels.products import code_factors

INFINITY = tl.constexpr(float("inf"))
# |q̂_i| · |x̂_j| stays in range, with at most 2^17 numbers of 2^16 in a query token
LARGEST = tl.constexpr(2.0**100)
# More than a number below 2^-126 adds, which a GPU may flush to 0: 2^-126 · 127 · sqrt(dim), of unit tokens 1e12 times
# that.
TINY, UNIT_TINY = tl.constexpr(2.0**-108), tl.constexpr(2.0**-64)
EPS = tl.constexpr(1e-12)
# of float32
SMALLEST, MOST = tl.constexpr(2.0**-126), tl.constexpr((2 - 2.0**-22) * 2.0**127)


@triton.jit
def with_norms(B):
    """Whether b_j is the norm of the code. Else it is 127 · sqrt(dim) times its scale, which widens the bounds of
    random tokens by 4 % at 128 dims and 13 % at 512 (a code's error is about sqrt(dim / 12) times its scale). A sum of
    squares takes half of the instructions of the loop."""
    return B.BOUNDS and (B.Q_CODES or B.NORM != NO_NORM or B.DIM > 512)


@triton.jit
def rounding(B):
    """ε"""
    if B.Q_CODES:
        return (0.25 * B.DIM + 64) * 2.0**-22
    elif B.SPLIT:
        return (2.3 * B.DIM + 128) * 2.0**-22
    else:
        return (1.3 * B.DIM + 64) * 2.0**-22


@triton.jit
def code_bounds(scale, error, squares, B):
    """([BLOCK_D] factors of products with codes, a + ε · b, b), of unit tokens if NORM.

    x / max(‖x‖, EPS) is x projected on the ball of radius EPS, over EPS, and a projection moves no two points apart:
    the distance of two is at most e / EPS. Where both norms are above EPS it is also at most 2e / (‖x‖ + ‖x̂‖) (Dunkl
    and Williams, 1964), with ‖x‖ >= ‖x̂‖ - e.
    """
    factor = code_factors(scale, squares, B)
    if with_norms(B):
        length = scale * tl.sqrt(squares)
    else:
        length = scale * (127 * B.DIM**0.5)
    known = (error < LARGEST) & (length < LARGEST) & (factor < LARGEST)
    if B.NORM == NO_NORM:
        apart = error + TINY
    else:
        shortest = length * (1 - (B.DIM + 32) * 2.0**-22)
        least = shortest - error
        near = 2 * error / tl.maximum(shortest + least, SMALLEST)
        apart = tl.where(least >= EPS * 1.001, near, error / EPS)
        apart = tl.minimum(apart * (1 + 2.0**-20), 2.0) + UNIT_TINY
        length = length * 0 + 1
    apart += rounding(B) * length
    # an unknown token may be anywhere
    return tl.where(known, factor, 0.0), tl.where(known, apart, INFINITY), tl.where(known, length, 0.0)


@triton.jit
def rounded_up(x):
    """float64 -> float32: at least x by a relative 2^-24, never subnormal."""
    y = tl.maximum(x + tl.abs(x) * 2.0**-22, -MOST).to(tl.float32)
    return tl.where(tl.abs(y) < SMALLEST, tl.where(x > 0, SMALLEST, 0.0).to(tl.float32), y)


@triton.jit
def bound_sums(lower, upper, factor, keep, divisor, B):
    """[BLOCK_Q] bounds of maxima and float64 factors of them -> [PACK] float32 bounds of their sums.

    NaN in a bound comes from the query, and makes both sums NaN. A factor of NaN says that nothing is known.
    """
    SIZE: tl.constexpr = B.BLOCK_Q // B.PACK
    nan = tl.sum(tl.reshape((keep & (lower != lower)).to(tl.int32), [B.PACK, SIZE]), 1) > 0
    low, high = lower.to(tl.float64) * factor, upper.to(tl.float64) * factor
    low, high = tl.where(factor < 0, high, low), tl.where(factor < 0, low, high)
    # infinity times 0, too
    low, high = tl.where(low < INFINITY, low, -INFINITY), tl.where(high > -INFINITY, high, INFINITY)
    low = tl.reshape(tl.where(keep, low, 0.0), [B.PACK, SIZE])
    high = tl.reshape(tl.where(keep, high, 0.0), [B.PACK, SIZE])
    # of the factors, the products, the sums and the division
    relative = (B.DIM + SIZE + 32) * 2.0**-51
    low = (tl.sum(low, 1) - tl.sum(tl.abs(low), 1) * relative) / divisor
    high = (tl.sum(high, 1) + tl.sum(tl.abs(high), 1) * relative) / divisor
    unknown = tl.where(nan, float("nan"), 0.0).to(tl.float32)
    return unknown - rounded_up(-low), unknown + rounded_up(high)
