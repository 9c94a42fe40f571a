"""Tiles of tokens as the forward pass loads and multiplies them: numbers, and codes without their scale."""

import triton
import triton.language as tl

from latemax.kernels.common import (
    BITS,
    NO_NORM,
    NORM_BEFORE,
    NORM_IN_TILE,
    halves,
    inverse_norm,
    load_bits,
    load_rows,
)


@triton.jit
def load_queries(q, first, stride, B):
    """[BLOCK_Q, BLOCK_K] columns of the query tokens from ``first`` on."""
    columns = first + tl.arange(0, B.BLOCK_K)
    rows = q.token.to(tl.int64)
    if B.Q_CODES and B.D_CODES == BITS:
        bits = load_bits(q.base, rows, q.ok, first, stride, B.BLOCK_Q, B.BLOCK_K, B.DIM, False, B.COMPUTE)
        # a token of scale 0 is the zero vector, of which all similarities tie
        ok = q.ok & (tl.load(q.inv + q.token, mask=q.ok, other=0.0) != 0)
        return tl.where(ok[:, None] & (columns < B.DIM)[None, :], bits, 0).to(tl.int8)
    else:
        return load_rows(q.base, rows, q.ok, columns, stride, B.DIM, B.DIM % B.BLOCK_K == 0, False)


@triton.jit
def operands(rows, TRANSPOSE: tl.constexpr, B):
    """Query tokens as products take them: (rows, or their first halves; second halves), transposed if SWAP."""
    if B.SPLIT:
        high, low = halves(rows)
    else:
        high, low = rows, rows
    high, low = high.to(B.COMPUTE), low.to(B.COMPUTE)
    if TRANSPOSE:
        high = tl.trans(high)
        low = tl.trans(low)
    return high, low


@triton.jit
def load_query_tile(q, stride, B):
    """(query tile, its second halves, [BLOCK_Q] factors: inverse norms, scales of codes; norms if BOUNDS). The tile is
    transposed if SWAP, and zero where dim needs several tiles, which the loop loads itself.
    """
    inv = tl.full([B.BLOCK_Q], 1.0, B.ACC)
    if B.NORM == NORM_BEFORE or B.Q_CODES or B.BOUNDS or (B.NORM == NORM_IN_TILE and B.DIM > B.BLOCK_K):
        inv = tl.load(q.inv + q.token, mask=q.ok, other=0.0)
    if B.DIM <= B.BLOCK_K:
        rows = load_queries(q, 0, stride, B)
        if B.NORM == NORM_IN_TILE and not B.Q_CODES and not B.BOUNDS:
            inv = inverse_norm(rows, B.ACC)
    else:
        rows = tl.zeros([B.BLOCK_Q, B.BLOCK_K], q.base.dtype.element_ty)
    # Transposed here and not at the product: there it was stored to shared memory again for every document tile.
    high, low = operands(rows, B.SWAP, B)
    return high, low, inv


@triton.jit
def multiply(rows, q_high, q_low, s, B):
    """``s`` and the products of document rows [BLOCK_D, BLOCK_K] with query rows, which are transposed if SWAP."""
    rows = rows.to(B.COMPUTE)
    SUM: tl.constexpr = tl.int32 if B.Q_CODES else B.ACC
    if B.SWAP:
        s = tl.dot(rows, q_high, s, input_precision=B.PRECISION, out_dtype=SUM)
        if B.SPLIT:
            s = tl.dot(rows, q_low, s, input_precision=B.PRECISION, out_dtype=SUM)
    else:
        s = tl.dot(q_high, tl.trans(rows), s, input_precision=B.PRECISION, out_dtype=SUM)
        if B.SPLIT:
            s = tl.dot(q_low, tl.trans(rows), s, input_precision=B.PRECISION, out_dtype=SUM)
    return s


@triton.jit
def load_document_rows(base, j, ok, first, stride, FULL: tl.constexpr, B):
    """[BLOCK_D, BLOCK_K] columns of document tokens from ``first`` on; codes without their scale."""
    if B.D_CODES == BITS:
        return load_bits(base, j, ok, first, stride, B.BLOCK_D, B.BLOCK_K, B.DIM, FULL, B.COMPUTE)
    else:
        columns = first + tl.arange(0, B.BLOCK_K)
        return load_rows(base, j, ok, columns, stride, B.DIM, B.DIM % B.BLOCK_K == 0, FULL)


@triton.jit
def code_factors(scale, squares, B):
    """What makes products of codes similarities, [BLOCK_D]."""
    if B.NORM == NO_NORM:
        return scale
    elif B.D_CODES == BITS:
        return scale / tl.maximum(scale * tl.sqrt(squares * 0 + B.DIM), 1e-12)
    else:
        return scale / tl.maximum(scale * tl.sqrt(squares), 1e-12)
