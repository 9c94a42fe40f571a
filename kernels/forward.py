"""Forward: one program scores one document against a tile of query tokens and never writes a similarity to memory.

The running maximum stays elementwise, [BLOCK_D, BLOCK_Q] against [BLOCK_D, BLOCK_Q], inside the loop over document
tiles; lanes meet once, after it. See kernels/README.md for the picture.
"""

import triton
import triton.language as tl

from latemax.kernels.common import (
    aligned,
    inverse,
    inverse_norm,
    load_rows,
    nan_max,
    row_max,
    same_bits,
    slot_owner,
    span,
    sum_of_squares,
    wide,
)


@triton.jit
def step(
    best, tile, start, hi, masked_hi,
    q_base, q_rows, q_ok, q_tile, q_stride,
    d_base, d_stride, d_inv_base, d_mask_base, d_mask_stride,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    FULL: tl.constexpr, D_MASKED: tl.constexpr, NORM: tl.constexpr, ARGMAX: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One document tile: its similarities, and the running maximum with them.

    Tiles are [BLOCK_D, BLOCK_Q] if SWAP else [BLOCK_Q, BLOCK_D]; ``tile`` keeps the start of the tile that holds each
    element's maximum. FULL: all BLOCK_D tokens from ``start`` lie before ``hi``. q_tile: transposed if SWAP.
    masked_hi: ``hi`` where a token before it is masked, else 0.
    """
    columns = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_D).to(tl.int64)
    ok = start + j < hi
    base = d_base + wide(start) * d_stride
    if D_MASKED:
        # before the product, which hides it; a mask without holes, as of padding, costs no selection (218 instructions
        # a tile instead of 285; a second loop without the mask took 190, but its own shared memory too)
        keep = tl.load(d_mask_base + (start + j) * d_mask_stride, mask=start + j < masked_hi, other=0) != 0
    if DIM <= BLOCK_K:
        d = load_rows(base, j, ok, columns, d_stride, DIM, DIM == BLOCK_K, FULL)
        if SWAP:
            s = tl.dot(d.to(COMPUTE), q_tile, input_precision=PRECISION, out_dtype=ACC)
        else:
            s = tl.dot(q_tile, tl.trans(d.to(COMPUTE)), input_precision=PRECISION, out_dtype=ACC)
        if NORM == 1:
            inv = inverse_norm(d, ACC)
            s *= inv[:, None] if SWAP else inv[None, :]
    else:
        s = tl.zeros([BLOCK_D, BLOCK_Q] if SWAP else [BLOCK_Q, BLOCK_D], ACC)
        squares = tl.zeros([BLOCK_D], ACC)
        for k in range(0, DIM, BLOCK_K):
            d = load_rows(base, j, ok, k + columns, d_stride, DIM, DIM % BLOCK_K == 0, FULL)
            if NORM == 1:
                squares += sum_of_squares(d, ACC)
            d = d.to(COMPUTE)
            q = load_rows(q_base, q_rows, q_ok, k + columns, q_stride, DIM, DIM % BLOCK_K == 0, False).to(COMPUTE)
            if SWAP:
                s = tl.dot(d, tl.trans(q), s, input_precision=PRECISION, out_dtype=ACC)
            else:
                s = tl.dot(q, tl.trans(d), s, input_precision=PRECISION, out_dtype=ACC)
        if NORM == 1:
            inv = inverse(squares)
            s *= inv[:, None] if SWAP else inv[None, :]
    if NORM == 2:
        inv = tl.load(d_inv_base + start + j, mask=ok, other=0.0)
        s *= inv[:, None] if SWAP else inv[None, :]
    if D_MASKED:
        if masked_hi > 0:
            s = tl.where(keep[:, None] if SWAP else keep[None, :], s, float("-inf"))
    if not FULL:
        s = tl.where(ok[:, None] if SWAP else ok[None, :], s, float("-inf"))
    new = nan_max(best, s)
    if ARGMAX:
        tile = tl.where(same_bits(new, s), start, tile)
    return new, tile


# Integers are compiled for no particular value: one build serves every count and length, so that a call after warmup,
# inside a graph capture too, never compiles. What alignment brings, ALIGN says.
@triton.jit(
    do_not_specialize=[
        "q_stride_n", "q_stride_l", "d_stride_n", "d_stride_k", "d_stride_l",
        "q_mask_stride_n", "q_mask_stride_l", "d_mask_stride_n", "d_mask_stride_k", "d_mask_stride_l",
        "d_inv_stride_n", "n_q", "n_d", "l_q", "l_d", "chunks", "documents",
    ],
    do_not_specialize_on_alignment=["q_mask_ptr", "d_mask_ptr", "cu_q_ptr", "cu_d_ptr", "candidates_ptr"],
)  # fmt: skip
def forward_kernel(
    q_ptr,  # [n_q, l_q, dim], or if Q_RAGGED [l_q, dim]
    d_ptr,  # [n_q, n_d, l_d, dim], or if D_RAGGED [l_d, dim]; stride of n_q 0 where all queries share the documents
    q_mask_ptr,  # [n_q, l_q] bool, or [l_q]
    d_mask_ptr,  # [n_q, n_d, l_d] bool, or [l_d]
    q_inv_ptr,  # [n_q * l_q] inverse norms, or [l_q]
    d_inv_ptr,  # [n_q * n_d * l_d] inverse norms ([n_d * l_d] where shared), or [l_d]
    scores_ptr,  # [chunks, n_q, n_d], or if Q_RAGGED [chunks, n_d]: parts of a query's score
    argmax_ptr,  # [n_q, n_d, l_q] int32, or if Q_RAGGED [n_d, l_q]
    cu_q_ptr,  # [n_q + 1] int64, if Q_RAGGED
    cu_d_ptr,  # [documents + 1] int64, if D_RAGGED
    candidates_ptr,  # [n_q, n_d] int64, if CANDIDATES: which documents, -1 for none
    q_stride_n, q_stride_l, d_stride_n, d_stride_k, d_stride_l,
    q_mask_stride_n, q_mask_stride_l, d_mask_stride_n, d_mask_stride_k, d_mask_stride_l, d_inv_stride_n,
    n_q, n_d, l_q, l_d, chunks, documents, empty_score: tl.float64,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PACK: tl.constexpr, SWAP: tl.constexpr,
    Q_RAGGED: tl.constexpr, D_RAGGED: tl.constexpr, CANDIDATES: tl.constexpr,
    Q_MASKED: tl.constexpr, D_MASKED: tl.constexpr, NORM: tl.constexpr, ARGMAX: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """PACK queries share a tile of BLOCK_Q rows, BLOCK_Q / PACK tokens each; a longer query is cut in chunks of
    BLOCK_Q, one program each (a loop over chunks cost 255 registers and spills where one chunk takes 102).

    Q_RAGGED, D_RAGGED: tokens lie end to end; l_q, l_d count them all. A tile then holds tokens of one query alone, and
    ``chunks`` are the slots of slot_owner.
    NORM: 0 none, 1 document norms from the tile itself (a tile read once), 2 from q_inv_ptr and d_inv_ptr (reused).
    ALIGN: the number of elements that every row stride is a multiple of.
    """
    L: tl.constexpr = BLOCK_Q // PACK
    AXIS: tl.constexpr = 0 if SWAP else 1
    q_stride_l = aligned(q_stride_l, ALIGN)
    d_stride_l = aligned(d_stride_l, ALIGN)
    q_stride_n = aligned(q_stride_n, ALIGN)
    d_stride_n = aligned(d_stride_n, ALIGN)
    d_stride_k = aligned(d_stride_k, ALIGN)

    # query tiles of one document run side by side, so that it comes from memory once and from L2 after that
    pid = tl.program_id(0)
    if Q_RAGGED:
        slot = pid % chunks
        q_first = slot_owner(cu_q_ptr, slot, n_q, BLOCK_Q)
        q_begin, q_past = span(cu_q_ptr, q_first, q_first >= 0, l_q)
        q_len = (q_past - q_begin).to(tl.int32)
        chunk = slot - (q_begin // BLOCK_Q).to(tl.int32) - q_first
        doc = (pid // chunks).to(tl.int64)
    else:
        q_tiles = tl.cdiv(n_q, PACK)
        q_first = (pid % q_tiles) * PACK
        q_len = l_q
        chunk = pid // q_tiles % chunks
        doc = (pid // q_tiles // chunks).to(tl.int64)
    broken = False
    if D_RAGGED:
        number = doc
        if CANDIDATES:
            number = tl.load(candidates_ptr + q_first.to(tl.int64) * n_d + doc)
            broken = (number < -1) | (number >= documents)
        d_begin, d_past = span(cu_d_ptr, number, (number >= 0) & (number < documents), l_d)
        d_len = (d_past - d_begin).to(tl.int32)
        d_base = d_ptr + d_begin * d_stride_l
        d_inv_base = d_inv_ptr + d_begin
        d_mask_base = d_mask_ptr + d_begin * d_mask_stride_l
    else:
        d_len = l_d
        d_base = d_ptr + q_first.to(tl.int64) * d_stride_n + doc * d_stride_k
        d_inv_base = d_inv_ptr + q_first.to(tl.int64) * d_inv_stride_n + doc * l_d
        d_mask_base = d_mask_ptr + q_first.to(tl.int64) * d_mask_stride_n + doc * d_mask_stride_k

    # first and past-the-last valid document token: masked tiles before and behind are never read; and whether some
    # token between is masked
    lo = d_len * 0
    hi = d_len
    masked_hi = 0
    if D_MASKED:
        lo = d_len
        hi = d_len * 0
        count = d_len * 0
        for start in range(0, d_len, 1024):
            j = start + tl.arange(0, 1024).to(tl.int64)
            keep = tl.load(d_mask_base + j * d_mask_stride_l, mask=j < d_len, other=0) != 0
            count += tl.sum(keep.to(tl.int32), 0)
            lo = tl.minimum(lo, tl.min(tl.where(keep, j, d_len), 0).to(tl.int32))
            hi = tl.maximum(hi, tl.max(tl.where(keep, j + 1, 0), 0).to(tl.int32))
        masked_hi = tl.where(count < hi - lo, hi, 0)
    full_end = lo + tl.maximum(hi - lo, 0) // BLOCK_D * BLOCK_D

    r = tl.arange(0, BLOCK_Q)
    j = tl.arange(0, BLOCK_D).to(tl.int64)
    query = (q_first + r // L).to(tl.int64)
    token = chunk * L + r % L
    q_ok = (query < n_q) & (token < q_len)
    q_rows = token.to(tl.int64)
    if Q_RAGGED:
        q_base = q_ptr + (query[:, None] * 0 + q_begin) * q_stride_l
        q_inv_base = q_inv_ptr + query * 0 + q_begin
        q_mask_base = q_mask_ptr + (query * 0 + q_begin) * q_mask_stride_l
    else:
        q_base = q_ptr + query[:, None] * q_stride_n
        q_inv_base = q_inv_ptr + query * l_q
        q_mask_base = q_mask_ptr + query * q_mask_stride_n
    q_tile = tl.zeros([BLOCK_Q, BLOCK_K], COMPUTE)
    q_inv = tl.full([BLOCK_Q], 1.0, ACC)
    if DIM <= BLOCK_K:
        q_raw = load_rows(
            q_base, q_rows, q_ok, tl.arange(0, BLOCK_K), q_stride_l, DIM, DIM == BLOCK_K, False
        )  # fmt: skip
        q_tile = q_raw.to(COMPUTE)
        if NORM == 1:
            q_inv = inverse_norm(q_raw, ACC)
    if NORM == 2 or (NORM == 1 and DIM > BLOCK_K):
        q_inv = tl.load(q_inv_base + token, mask=q_ok, other=0.0)

    if SWAP:
        # here and not at the product: there it was stored to shared memory again for every document tile
        q_tile = tl.trans(q_tile)
    best = tl.full([BLOCK_D, BLOCK_Q] if SWAP else [BLOCK_Q, BLOCK_D], float("-inf"), ACC)
    tile = tl.zeros([BLOCK_D, BLOCK_Q] if SWAP else [BLOCK_Q, BLOCK_D], tl.int32)
    # backwards, so that the last tile to equal the maximum is the first in the document: same_bits then needs the new
    # maximum alone, which replaces the old one in place (307 instructions a tile instead of 371)
    if full_end < hi:
        best, tile = step(
            best, tile, full_end, hi, masked_hi, q_base, q_rows, q_ok, q_tile, q_stride_l,
            d_base, d_stride_l, d_inv_base, d_mask_base, d_mask_stride_l,
            DIM, BLOCK_Q, BLOCK_D, BLOCK_K, SWAP, False, D_MASKED, NORM, ARGMAX, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
    for done in range(lo, full_end, BLOCK_D):
        best, tile = step(
            best, tile, full_end - BLOCK_D - (done - lo), hi, masked_hi, q_base, q_rows, q_ok, q_tile, q_stride_l,
            d_base, d_stride_l, d_inv_base, d_mask_base, d_mask_stride_l,
            DIM, BLOCK_Q, BLOCK_D, BLOCK_K, SWAP, True, D_MASKED, NORM, ARGMAX, COMPUTE, ACC, PRECISION,
        )  # fmt: skip

    value = row_max(best, AXIS)  # [BLOCK_Q]
    keep_q = q_ok
    if Q_MASKED:
        keep_q = tl.load(q_mask_base + q_rows * q_mask_stride_l, mask=q_ok, other=0) != 0
    if ARGMAX:
        position = tile + (j[:, None] if SWAP else j[None, :]).to(tl.int32)
        hit = (best == (value[None, :] if SWAP else value[:, None])) | (best != best)
        winner = tl.min(tl.where(hit, position, 2147483647), AXIS)
        # where every valid similarity is -inf nothing ever beat the initial value: the first valid token wins
        winner = tl.where(value == float("-inf"), lo, winner)
        winner = tl.where(keep_q & (hi > 0), winner, -1)
        if Q_RAGGED:
            tl.store(argmax_ptr + doc * l_q + q_begin + token, winner, mask=q_ok)
        else:
            tl.store(argmax_ptr + (query * n_d + doc) * l_q + token, winner, mask=q_ok)
    if NORM > 0:
        value *= q_inv
    total = tl.sum(tl.reshape(tl.where(keep_q, value, 0.0), [PACK, L]), 1)

    p = q_first + tl.arange(0, PACK)
    if hi == 0:
        # an empty document: the first chunk answers for the whole query, the others add nothing
        if Q_MASKED:
            counted = tl.zeros([PACK], tl.int32)
            for start in range(0, q_len, L):
                token = start + r % L
                keep_q = tl.load(
                    q_mask_base + token.to(tl.int64) * q_mask_stride_l, mask=(query < n_q) & (token < q_len), other=0
                ) != 0  # fmt: skip
                counted += tl.sum(tl.reshape(keep_q.to(tl.int32), [PACK, L]), 1)
            total = tl.where((counted > 0) & (chunk == 0), empty_score, 0.0).to(ACC)
        else:
            total = tl.zeros([PACK], ACC) + tl.where(chunk == 0, empty_score, 0.0).to(ACC)
    if CANDIDATES:
        # no number of a document: said loudly, where refusing would have to wait for the device
        total = tl.where(broken, float("nan"), total)
    if Q_RAGGED:
        tl.store(scores_ptr + slot.to(tl.int64) * n_d + doc + p * 0, total)
    else:
        tl.store(scores_ptr + (chunk.to(tl.int64) * n_q + p) * n_d + doc, total, mask=p < n_q)


@triton.jit(do_not_specialize=["n_q", "n_d", "t_q", "slots"], do_not_specialize_on_alignment=["cu_q_ptr"])
def sum_slots_kernel(
    parts_ptr,  # [slots, n_d]
    cu_q_ptr,  # [n_q + 1] int64
    scores_ptr,  # [n_q, n_d]
    n_q, n_d, t_q, slots,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores of queries that lie end to end: the sum of each query's slots, in order."""
    query = (tl.program_id(0) % n_q).to(tl.int64)
    doc = tl.program_id(0) // n_q * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    first, past = span(cu_q_ptr, query, query >= 0, t_q)
    slot = first // BLOCK_Q + query
    total = tl.zeros([BLOCK], ACC)
    end = tl.minimum(slot + (past - first + BLOCK_Q - 1) // BLOCK_Q, slots)
    for i in range(slot, end):
        total += tl.load(parts_ptr + wide(i) * n_d + doc, mask=doc < n_d, other=0.0)
    tl.store(scores_ptr + query * n_d + doc, total, mask=doc < n_d)


@triton.jit(do_not_specialize=["stride_n", "stride_k", "stride_l", "k", "length", "rows"])
def inverse_norm_kernel(
    x_ptr,  # [n, k, length, dim]
    out_ptr,  # [n * k * length]
    stride_n, stride_k, stride_l, k, length, rows,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """1 / max(‖token‖₂, 1e-12) of every token."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = row < rows
    base = x_ptr + (
        (row // length // k) * aligned(stride_n, ALIGN)
        + (row // length % k) * aligned(stride_k, ALIGN)
        + (row % length) * aligned(stride_l, ALIGN)
    )  # fmt: skip
    total = tl.zeros([BLOCK_R], ACC)
    for start in range(0, DIM, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(base[:, None] + columns[None, :], mask=ok[:, None] & (columns < DIM)[None, :], other=0.0).to(ACC)
        total += tl.sum(x * x, 1)
    tl.store(out_ptr + row, 1.0 / tl.maximum(tl.sqrt(total), 1e-12), mask=ok)
