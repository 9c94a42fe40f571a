"""Backward from the recorded winners: two kernels without atomics, so gradients repeat bit for bit.

grad_q[i] = Σ_docs g · d[winner(i)]        gather: a program owns query tokens
grad_d[j] = Σ_{i : winner(i) = j} g · q[i]  one-hot products: a program owns document tokens
"""

import triton
import triton.language as tl

from latemax.kernels.common import aligned, load_rows, wide


@triton.jit
def through_norm(x, inv, g):
    """Gradient of x / max(‖x‖, eps) given the gradient g of its output.

    x, g: [rows, dim]; inv: [rows], 1 / max(‖x‖, eps).

    A row whose norm lies under eps was divided by a constant, so nothing is projected out of its gradient. A row that
    won nothing gets 0, whatever (a masked NaN) it holds.
    """
    won = tl.max((g != 0).to(tl.int32), 1) > 0
    unit = x * inv[:, None]
    along = tl.where(inv < 0.999e12, tl.sum(unit * g, 1), 0.0)
    return tl.where(won[:, None], (g - unit * along[:, None]) * inv[:, None], 0.0)


@triton.jit(
    do_not_specialize=[
        "d_stride_n", "d_stride_k", "d_stride_l", "d_inv_stride_n", "g_stride_n", "g_stride_k",
        "n_q", "n_d", "l_q", "l_d", "splits",
    ],
    do_not_specialize_on_alignment=["g_ptr"],
)  # fmt: skip
def grad_q_kernel(
    d_ptr,  # [n_q, n_d, l_d, dim]; the stride of n_q is 0 where all queries share the documents
    d_inv_ptr,  # [n_q * n_d * l_d] ([n_d * l_d] where shared)
    argmax_ptr,  # [n_q, n_d, l_q] int32
    g_ptr,  # [n_q, n_d] gradient of the scores
    out_ptr,  # [splits, n_q, l_q, dim]
    d_stride_n, d_stride_k, d_stride_l, d_inv_stride_n, g_stride_n, g_stride_k,
    n_q, n_d, l_q, l_d, splits,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program sums one block of query tokens over every splits-th document."""
    blocks = tl.cdiv(l_q, BLOCK_R)
    pid = tl.program_id(0)
    token = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = (pid // blocks) % splits
    query = (pid // blocks // splits).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    column_ok = columns < DIM
    d_stride_k = aligned(d_stride_k, ALIGN)
    d_stride_l = aligned(d_stride_l, ALIGN)
    d_base = d_ptr + query * aligned(d_stride_n, ALIGN)
    total = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    for step in range(split, n_d, splits):
        doc = wide(step)
        winner = tl.load(argmax_ptr + (query * n_d + doc) * l_q + token, mask=token < l_q, other=-1).to(tl.int64)
        won = winner >= 0
        weight = tl.load(g_ptr + query * g_stride_n + doc * g_stride_k).to(ACC)
        row = tl.load(
            d_base + doc * d_stride_k + winner[:, None] * d_stride_l + columns[None, :],
            mask=won[:, None] & column_ok[None, :], other=0.0,
        ).to(ACC)  # fmt: skip
        if NORM:
            row *= tl.load(d_inv_ptr + query * d_inv_stride_n + doc * l_d + winner, mask=won, other=0.0)[:, None]
        total += row * tl.where(won, weight, 0.0)[:, None]
    out = out_ptr + ((split * n_q + query) * l_q + token[:, None].to(tl.int64)) * DIM + columns[None, :]
    tl.store(out, total, mask=(token < l_q)[:, None] & column_ok[None, :])


@triton.jit
def gather_won(
    q_ptr, q_inv_ptr, argmax_ptr, g_ptr, q_stride_n, q_stride_l, g_stride_n, g_stride_k, first, past, doc, n_d, l_q, j,
    columns, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
    GUARD: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of g · q over the query tokens that document tokens j [BLOCK_D] won: [BLOCK_D, BLOCK_K].

    GUARD: nothing is added to a token that won nothing in a block of query tokens, not even 0 times a NaN or infinity.
    That look at the winners doubled the loop (464 issue slots a block instead of 235, with 4 warps).
    """
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_D, BLOCK_K], ACC)
    for query in range(first, past):
        weight = tl.load(g_ptr + query * g_stride_n + doc * g_stride_k).to(ACC)
        for token in range(0, l_q, BLOCK_R):
            i = token + r
            winner = tl.load(argmax_ptr + (query * n_d + doc) * l_q + i, mask=i < l_q, other=-1)
            rows = load_rows(
                q_ptr + query * q_stride_n, i.to(tl.int64), winner >= 0, columns, q_stride_l, DIM, DIM % BLOCK_K == 0,
                False,
            )  # fmt: skip
            if NORM:
                inv = tl.load(q_inv_ptr + query * l_q + i, mask=winner >= 0, other=0.0)
                rows = rows.to(ACC) * inv[:, None]
            picked = winner[None, :] == j[:, None]
            part = tl.dot(picked.to(COMPUTE), rows.to(COMPUTE), input_precision=PRECISION, out_dtype=ACC) * weight
            if GUARD:
                part = tl.where((tl.max(picked.to(tl.int32), 1) > 0)[:, None], part, 0.0)
            total += part
    return total


