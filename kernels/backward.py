"""Backward from the recorded argmax: two kernels without atomics, so gradients repeat bit for bit.

grad_q[i] = Σ_docs g · d[argmax(i)]         gather: a program owns query tokens
grad_d[j] = Σ_{i : argmax(i) = j} g · q[i]  one-hot products: a program owns document tokens
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from latemax.kernels.common import aligned, load_rows, slot_owner, span, wide
from latemax.kernels.items import Side


class Build(NamedTuple):
    """The constants of a grad_d build, all tl.constexpr."""

    DIM: Any
    BLOCK_D: Any  # document tokens that a program owns
    BLOCK_R: Any  # query tokens it takes at a time
    BLOCK_K: Any  # columns that it owns
    Q_RAGGED: Any
    D_RAGGED: Any
    CANDIDATES: Any  # scores.pairs says which queries met a document
    OWN: Any  # every query has documents of its own
    SCALED: Any  # q.inv holds a factor for every query token: its inverse norm, its weight, or both
    PROJECT: Any  # take the gradient through the norm in the same program, which then holds all columns
    PRECISION: Any  # of products of float32
    COMPUTE: Any  # dtype of the operands of products
    ACC: Any  # dtype of sums


class Scores(NamedTuple):
    """What the forward recorded and what came back: pointers, strides in elements."""

    argmax: Any  # [n_q, n_d, l_q] int32, or if Q_RAGGED [n_d, l_q]
    g: Any  # [n_q, n_d] gradient of the scores
    g_stride_n: Any
    g_stride_k: Any
    n_q: Any
    n_d: Any
    documents: Any  # if D_RAGGED: that offsets name
    pairs: Any  # [n_q * n_d, 2] int64, if CANDIDATES: query and column of g, sorted by document
    starts: Any  # [documents + 1] int64, if CANDIDATES: where the pairs of a document start


class Query(NamedTuple):
    """One query as a document met it."""

    base: Any  # pointer to its token 0
    row: Any  # its token 0 in q.inv, int64
    argmax: Any  # pointer to the argmax of its token 0
    length: Any  # its tokens


class Owned(NamedTuple):
    """The document tokens that a grad_d program owns, and the queries that met them."""

    doc: Any  # int64
    start: Any  # the first of BLOCK_D tokens, in the document
    row: Any  # the document's token 0 in out_ptr and d_inv_ptr
    length: Any  # tokens of the document
    base: Any  # pointer to its token 0
    first: Any  # the first query, or if CANDIDATES pair
    end: Any  # and their end


@triton.jit
def through_norm(x, inv, g):
    """Gradient of x / max(‖x‖, eps) given the gradient g of its output.

    x, g: [rows, dim]; inv: [rows], 1 / max(‖x‖, eps).

    A row with a norm below eps was divided by a constant, so nothing is projected out of its gradient. A row that is no
    argmax gets 0, whatever (a masked NaN) it holds.
    """
    chosen = tl.max((g != 0).to(tl.int32), 1) > 0
    unit = x * inv[:, None]
    along = tl.where(inv < 0.999e12, tl.sum(unit * g, 1), 0.0)
    return tl.where(chosen[:, None], (g - unit * along[:, None]) * inv[:, None], 0.0)


@triton.jit(
    do_not_specialize=[
        "d_stride_n", "d_stride_k", "d_stride_l", "d_inv_stride_n", "g_stride_n", "g_stride_k",
        "n_q", "n_d", "l_q", "l_d", "splits", "documents",
    ],
    do_not_specialize_on_alignment=["g_ptr", "owner_ptr", "d_offsets_ptr", "candidates_ptr"],
)  # fmt: skip
def grad_q_kernel(
    d_ptr,  # [n_q, n_d, l_d, dim], or if D_RAGGED [l_d, dim]; stride of n_q 0 where all queries share the documents
    d_inv_ptr,  # [n_q * n_d * l_d] ([n_d * l_d] where shared), or [l_d]
    argmax_ptr,  # [n_q, n_d, l_q] int32, or if Q_RAGGED [n_d, l_q]
    g_ptr,  # [n_q, n_d] gradient of the scores
    out_ptr,  # [splits, n_q, l_q, dim]
    owner_ptr,  # [l_q] int64, if Q_RAGGED: the query of every token; n_q is 1 then
    d_offsets_ptr,  # [documents + 1] int64, if D_RAGGED
    candidates_ptr,  # [n_q, n_d] int64, if CANDIDATES
    d_stride_n, d_stride_k, d_stride_l, d_inv_stride_n, g_stride_n, g_stride_k,
    n_q, n_d, l_q, l_d, splits, documents,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    Q_RAGGED: tl.constexpr, D_RAGGED: tl.constexpr, CANDIDATES: tl.constexpr,
    NORM: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program sums one block of query tokens over every ``splits``-th document."""
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
    # what does not change with the document
    argmax_ptr += item * n_d * l_q
    g_ptr += query * g_stride_n
    candidates_ptr += query * n_d
    total = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    for step in tl.range(split, n_d, splits, num_stages=4):
        doc = wide(step)
        # item is 0 if Q_RAGGED
        at = argmax_ptr + doc * l_q + token
        argmax = tl.load(at, mask=token < l_q, other=-1).to(tl.int64)
        ok = argmax >= 0
        weight = tl.load(g_ptr + doc * g_stride_k).to(ACC)
        if D_RAGGED:
            number = doc
            if CANDIDATES:
                number = tl.load(candidates_ptr + doc)
            row = tl.load(d_offsets_ptr + number, mask=(number >= 0) & (number < documents), other=0) + argmax
            offset = row * d_stride_l
        else:
            row = query * d_inv_stride_n + doc * l_d + argmax
            offset = query * d_stride_n + doc * d_stride_k + argmax * d_stride_l
        x = tl.load(
            d_ptr + offset[:, None] + columns[None, :], mask=ok[:, None] & column_ok[None, :], other=0.0
        ).to(ACC)  # fmt: skip
        if NORM:
            x *= tl.load(d_inv_ptr + row, mask=ok, other=0.0)[:, None]
        total += x * tl.where(ok, weight, 0.0)[:, None]
    out = out_ptr + ((split * n_q + item) * l_q + token[:, None].to(tl.int64)) * DIM + columns[None, :]
    tl.store(out, total, mask=(token < l_q)[:, None] & column_ok[None, :])


