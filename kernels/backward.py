"""Backward from the recorded winners: two kernels without atomics, so gradients repeat bit for bit.

grad_q[i] = Σ_docs g · d[winner(i)]        gather: a program owns query tokens
grad_d[j] = Σ_{i : winner(i) = j} g · q[i]  one-hot products: a program owns document tokens
"""

import triton
import triton.language as tl

from latemax.kernels.common import aligned, load_rows, slot_owner, span, wide


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
        "n_q", "n_d", "l_q", "l_d", "splits", "documents",
    ],
    do_not_specialize_on_alignment=["g_ptr", "owner_ptr", "cu_d_ptr", "candidates_ptr"],
)  # fmt: skip
def grad_q_kernel(
    d_ptr,  # [n_q, n_d, l_d, dim], or if D_RAGGED [l_d, dim]; stride of n_q 0 where all queries share the documents
    d_inv_ptr,  # [n_q * n_d * l_d] ([n_d * l_d] where shared), or [l_d]
    argmax_ptr,  # [n_q, n_d, l_q] int32, or if Q_RAGGED [n_d, l_q]
    g_ptr,  # [n_q, n_d] gradient of the scores
    out_ptr,  # [splits, n_q, l_q, dim]
    owner_ptr,  # [l_q] int64, if Q_RAGGED: the query of every token; n_q is 1 then
    cu_d_ptr,  # [documents + 1] int64, if D_RAGGED
    candidates_ptr,  # [n_q, n_d] int64, if CANDIDATES
    d_stride_n, d_stride_k, d_stride_l, d_inv_stride_n, g_stride_n, g_stride_k,
    n_q, n_d, l_q, l_d, splits, documents,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    Q_RAGGED: tl.constexpr, D_RAGGED: tl.constexpr, CANDIDATES: tl.constexpr,
    NORM: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program sums one block of query tokens over every splits-th document."""
    blocks = tl.cdiv(l_q, BLOCK_R)
    pid = tl.program_id(0)
    token = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = (pid // blocks) % splits
    item = (pid // blocks // splits).to(tl.int64)
    query = item
    if Q_RAGGED:
        query = tl.load(owner_ptr + token, mask=token < l_q, other=0)
    columns = tl.arange(0, BLOCK_K)
    column_ok = columns < DIM
    d_stride_n = aligned(d_stride_n, ALIGN)
    d_stride_k = aligned(d_stride_k, ALIGN)
    d_stride_l = aligned(d_stride_l, ALIGN)
    total = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    for step in range(split, n_d, splits):
        doc = wide(step)
        # item is 0 where tokens lie end to end
        at = argmax_ptr + (item * n_d + doc) * l_q + token
        winner = tl.load(at, mask=token < l_q, other=-1).to(tl.int64)
        won = winner >= 0
        weight = tl.load(g_ptr + query * g_stride_n + doc * g_stride_k).to(ACC)
        if D_RAGGED:
            number = doc
            if CANDIDATES:
                number = tl.load(candidates_ptr + query * n_d + doc)
            row = tl.load(cu_d_ptr + number, mask=(number >= 0) & (number < documents), other=0) + winner
            offset = row * d_stride_l
        else:
            row = query * d_inv_stride_n + doc * l_d + winner
            offset = query * d_stride_n + doc * d_stride_k + winner * d_stride_l
        x = tl.load(
            d_ptr + offset[:, None] + columns[None, :], mask=won[:, None] & column_ok[None, :], other=0.0
        ).to(ACC)  # fmt: skip
        if NORM:
            x *= tl.load(d_inv_ptr + row, mask=won, other=0.0)[:, None]
        total += x * tl.where(won, weight, 0.0)[:, None]
    out = out_ptr + ((split * n_q + item) * l_q + token[:, None].to(tl.int64)) * DIM + columns[None, :]
    tl.store(out, total, mask=(token < l_q)[:, None] & column_ok[None, :])


@triton.jit
def gather_won(
    q_ptr, q_inv_ptr, argmax_ptr, g_ptr, cu_q_ptr, q_stride_n, q_stride_l, g_stride_n, g_stride_k, first, past, doc,
    n_d, l_q, j, columns,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    Q_RAGGED: tl.constexpr, NORM: tl.constexpr, GUARD: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of g · q over the query tokens that document tokens j [BLOCK_D] won: [BLOCK_D, BLOCK_K].

    GUARD: nothing is added to a token that won nothing in a block of query tokens, not even 0 times a NaN or infinity.
    That look at the winners doubled the loop (464 issue slots a block instead of 235, with 4 warps).
    """
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_D, BLOCK_K], ACC)
    for query in range(first, past):
        weight = tl.load(g_ptr + query * g_stride_n + doc * g_stride_k).to(ACC)
        if Q_RAGGED:
            q_row, q_past = span(cu_q_ptr, wide(query), wide(query) >= 0, l_q)
            q_len = (q_past - q_row).to(tl.int32)
            q_base = q_ptr + q_row * q_stride_l
            winners = argmax_ptr + doc * l_q + q_row
        else:
            q_row = wide(query) * l_q
            q_len = l_q
            q_base = q_ptr + query * q_stride_n
            winners = argmax_ptr + (query * n_d + doc) * l_q
        for token in range(0, q_len, BLOCK_R):
            i = token + r
            winner = tl.load(winners + i, mask=i < q_len, other=-1)
            rows = load_rows(
                q_base, i.to(tl.int64), winner >= 0, columns, q_stride_l, DIM, DIM % BLOCK_K == 0, False
            )  # fmt: skip
            if NORM:
                inv = tl.load(q_inv_ptr + q_row + i, mask=winner >= 0, other=0.0)
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
        "n_q", "n_d", "l_q", "l_d", "blocks",
    ],
    do_not_specialize_on_alignment=["g_ptr", "cu_q_ptr", "cu_d_ptr"],
)  # fmt: skip
def grad_d_kernel(
    q_ptr,  # [n_q, l_q, dim], or if Q_RAGGED [l_q, dim]
    d_ptr,  # [n_q, n_d, l_d, dim], or if D_RAGGED [l_d, dim]; read only under NORM
    q_inv_ptr, d_inv_ptr,
    argmax_ptr,  # [n_q, n_d, l_q] int32, or if Q_RAGGED [n_d, l_q]
    g_ptr,  # [n_q, n_d]
    out_ptr,  # [n_q, n_d, l_d, dim] contiguous ([n_d, l_d, dim] where shared), or [l_d, dim]
    cu_q_ptr,  # [n_q + 1] int64, if Q_RAGGED
    cu_d_ptr,  # [n_d + 1] int64, if D_RAGGED
    q_stride_n, q_stride_l, d_stride_n, d_stride_k, d_stride_l, g_stride_n, g_stride_k,
    n_q, n_d, l_q, l_d, blocks,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    Q_RAGGED: tl.constexpr, D_RAGGED: tl.constexpr, OWN: tl.constexpr, NORM: tl.constexpr, PROJECT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program owns BLOCK_D tokens of one document, BLOCK_K columns of them, and walks over all the query tokens
    that met it. PROJECT: take the gradient through the norm here, where one program holds all columns.

    The one-hot product picks rows exactly; g multiplies the accumulator afterwards, in ACC, so that a half-precision
    gradient rounds once, at the end. A NaN or infinite g stays with the tokens that won; a NaN query token may reach
    the other winners of its block of BLOCK_R, never a token that won nothing.

    blocks: of BLOCK_D tokens, in a document, or if D_RAGGED the slots of slot_owner.
    """
    column_blocks: tl.constexpr = (DIM + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    columns = pid % column_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    q_stride_n = aligned(q_stride_n, ALIGN)
    q_stride_l = aligned(q_stride_l, ALIGN)
    d_stride_n = aligned(d_stride_n, ALIGN)
    d_stride_k = aligned(d_stride_k, ALIGN)
    d_stride_l = aligned(d_stride_l, ALIGN)
    block = pid // column_blocks % blocks
    if D_RAGGED:
        owner = slot_owner(cu_d_ptr, block, n_d, BLOCK_D)
        row, d_past = span(cu_d_ptr, owner, owner >= 0, l_d)
        d_len = (d_past - row).to(tl.int32)
        start = (block - (row // BLOCK_D).to(tl.int32) - owner) * BLOCK_D
        doc = owner.to(tl.int64)
        first = doc * 0
        d_base = d_ptr + row * d_stride_l
    else:
        item = (pid // column_blocks // blocks).to(tl.int64)
        doc = item % n_d
        first = item // n_d if OWN else item * 0
        row = item * l_d
        d_len = l_d
        start = block * BLOCK_D
        d_base = d_ptr + first * d_stride_n + doc * d_stride_k
    past = first + 1 if OWN else first + n_q
    j = start + tl.arange(0, BLOCK_D)
    total = gather_won(
        q_ptr, q_inv_ptr, argmax_ptr, g_ptr, cu_q_ptr, q_stride_n, q_stride_l, g_stride_n, g_stride_k, first, past, doc,
        n_d, l_q, j, columns, DIM, BLOCK_D, BLOCK_R, BLOCK_K, Q_RAGGED, NORM, False, PRECISION, COMPUTE, ACC,
    )  # fmt: skip
    # 0 times a NaN or infinity is a NaN that this token never won: once more, looking at who won
    if tl.sum((total != total).to(tl.int32)) > 0:
        total = gather_won(
            q_ptr, q_inv_ptr, argmax_ptr, g_ptr, cu_q_ptr, q_stride_n, q_stride_l, g_stride_n, g_stride_k, first, past,
            doc, n_d, l_q, j, columns, DIM, BLOCK_D, BLOCK_R, BLOCK_K, Q_RAGGED, NORM, True, PRECISION, COMPUTE, ACC,
        )  # fmt: skip
    ok = j < d_len
    if PROJECT:
        x = load_rows(d_base, j.to(tl.int64), ok, columns, d_stride_l, DIM, DIM == BLOCK_K, False).to(ACC)
        total = through_norm(x, tl.load(d_inv_ptr + row + j, mask=ok, other=0.0), total)
    out = out_ptr + (row + j[:, None].to(tl.int64)) * DIM + columns[None, :]
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