@triton.jit(
    do_not_specialize=[
        "q_stride_n", "q_stride_l", "d_stride_n", "d_stride_k", "d_stride_l", "g_stride_n", "g_stride_k",
        "n_q", "n_d", "l_q", "l_d",
    ],
    do_not_specialize_on_alignment=["g_ptr"],
)  # fmt: skip
def grad_d_kernel(
    q_ptr,  # [n_q, l_q, dim]
    d_ptr,  # [n_q, n_d, l_d, dim], read only under NORM
    q_inv_ptr, d_inv_ptr,
    argmax_ptr,  # [n_q, n_d, l_q] int32
    g_ptr,  # [n_q, n_d]
    out_ptr,  # [n_q, n_d, l_d, dim] contiguous ([n_d, l_d, dim] where shared)
    q_stride_n, q_stride_l, d_stride_n, d_stride_k, d_stride_l, g_stride_n, g_stride_k,
    n_q, n_d, l_q, l_d,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    OWN: tl.constexpr, NORM: tl.constexpr, PROJECT: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program owns BLOCK_D tokens of one document, BLOCK_K columns of them, and walks over all the query tokens
    that met it. PROJECT: take the gradient through the norm here, where one program holds all columns.

    The one-hot product picks rows exactly; g multiplies the accumulator afterwards, in ACC, so that a half-precision
    gradient rounds once, at the end. A NaN or infinite g stays with the tokens that won; a NaN query token may reach
    the other winners of its block of BLOCK_R, never a token that won nothing.
    """
    blocks = tl.cdiv(l_d, BLOCK_D)
    column_blocks: tl.constexpr = (DIM + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    columns = pid % column_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    start = (pid // column_blocks % blocks) * BLOCK_D
    item = (pid // column_blocks // blocks).to(tl.int64)
    doc = item % n_d
    first = item // n_d if OWN else item * 0
    past = first + 1 if OWN else first + n_q
    j = start + tl.arange(0, BLOCK_D)
    q_stride_n = aligned(q_stride_n, ALIGN)
    q_stride_l = aligned(q_stride_l, ALIGN)
    total = gather_won(
        q_ptr, q_inv_ptr, argmax_ptr, g_ptr, q_stride_n, q_stride_l, g_stride_n, g_stride_k, first, past, doc, n_d, l_q,
        j, columns, DIM, BLOCK_D, BLOCK_R, BLOCK_K, NORM, False, PRECISION, COMPUTE, ACC,
    )  # fmt: skip
    # 0 times a NaN or infinity is a NaN that this token never won: once more, looking at who won
    if tl.sum((total != total).to(tl.int32)) > 0:
        total = gather_won(
            q_ptr, q_inv_ptr, argmax_ptr, g_ptr, q_stride_n, q_stride_l, g_stride_n, g_stride_k, first, past, doc, n_d,
            l_q, j, columns, DIM, BLOCK_D, BLOCK_R, BLOCK_K, NORM, True, PRECISION, COMPUTE, ACC,
        )  # fmt: skip
    ok = j < l_d
    if PROJECT:
        x = load_rows(
            d_ptr + first * d_stride_n + doc * d_stride_k, j.to(tl.int64), ok, columns, d_stride_l, DIM,
            DIM == BLOCK_K, False,
        ).to(ACC)  # fmt: skip
        total = through_norm(x, tl.load(d_inv_ptr + item * l_d + j, mask=ok, other=0.0), total)
    out = out_ptr + (item * l_d + j[:, None].to(tl.int64)) * DIM + columns[None, :]
    tl.store(out, total, mask=ok[:, None] & (columns < DIM)[None, :])


@triton.jit(do_not_specialize=["stride_n", "stride_k", "stride_l", "k", "length", "rows"])
def through_norm_kernel(
    x_ptr,  # [n, k, length, dim]
    inv_ptr,  # [n * k * length]
    g_ptr,  # [n, k, length, dim] contiguous
    out_ptr,  # [n, k, length, dim] contiguous
    stride_n, stride_k, stride_l, k, length, rows,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_K)
    ok = (row < rows)[:, None] & (columns < DIM)[None, :]
    base = x_ptr + (row // length // k * stride_n + row // length % k * stride_k + row % length * stride_l)
    x = tl.load(base[:, None] + columns[None, :], mask=ok, other=0.0).to(ACC)
    g = tl.load(g_ptr + row[:, None] * DIM + columns[None, :], mask=ok, other=0.0).to(ACC)
    inv = tl.load(inv_ptr + row, mask=row < rows, other=0.0)
    tl.store(out_ptr + row[:, None] * DIM + columns[None, :], through_norm(x, inv, g), mask=ok)
