"""Smooth maxima: an online softmax over document tiles, and gradients from recomputed similarities.

smooth[i] = m + tau · log Σ_j exp((s[i, j] - m) / tau)     a program has query tokens and one document
grad_q[i] = Σ_docs Σ_j p[i, j] · d[j]                      a program owns query tokens
grad_d[j] = Σ_queries Σ_i p[i, j] · q[i]                   a program owns document tokens

with p[i, j] = g · exp((s[i, j] - smooth[i]) / tau). No atomics, so gradients repeat bit for bit.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from latemax.kernels.common import aligned, nan_max, row_max, wide


class Build(NamedTuple):
    """The constants of a build, all tl.constexpr."""

    DIM: Any
    BLOCK_Q: Any  # query tokens in a tile
    BLOCK_D: Any  # document tokens in a tile
    BLOCK_K: Any  # columns in a tile
    PRECISION: Any  # of products of float32
    COMPUTE: Any  # dtype of the operands of similarities
    ACC: Any  # dtype of similarities and sums


class Tokens(NamedTuple):
    """Tokens of one query or document."""

    base: Any  # pointer to token 0
    stride: Any  # from token to token
    keep: Any  # pointer to token 0 of the mask, which is contiguous
    inv: Any  # pointer to the inverse norm of token 0, or 1
    length: Any


class Tile(NamedTuple):
    """Some tokens of a query or document."""

    base: Any  # [rows, 1] pointers
    keep: Any  # [rows], valid and before the end
    inv: Any  # [rows]


@triton.jit
def in_dtype(x, ACC):
    """A float argument, which the interpreter keeps as a Python float."""
    return (x + tl.full([], 0, tl.float64)).to(ACC)


@triton.jit
def find_query(query, q_ptr, keep_ptr, inv_ptr, stride_n, stride_l, l_q):
    query = wide(query)
    return Tokens(q_ptr + query * stride_n, stride_l, keep_ptr + query * l_q, inv_ptr + query * l_q, l_q)


@triton.jit
def find_document(query, doc, d_ptr, keep_ptr, inv_ptr, stride_n, stride_k, stride_l, row_stride, l_d):
    """row_stride: from query to query in the mask and the norms; 0 where all queries share the documents."""
    row = wide(query) * row_stride + wide(doc) * l_d
    return Tokens(d_ptr + wide(query) * stride_n + wide(doc) * stride_k, stride_l, keep_ptr + row, inv_ptr + row, l_d)


@triton.jit
def load_tile(x, start, ROWS: tl.constexpr):
    i = start + tl.arange(0, ROWS)
    ok = i < x.length
    keep = tl.load(x.keep + i, mask=ok, other=0) != 0
    inv = tl.load(x.inv + i, mask=keep, other=0.0)
    return Tile(x.base + i[:, None].to(tl.int64) * x.stride, keep, inv)


@triton.jit
def load_columns(tile, columns, DIM: tl.constexpr):
    """Masked tokens read as 0, whatever they hold."""
    return tl.load(tile.base + columns[None, :], mask=tile.keep[:, None] & (columns < DIM)[None, :], other=0.0)


@triton.jit
def load_units(tile, columns, B):
    """[rows, columns] of unit vectors.

    A token with NaN or infinity has only similarities of NaN and ±inf, so its shares are 0 or NaN: it reads as 0.
    """
    x = load_columns(tile, columns, B.DIM).to(B.ACC) * tile.inv[:, None]
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def similarities(q, d, B):
    """[BLOCK_Q, BLOCK_D], -inf where a document token is masked."""
    s = tl.zeros([B.BLOCK_Q, B.BLOCK_D], B.ACC)
    for k in range(0, B.DIM, B.BLOCK_K):
        columns = k + tl.arange(0, B.BLOCK_K)
        rows = load_columns(d, columns, B.DIM).to(B.COMPUTE)
        s = tl.dot(
            load_columns(q, columns, B.DIM).to(B.COMPUTE), tl.trans(rows), s,
            input_precision=B.PRECISION, out_dtype=B.ACC,
        )  # fmt: skip
    s *= q.inv[:, None] * d.inv[None, :]
    return tl.where(d.keep[None, :], s, float("-inf"))


@triton.jit
def smooth_maxima(q, document, tau, B):
    """[BLOCK_Q]; -inf where every similarity is, also where there is none."""
    best = tl.full([B.BLOCK_Q], float("-inf"), B.ACC)
    total = tl.zeros([B.BLOCK_Q], B.ACC)
    for start in range(0, document.length, B.BLOCK_D):
        s = similarities(q, load_tile(document, start, B.BLOCK_D), B)
        new = nan_max(best, row_max(s, 1))
        # inf - inf would be NaN
        base = tl.where(tl.abs(new) == float("inf"), 0.0, new)
        total = total * tl.exp((best - base) / tau) + tl.sum(tl.exp((s - base[:, None]) / tau), 1)
        best = new
    return best + tau * tl.log(total)


@triton.jit
def shares(q, d, smooth, g, tau, B):
    """p of a tile: [BLOCK_Q, BLOCK_D]."""
    base = tl.where(smooth == float("-inf"), 0.0, smooth)
    p = tl.exp((similarities(q, d, B) - base[:, None]) / tau) * g
    return tl.where(q.keep[:, None] & d.keep[None, :], p, 0.0)


@triton.jit
def add_documents(total, q, d, smooth, g, tau, columns, B):
    """total [BLOCK_Q, BLOCK_K] with what a tile of document tokens adds to the gradient of query tokens."""
    p = shares(q, d, smooth, g, tau, B)
    return tl.dot(p, load_units(d, columns, B), total, input_precision=B.PRECISION, out_dtype=B.ACC)


@triton.jit
def add_queries(total, q, d, smooth, g, tau, columns, B):
    """total [BLOCK_D, BLOCK_K] with what a tile of query tokens adds to the gradient of document tokens."""
    p = shares(q, d, smooth, g, tau, B)
    return tl.dot(tl.trans(p), load_units(q, columns, B), total, input_precision=B.PRECISION, out_dtype=B.ACC)


@triton.jit(
    do_not_specialize=[
        "q_stride_n", "q_stride_l", "d_stride_n", "d_stride_k", "d_stride_l", "d_row_stride",
        "n_q", "n_d", "l_q", "l_d",
    ],
    do_not_specialize_on_alignment=["q_keep_ptr", "d_keep_ptr"],
)  # fmt: skip
def smooth_kernel(
    q_ptr,  # [n_q, l_q, dim]
    d_ptr,  # [n_q, n_d, l_d, dim]; stride of n_q 0 where all queries share the documents
    q_keep_ptr, q_inv_ptr,  # [n_q, l_q] bool and inverse norms
    d_keep_ptr, d_inv_ptr,  # [n_q, n_d, l_d], or [n_d, l_d] where shared
    out_ptr,  # [n_q, n_d, l_q], or if SUM [chunks, n_q, n_d]: parts of a query's score
    q_stride_n, q_stride_l, d_stride_n, d_stride_k, d_stride_l, d_row_stride, n_q, n_d, l_q, l_d, tau: tl.float64,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(l_q, BLOCK_Q)
    pid = tl.program_id(0)
    chunk, query, doc = pid % chunks, pid // chunks % n_q, (pid // chunks // n_q).to(tl.int64)
    tokens = find_query(
        query, q_ptr, q_keep_ptr, q_inv_ptr, aligned(q_stride_n, ALIGN), aligned(q_stride_l, ALIGN), l_q
    )
    document = find_document(
        query, doc, d_ptr, d_keep_ptr, d_inv_ptr, aligned(d_stride_n, ALIGN), aligned(d_stride_k, ALIGN),
        aligned(d_stride_l, ALIGN), d_row_stride, l_d,
    )  # fmt: skip
    q = load_tile(tokens, chunk * BLOCK_Q, BLOCK_Q)
    smooth = smooth_maxima(
        q, document, in_dtype(tau, ACC), Build(DIM, BLOCK_Q, BLOCK_D, BLOCK_K, PRECISION, COMPUTE, ACC)
    )  # fmt: skip
    if SUM:
        out = out_ptr + (wide(chunk) * n_q + query) * n_d + doc
        tl.store(out, tl.sum(tl.where(q.keep, smooth, 0.0), 0))
    else:
        i = chunk * BLOCK_Q + tl.arange(0, BLOCK_Q)
        tl.store(out_ptr + (wide(query) * n_d + doc) * l_q + i, smooth, mask=i < l_q)


@triton.jit(
    do_not_specialize=[
        "q_stride_n", "q_stride_l", "d_stride_n", "d_stride_k", "d_stride_l", "d_row_stride",
        "g_stride_n", "g_stride_k", "n_q", "n_d", "l_q", "l_d",
    ],
    do_not_specialize_on_alignment=["q_keep_ptr", "d_keep_ptr", "g_ptr"],
)  # fmt: skip
def smooth_grad_q_kernel(
    q_ptr, d_ptr, q_keep_ptr, q_inv_ptr, d_keep_ptr, d_inv_ptr,  # as in smooth_kernel
    smooth_ptr,  # [n_q, n_d, l_q]
    g_ptr,  # [n_q, n_d]
    out_ptr,  # [n_q, l_q, dim] gradient of the unit vectors
    q_stride_n, q_stride_l, d_stride_n, d_stride_k, d_stride_l, d_row_stride, g_stride_n, g_stride_k,
    n_q, n_d, l_q, l_d, tau: tl.float64,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program owns BLOCK_Q tokens of one query, BLOCK_K columns of them."""
    chunks = tl.cdiv(l_q, BLOCK_Q)
    column_blocks: tl.constexpr = (DIM + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    columns = pid % column_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    chunk, query = pid // column_blocks % chunks, pid // column_blocks // chunks
    tokens = find_query(
        query, q_ptr, q_keep_ptr, q_inv_ptr, aligned(q_stride_n, ALIGN), aligned(q_stride_l, ALIGN), l_q
    )
    q = load_tile(tokens, chunk * BLOCK_Q, BLOCK_Q)
    i = chunk * BLOCK_Q + tl.arange(0, BLOCK_Q)
    total = tl.zeros([BLOCK_Q, BLOCK_K], ACC)
    for doc in range(0, n_d):
        document = find_document(
            query, doc, d_ptr, d_keep_ptr, d_inv_ptr, aligned(d_stride_n, ALIGN), aligned(d_stride_k, ALIGN),
            aligned(d_stride_l, ALIGN), d_row_stride, l_d,
        )  # fmt: skip
        g = tl.load(g_ptr + wide(query) * g_stride_n + wide(doc) * g_stride_k).to(ACC)
        smooth = tl.load(smooth_ptr + (wide(query) * n_d + doc) * l_q + i, mask=i < l_q, other=0.0)
        for start in range(0, l_d, BLOCK_D):
            d = load_tile(document, start, BLOCK_D)
            total = add_documents(
                total, q, d, smooth, g, in_dtype(tau, ACC), columns,
                Build(DIM, BLOCK_Q, BLOCK_D, BLOCK_K, PRECISION, COMPUTE, ACC),
            )  # fmt: skip
    out = out_ptr + (wide(query) * l_q + i[:, None]) * DIM + columns[None, :]
    tl.store(out, total, mask=(i < l_q)[:, None] & (columns < DIM)[None, :])


@triton.jit(
    do_not_specialize=[
        "q_stride_n", "q_stride_l", "d_stride_n", "d_stride_k", "d_stride_l", "d_row_stride",
        "g_stride_n", "g_stride_k", "n_q", "n_d", "l_q", "l_d",
    ],
    do_not_specialize_on_alignment=["q_keep_ptr", "d_keep_ptr", "g_ptr"],
)  # fmt: skip
def smooth_grad_d_kernel(
    q_ptr, d_ptr, q_keep_ptr, q_inv_ptr, d_keep_ptr, d_inv_ptr, smooth_ptr, g_ptr,  # as in smooth_grad_q_kernel
    out_ptr,  # [n_q, n_d, l_d, dim] ([n_d, l_d, dim] where shared), gradient of the unit vectors
    q_stride_n, q_stride_l, d_stride_n, d_stride_k, d_stride_l, d_row_stride, g_stride_n, g_stride_k,
    n_q, n_d, l_q, l_d, tau: tl.float64,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, OWN: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program owns BLOCK_D tokens of one document, BLOCK_K columns of them."""
    blocks = tl.cdiv(l_d, BLOCK_D)
    column_blocks: tl.constexpr = (DIM + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    columns = pid % column_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    start = pid // column_blocks % blocks * BLOCK_D
    item = pid // column_blocks // blocks
    doc = item % n_d
    first = item // n_d
    end = first + 1 if OWN else n_q
    document = find_document(
        first, doc, d_ptr, d_keep_ptr, d_inv_ptr, aligned(d_stride_n, ALIGN), aligned(d_stride_k, ALIGN),
        aligned(d_stride_l, ALIGN), d_row_stride, l_d,
    )  # fmt: skip
    d = load_tile(document, start, BLOCK_D)
    total = tl.zeros([BLOCK_D, BLOCK_K], ACC)
    for query in range(first, end):
        tokens = find_query(
            query, q_ptr, q_keep_ptr, q_inv_ptr, aligned(q_stride_n, ALIGN), aligned(q_stride_l, ALIGN), l_q
        )  # fmt: skip
        g = tl.load(g_ptr + wide(query) * g_stride_n + wide(doc) * g_stride_k).to(ACC)
        for at in range(0, l_q, BLOCK_Q):
            q = load_tile(tokens, at, BLOCK_Q)
            i = at + tl.arange(0, BLOCK_Q)
            smooth = tl.load(smooth_ptr + (wide(query) * n_d + doc) * l_q + i, mask=i < l_q, other=0.0)
            total = add_queries(
                total, q, d, smooth, g, in_dtype(tau, ACC), columns,
                Build(DIM, BLOCK_Q, BLOCK_D, BLOCK_K, PRECISION, COMPUTE, ACC),
            )  # fmt: skip
    j = start + tl.arange(0, BLOCK_D)
    out = out_ptr + (wide(item) * l_d + j[:, None]) * DIM + columns[None, :]
    tl.store(out, total, mask=(j < l_d)[:, None] & (columns < DIM)[None, :])