@triton.jit
def find_owned(pid, d, scores, blocks, B):
    """The document tokens of a program."""
    block = pid % blocks
    if B.D_RAGGED:
        owner = slot_owner(d.offsets, block, scores.documents, B.BLOCK_D)
        row, row_end = span(d.offsets, owner, owner >= 0, d.length)
        start = (block - (row // B.BLOCK_D).to(tl.int32) - owner) * B.BLOCK_D
        doc = owner.to(tl.int64)
        if B.CANDIDATES:
            first = tl.load(scores.starts + doc)
            end = tl.load(scores.starts + doc + 1)
        else:
            first = doc * 0
            end = first + scores.n_q
        return Owned(doc, start, row, (row_end - row).to(tl.int32), d.tokens + row * d.stride_l, first, end)
    else:
        item = (pid // blocks).to(tl.int64)
        doc = item % scores.n_d
        first = item // scores.n_d if B.OWN else item * 0
        end = first + 1 if B.OWN else first + scores.n_q
        base = d.tokens + first * d.stride_n + doc * d.stride_k
        return Owned(doc, block * B.BLOCK_D, item * d.length, d.length, base, first, end)


@triton.jit
def find_met(number, owned, scores, B):
    """(query, column of g) of the number that counts from owned.first to owned.end."""
    if B.CANDIDATES:
        pair = scores.pairs + 2 * wide(number)
        ok = wide(number) < owned.end
        return tl.load(pair, mask=ok, other=0), tl.load(pair + 1, mask=ok, other=0)
    else:
        return wide(number), owned.doc


@triton.jit
def find_query(query, column, q, scores, B):
    """Query ``query`` as the document in ``column`` of its row met it."""
    if B.Q_RAGGED:
        begin, end = span(q.offsets, query, query >= 0, q.length)
        argmax = scores.argmax + column * q.length + begin
        return Query(q.tokens + begin * q.stride_l, begin, argmax, (end - begin).to(tl.int32))
    else:
        argmax = scores.argmax + (query * scores.n_d + column) * q.length
        return Query(q.tokens + query * q.stride_n, query * q.length, argmax, q.length)


@triton.jit
def load_weight(query, column, scores, B):
    return tl.load(scores.g + query * scores.g_stride_n + column * scores.g_stride_k).to(B.ACC)


@triton.jit
def gather_block(query, token, weight, j, columns, q, GUARD: tl.constexpr, B):
    """[BLOCK_D, BLOCK_K]: what BLOCK_R query tokens from ``token`` on add to the gradient of the document tokens j."""
    i = tl.arange(0, B.BLOCK_R)
    ok = i < query.length - token
    argmax = tl.load(query.argmax + token + i, mask=ok, other=-1)
    if GUARD:
        ok = argmax >= 0
    # One pointer moves and the offsets of the rows stay: 249 instructions a block instead of 272.
    base = query.base + wide(token) * q.stride_l
    rows = load_rows(base, i.to(tl.int64), ok, columns, q.stride_l, B.DIM, B.DIM % B.BLOCK_K == 0, False)
    if B.SCALED:
        rows = rows.to(B.ACC) * tl.load(q.inv + query.row + token + i, mask=ok, other=0.0)[:, None]
    picked = argmax[None, :] == j[:, None]
    part = tl.dot(picked.to(B.COMPUTE), rows.to(B.COMPUTE), input_precision=B.PRECISION, out_dtype=B.ACC) * weight
    if GUARD:
        part = tl.where((tl.max(picked.to(tl.int32), 1) > 0)[:, None], part, 0.0)
    return part


@triton.jit
def gather(owned, j, columns, q, scores, GUARD: tl.constexpr, B):
    """Sum of g · q over the query tokens whose argmax is one of the document tokens j [BLOCK_D]: [BLOCK_D, BLOCK_K].

    GUARD: a token that is no argmax in a block of query tokens gets nothing from it, not even 0 times a NaN or
    infinity. Asking that of every block doubled the loop (464 issue slots a block instead of 235, with 4 warps), and
    rows that are read only where there is an argmax wait for it, so that no copy overlaps a product.

    Queries of one length are one flat loop over (query, block of its tokens), since only innermost loops are pipelined:
    a loop inside a loop starts anew for each query, and at l_q <= BLOCK_R overlaps nothing.
    """
    total = tl.zeros([B.BLOCK_D, B.BLOCK_K], B.ACC)
    if B.Q_RAGGED:
        for number in range(owned.first, owned.end):
            item, column = find_met(number, owned, scores, B)
            weight = load_weight(item, column, scores, B)
            query = find_query(item, column, q, scores, B)
            for token in range(0, query.length, B.BLOCK_R):
                total += gather_block(query, token, weight, j, columns, q, GUARD, B)
    else:
        number = owned.first
        token = 0
        item, column = find_met(number, owned, scores, B)
        for _ in range((owned.end - owned.first).to(tl.int32) * tl.cdiv(q.length, B.BLOCK_R)):
            weight = load_weight(item, column, scores, B)
            query = find_query(item, column, q, scores, B)
            total += gather_block(query, token, weight, j, columns, q, GUARD, B)
            # carried, since dividing the step by the blocks of a query took 24 instructions more
            token += B.BLOCK_R
            number = tl.where(token < q.length, number, number + 1)
            token = tl.where(token < q.length, token, 0)
            # one step early: what it waits for comes while this block is multiplied
            item, column = find_met(number, owned, scores, B)
    return total


@triton.jit
def grad_d(pid, q, d, scores, out_ptr, blocks, B):
    """Writes the gradient of BLOCK_D document tokens, BLOCK_K columns of them."""
    column_blocks: tl.constexpr = (B.DIM + B.BLOCK_K - 1) // B.BLOCK_K
    columns = pid % column_blocks * B.BLOCK_K + tl.arange(0, B.BLOCK_K)
    owned = find_owned(pid // column_blocks, d, scores, blocks, B)
    j = owned.start + tl.arange(0, B.BLOCK_D)
    total = gather(owned, j, columns, q, scores, False, B)
    # 0 times a NaN or infinity is a NaN that belongs to another token, or to a masked query token: once more, with the
    # guard.
    if tl.sum((total != total).to(tl.int32)) > 0:
        total = gather(owned, j, columns, q, scores, True, B)
    ok = j < owned.length
    if B.CANDIDATES:
        # the gradient of a document that no candidate names is 0 already
        ok = j < tl.where(owned.first < owned.end, owned.length, 0)
    if B.PROJECT:
        x = load_rows(owned.base, j.to(tl.int64), ok, columns, d.stride_l, B.DIM, B.DIM == B.BLOCK_K, False).to(B.ACC)
        total = through_norm(x, tl.load(d.inv + owned.row + j, mask=ok, other=0.0), total)
    out = out_ptr + (owned.row + j[:, None].to(tl.int64)) * B.DIM + columns[None, :]
    tl.store(out, total, mask=ok[:, None] & (columns < B.DIM)[None, :])


@triton.jit(
    do_not_specialize=[
        "q_stride_n", "q_stride_l", "d_stride_n", "d_stride_k", "d_stride_l", "g_stride_n", "g_stride_k",
        "n_q", "n_d", "l_q", "l_d", "blocks", "documents",
    ],
    do_not_specialize_on_alignment=["g_ptr", "q_offsets_ptr", "d_offsets_ptr", "pairs_ptr", "starts_ptr"],
)  # fmt: skip
def grad_d_kernel(
    q_ptr,  # [n_q, l_q, dim], or if Q_RAGGED [l_q, dim]
    d_ptr,  # [n_q, n_d, l_d, dim], or if D_RAGGED [l_d, dim]; read only if PROJECT
    q_inv_ptr,  # [n_q * l_q], or [l_q]: factors of the query tokens, if SCALED
    d_inv_ptr,  # inverse norms, if PROJECT
    argmax_ptr,  # [n_q, n_d, l_q] int32, or if Q_RAGGED [n_d, l_q]
    g_ptr,  # [n_q, n_d]
    out_ptr,  # [n_q, n_d, l_d, dim] contiguous ([n_d, l_d, dim] where shared), or [l_d, dim]
    q_offsets_ptr,  # [n_q + 1] int64, if Q_RAGGED
    d_offsets_ptr,  # [documents + 1] int64, if D_RAGGED
    pairs_ptr,  # [n_q * n_d, 2] int64, if CANDIDATES: query and column, sorted by the document that the candidate names
    starts_ptr,  # [documents + 1] int64, if CANDIDATES: where the pairs of each document start
    q_stride_n, q_stride_l, d_stride_n, d_stride_k, d_stride_l, g_stride_n, g_stride_k,
    n_q, n_d, l_q, l_d, blocks, documents,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    Q_RAGGED: tl.constexpr, D_RAGGED: tl.constexpr, CANDIDATES: tl.constexpr, OWN: tl.constexpr,
    SCALED: tl.constexpr, PROJECT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program owns BLOCK_D tokens of one document, BLOCK_K columns of them, and walks over all the query tokens
    that met it.

    The one-hot product picks rows exactly. g multiplies the accumulator afterwards, in ACC, so that a half-precision
    gradient rounds once, at the end. A NaN or infinite g stays with its own tokens. A NaN query token may reach the
    other argmax tokens of its block of BLOCK_R, never a token that is no argmax.

    blocks: of BLOCK_D tokens, in a document, or if D_RAGGED the slots of slot_owner.
    """
    grad_d(
        tl.program_id(0),
        Side(
            tokens=q_ptr, mask=0, inv=q_inv_ptr, error=0, offsets=q_offsets_ptr,
            stride_n=aligned(q_stride_n, ALIGN), stride_k=0, stride_l=aligned(q_stride_l, ALIGN),
            mask_stride_n=0, mask_stride_k=0, mask_stride_l=0, inv_stride_n=0, length=l_q,
        ),
        Side(
            tokens=d_ptr, mask=0, inv=d_inv_ptr, error=0, offsets=d_offsets_ptr, stride_n=aligned(d_stride_n, ALIGN),
            stride_k=aligned(d_stride_k, ALIGN), stride_l=aligned(d_stride_l, ALIGN),
            mask_stride_n=0, mask_stride_k=0, mask_stride_l=0, inv_stride_n=0, length=l_d,
        ),
        Scores(argmax_ptr, g_ptr, g_stride_n, g_stride_k, n_q, n_d, documents, pairs_ptr, starts_ptr),
        out_ptr, blocks,
        Build(
            DIM, BLOCK_D, BLOCK_R, BLOCK_K, Q_RAGGED, D_RAGGED, CANDIDATES, OWN, SCALED, PROJECT, PRECISION, COMPUTE,
            ACC,
        ),
    )  # fmt: skip


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
