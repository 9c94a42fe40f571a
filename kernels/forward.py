"""Forward: one program scores one document with a tile of query tokens and never writes a similarity to memory.

The running maximum stays elementwise in the loop over document tiles, [BLOCK_D, BLOCK_Q] with [BLOCK_D, BLOCK_Q]; lanes
are reduced once, after it. kernels/README.md has the picture.
"""

import triton
import triton.language as tl

from latemax.kernels.bounds import bound_sums, code_bounds, with_norms
from latemax.kernels.common import (
    NO_NORM,
    NORM_BEFORE,
    NORM_IN_TILE,
    NUMBERS,
    aligned,
    inverse,
    nan_max,
    row_max,
    same_bits,
    span,
    sum_of_squares,
    wide,
)
from latemax.kernels.items import Build, Side, find_document, find_item, find_kept, find_queries
from latemax.kernels.products import (
    code_factors,
    load_document_rows,
    load_queries,
    load_query_tile,
    multiply,
    operands,
)


@triton.jit
def along_documents(x, B):
    """A [BLOCK_D] vector, to be broadcast over a tile of similarities."""
    if B.SWAP:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def along_queries(x, B):
    """A [BLOCK_Q] vector, likewise."""
    if B.SWAP:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def full_tile(value, dtype, B):
    """A tile of similarities filled with a value."""
    if B.SWAP:
        return tl.full([B.BLOCK_D, B.BLOCK_Q], value, dtype)
    else:
        return tl.full([B.BLOCK_Q, B.BLOCK_D], value, dtype)


@triton.jit
def similarities(start, ok, q_tile, q, q_stride, d, FULL: tl.constexpr, B):
    """The query tile with BLOCK_D document tokens from ``start``: (similarities, scaled by document norms; if BOUNDS
    a + ε · b and b of latemax.kernels.bounds)."""
    j = tl.arange(0, B.BLOCK_D).to(tl.int64)
    base = d.base + wide(start) * d.stride
    squares = tl.zeros([B.BLOCK_D], B.ACC)
    s = full_tile(0, tl.int32 if B.Q_CODES else B.ACC, B)
    if B.DIM <= B.BLOCK_K:
        rows = load_document_rows(base, j, ok, 0, d.stride, FULL, B)
        s = multiply(rows, q_tile[0], q_tile[1], s, B)
        if B.NORM == NORM_IN_TILE or with_norms(B):
            squares = sum_of_squares(rows, B.ACC)
    else:
        for k in range(0, B.DIM, B.BLOCK_K):
            rows = load_document_rows(base, j, ok, k, d.stride, FULL, B)
            if B.NORM == NORM_IN_TILE or with_norms(B):
                squares += sum_of_squares(rows, B.ACC)
            q_rows = operands(load_queries(q, k, q_stride, B), B.SWAP, B)
            s = multiply(rows, q_rows[0], q_rows[1], s, B)
    apart, length = squares, squares
    if B.D_CODES != NUMBERS:
        factor = tl.load(d.inv + start + j, mask=ok, other=0.0)
        if B.BOUNDS:
            error = tl.load(d.error + start + j, mask=ok, other=0.0)
            factor, apart, length = code_bounds(factor, error, squares, B)
        else:
            factor = code_factors(factor, squares, B)
        s = s.to(B.ACC) * along_documents(factor, B)
    elif B.NORM == NORM_IN_TILE:
        s *= along_documents(inverse(squares), B)
    elif B.NORM == NORM_BEFORE:
        s *= along_documents(tl.load(d.inv + start + j, mask=ok, other=0.0), B)
    return s, apart, length


@triton.jit
def step(best, second, start, q_tile, q, q_stride, d, kept, FULL: tl.constexpr, B):
    """One document tile: its similarities, and the running maximum with them.

    ``second`` keeps the start of the document tile that holds each element's maximum; if BOUNDS ``best`` is that of
    lower bounds and ``second`` that of upper ones. FULL: all BLOCK_D tokens from ``start`` are before kept.hi.
    """
    j = start + tl.arange(0, B.BLOCK_D).to(tl.int64)
    # 32 bits wide: the bound of a row and of an element is one comparison
    ok = tl.arange(0, B.BLOCK_D) < kept.hi - start
    if B.D_MASKED:
        # Loaded before the product, which hides it. A mask without holes, as of padding, costs no selection (218
        # instructions a tile instead of 285; a second loop without the mask took 190, but its own shared memory too).
        keep = tl.load(d.mask + j * d.mask_stride, mask=j < kept.masked_hi, other=0) != 0
    s, apart, length = similarities(start, ok, q_tile, q, q_stride, d, FULL, B)
    if B.D_MASKED:
        if kept.masked_hi > 0:
            s = tl.where(along_documents(keep, B), s, float("-inf"))
            if B.BOUNDS:
                # a masked token's may be infinite, and -inf + inf is NaN
                apart, length = tl.where(keep, apart, 0.0), tl.where(keep, length, 0.0)
    if not FULL:
        s = tl.where(along_documents(ok, B), s, float("-inf"))
    if B.BOUNDS:
        radius = along_queries(q_tile[2], B) * along_documents(apart, B)
        if B.Q_CODES:
            radius += along_queries(q_tile[3], B) * along_documents(length, B)
        best, second = nan_max(best, s - radius), nan_max(second, s + radius)
    else:
        best = nan_max(best, s)
    if B.ARGMAX:
        second = tl.where(same_bits(best, s), start, second)
    return best, second


@triton.jit
def running_max(q_tile, q, q_stride, d, kept, B):
    """(elementwise maximum over all document tiles, start of the tile that holds it), or if BOUNDS the maxima of lower
    and of upper bounds.

    Tiles are walked backwards, so that the last one to equal the maximum is the first in the document: same_bits then
    needs the new maximum only, which replaces the old one in place (307 instructions a tile instead of 371).
    """
    best = full_tile(float("-inf"), B.ACC, B)
    if B.BOUNDS:
        second = full_tile(float("-inf"), B.ACC, B)
    else:
        second = full_tile(0, tl.int32, B)
    end = kept.full_end
    if B.PEEL:
        if end < kept.hi:
            best, second = step(best, second, end, q_tile, q, q_stride, d, kept, False, B)
    else:
        end += tl.where(end < kept.hi, B.BLOCK_D, 0)
    for done in range(kept.lo, end, B.BLOCK_D):
        start = end - B.BLOCK_D - (done - kept.lo)
        best, second = step(best, second, start, q_tile, q, q_stride, d, kept, B.PEEL, B)
    return best, second


@triton.jit
def find_argmax(best, tile, value, kept, B):
    """[BLOCK_Q] document token that brought each maximum: the first one where several are equal, or NaN."""
    AXIS: tl.constexpr = 0 if B.SWAP else 1
    position = tile + along_documents(tl.arange(0, B.BLOCK_D), B)
    hit = (best == (value[None, :] if B.SWAP else value[:, None])) | (best != best)
    argmax = tl.min(tl.where(hit, position, 2147483647), AXIS)
    # Where every valid similarity is -inf nothing beat the initial value: the first valid token is taken.
    return tl.where(value == float("-inf"), kept.lo, argmax)


@triton.jit
def sum_of_queries(x, B):
    """[BLOCK_Q] -> [PACK]."""
    L: tl.constexpr = B.BLOCK_Q // B.PACK
    return tl.sum(tl.reshape(x, [B.PACK, L]), 1)


@triton.jit
def count_valid(item, q, n_q, q_mask_stride, B):
    """[PACK] int32: the valid tokens of the whole query, of which a chunk holds some."""
    L: tl.constexpr = B.BLOCK_Q // B.PACK
    counted = tl.zeros([B.PACK], tl.int32)
    for start in range(0, item.length, L):
        token = start + tl.arange(0, B.BLOCK_Q) % L
        ok = (q.query < n_q) & (token < item.length)
        keep = tl.load(q.mask + token.to(tl.int64) * q_mask_stride, mask=ok, other=0) != 0
        counted += sum_of_queries(keep.to(tl.int32), B)
    return counted


@triton.jit
def divisor_of_sums(item, q, n_q, q_mask_stride, B):
    """[PACK] float64: the number of a query's valid tokens if MEAN, else 1."""
    count = tl.zeros([B.PACK], tl.int32) + 1
    if B.MEAN:
        if B.Q_MASKED:
            count = count_valid(item, q, n_q, q_mask_stride, B)
        else:
            count = count * item.length
    return tl.maximum(count, 1).to(tl.float64)


@triton.jit
def empty_scores(item, q, n_q, q_mask_stride, empty_score, B):
    """[PACK] scores with an empty document. The first chunk answers for the whole query, the others add nothing."""
    if B.Q_MASKED:
        counted = count_valid(item, q, n_q, q_mask_stride, B)
        return tl.where((counted > 0) & (item.chunk == 0), empty_score, 0.0).to(B.ACC)
    else:
        return tl.zeros([B.PACK], B.ACC) + tl.where(item.chunk == 0, empty_score, 0.0).to(B.ACC)


@triton.jit
def store_sums(total, out_ptr, item, kept, document, q, n_q, n_d, q_mask_stride, empty_score, B):
    """[PACK] parts of the scores of an item, unless its document is empty or none."""
    if kept.hi == 0:
        total = empty_scores(item, q, n_q, q_mask_stride, empty_score, B)
    if B.CANDIDATES:
        # An invalid candidate scores NaN, since raising would need a device sync.
        total = tl.where(document.invalid, float("nan"), total)
    query = item.query + tl.arange(0, B.PACK)
    if B.Q_RAGGED:
        tl.store(out_ptr + item.slot.to(tl.int64) * n_d + item.doc + query * 0, total)
    else:
        tl.store(out_ptr + (item.chunk.to(tl.int64) * n_q + query) * n_d + item.doc, total, mask=query < n_q)


@triton.jit
def score_item(
    pid, q, d, scores_ptr, argmax_ptr, candidates_ptr, items_ptr, weights_ptr,
    n_q, n_d, chunks, documents, empty_score, B,
):  # fmt: skip
    """Scores one tile of query tokens with one document."""
    item = find_item(pid, q, n_q, chunks, B)
    document = find_document(item, d, candidates_ptr, items_ptr, n_d, documents, B)
    kept = find_kept(document, B)
    rows = find_queries(item, q, n_q, B)
    q_high, q_low, q_inv = load_query_tile(rows, q.stride_l, B)
    q_reach = q_inv
    if B.BOUNDS and B.Q_CODES:
        q_reach = tl.load(rows.inv + rows.token + (q.length if B.Q_RAGGED else wide(n_q) * q.length), mask=rows.ok)
    best, second = running_max((q_high, q_low, q_inv, q_reach), rows, q.stride_l, document, kept, B)

    AXIS: tl.constexpr = 0 if B.SWAP else 1
    value = row_max(best, AXIS)
    keep = rows.ok
    if B.Q_MASKED:
        keep = tl.load(rows.mask + rows.token.to(tl.int64) * q.mask_stride_l, mask=rows.ok, other=0) != 0
    if B.ARGMAX:
        argmax = tl.where(keep & (kept.hi > 0), find_argmax(best, second, value, kept, B), -1)
        if B.Q_RAGGED:
            tl.store(argmax_ptr + item.doc * q.length + item.begin + rows.token, argmax, mask=rows.ok)
        else:
            tl.store(argmax_ptr + (rows.query * n_d + item.doc) * q.length + rows.token, argmax, mask=rows.ok)
    weight = q_inv
    if B.WEIGHTED:
        first = item.begin if B.Q_RAGGED else rows.query * item.length
        weight = tl.load(weights_ptr + first + rows.token, mask=keep, other=0.0)
    if B.BOUNDS:
        divisor = divisor_of_sums(item, rows, n_q, q.mask_stride_l, B)
        total, upper = bound_sums(value, row_max(second, AXIS), weight, keep, divisor, B)
        store_sums(upper, argmax_ptr, item, kept, document, rows, n_q, n_d, q.mask_stride_l, empty_score, B)
    else:
        if B.NORM != NO_NORM or B.Q_CODES:
            value *= q_inv
        if B.WEIGHTED:
            value *= weight
        total = sum_of_queries(tl.where(keep, value, 0.0), B)
        if B.MEAN:
            # in float64: a division of float32 is off by up to 2 ulp
            total = (total.to(tl.float64) / divisor_of_sums(item, rows, n_q, q.mask_stride_l, B)).to(B.ACC)
    store_sums(total, scores_ptr, item, kept, document, rows, n_q, n_d, q.mask_stride_l, empty_score, B)


# Integers are compiled for no particular value: one build serves every count and length, so that a call after warmup
# never compiles, inside a graph capture either. Alignment is what ALIGN says.
@triton.jit(
    do_not_specialize=[
        "q_stride_n", "q_stride_l", "d_stride_n", "d_stride_k", "d_stride_l",
        "q_mask_stride_n", "q_mask_stride_l", "d_mask_stride_n", "d_mask_stride_k", "d_mask_stride_l",
        "d_inv_stride_n", "n_q", "n_d", "l_q", "l_d", "chunks", "documents",
    ],
    do_not_specialize_on_alignment=[
        "q_mask_ptr", "d_mask_ptr", "q_offsets_ptr", "d_offsets_ptr", "candidates_ptr", "items_ptr", "weights_ptr",
        "d_error_ptr",
    ],
)  # fmt: skip
def forward_kernel(
    q_ptr,  # [n_q, l_q, dim], or if Q_RAGGED [l_q, dim]
    d_ptr,  # [n_q, n_d, l_d, dim], or if D_RAGGED [l_d, dim]; stride of n_q 0 where all queries share the documents
    q_mask_ptr,  # [n_q, l_q] bool, or [l_q]
    d_mask_ptr,  # [n_q, n_d, l_d] bool, or [l_d]
    q_inv_ptr,  # [n_q * l_q] inverse norms, or factors of codes; or [l_q]; if BOUNDS Q (latemax.kernels.bounds), then R
    d_inv_ptr,  # [n_q * n_d * l_d] inverse norms ([n_d * l_d] where shared), or scales of codes; or [l_d]
    scores_ptr,  # [chunks, n_q, n_d], or if Q_RAGGED [chunks, n_d]: parts of a query's score, or of its lower bound
    argmax_ptr,  # [n_q, n_d, l_q] int32, or if Q_RAGGED [n_d, l_q]; if BOUNDS as scores_ptr, of upper bounds
    q_offsets_ptr,  # [n_q + 1] int64, if Q_RAGGED
    d_offsets_ptr,  # [documents + 1] int64, if D_RAGGED
    candidates_ptr,  # [n_q, n_d] int64, if CANDIDATES: which documents, -1 for none
    items_ptr,  # [documents, 3] int64, if D_SEPARATE: addresses of tokens and mask, stride from token to token
    weights_ptr,  # [n_q, l_q] in ACC, if BOUNDS in float64, or if Q_RAGGED [l_q], if WEIGHTED
    d_error_ptr,  # as d_inv_ptr, if BOUNDS
    q_stride_n, q_stride_l, d_stride_n, d_stride_k, d_stride_l,
    q_mask_stride_n, q_mask_stride_l, d_mask_stride_n, d_mask_stride_k, d_mask_stride_l, d_inv_stride_n,
    n_q, n_d, l_q, l_d, chunks, documents, empty_score: tl.float64,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PACK: tl.constexpr, SWAP: tl.constexpr,
    Q_RAGGED: tl.constexpr, D_RAGGED: tl.constexpr, D_SEPARATE: tl.constexpr, CANDIDATES: tl.constexpr,
    Q_MASKED: tl.constexpr, D_MASKED: tl.constexpr, PEEL: tl.constexpr, NORM: tl.constexpr, ARGMAX: tl.constexpr,
    WEIGHTED: tl.constexpr, MEAN: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, D_ALIGN: tl.constexpr, D_CODES: tl.constexpr,
    Q_CODES: tl.constexpr, SPLIT: tl.constexpr, BOUNDS: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The launch signature; Build, Side and score_item say what it means.

    PACK queries share a tile of BLOCK_Q rows, BLOCK_Q / PACK tokens each. A longer query is cut in chunks of BLOCK_Q,
    one program each (a loop over chunks cost 255 registers and spills where one chunk takes 102).

    Q_RAGGED, D_RAGGED: tokens are concatenated and l_q, l_d count them all. A tile then holds tokens of one query only,
    and ``chunks`` counts the slots of slot_owner.
    D_SEPARATE: documents are at addresses of their own. d_ptr and d_mask_ptr give types only, d_offsets_ptr lengths.
    ALIGN, D_ALIGN: the number of elements that every row stride of q, of d, is a multiple of.
    D_CODES: products of codes are exact, as integers (Q_CODES) or in half precision, and are scaled before the maximum.
    A float32 q is multiplied as two halves (SPLIT): one alone would be off by 2^-9.
    """
    score_item(
        tl.program_id(0),
        Side(
            tokens=q_ptr, mask=q_mask_ptr, inv=q_inv_ptr, error=0, offsets=q_offsets_ptr,
            stride_n=aligned(q_stride_n, ALIGN), stride_k=0, stride_l=aligned(q_stride_l, ALIGN),
            mask_stride_n=q_mask_stride_n, mask_stride_k=0, mask_stride_l=q_mask_stride_l, inv_stride_n=0, length=l_q,
        ),
        Side(
            tokens=d_ptr, mask=d_mask_ptr, inv=d_inv_ptr, error=d_error_ptr, offsets=d_offsets_ptr,
            stride_n=aligned(d_stride_n, D_ALIGN), stride_k=aligned(d_stride_k, D_ALIGN),
            stride_l=aligned(d_stride_l, D_ALIGN), mask_stride_n=d_mask_stride_n, mask_stride_k=d_mask_stride_k,
            mask_stride_l=d_mask_stride_l, inv_stride_n=d_inv_stride_n, length=l_d,
        ),
        scores_ptr, argmax_ptr, candidates_ptr, items_ptr, weights_ptr, n_q, n_d, chunks, documents, empty_score,
        Build(
            DIM, BLOCK_Q, BLOCK_D, BLOCK_K, PACK, SWAP, Q_RAGGED, D_RAGGED, D_SEPARATE, CANDIDATES, Q_MASKED, D_MASKED,
            PEEL, NORM, ARGMAX, WEIGHTED, D_CODES, Q_CODES, SPLIT, MEAN, PRECISION, D_ALIGN, COMPUTE, BOUNDS, ACC,
        ),
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_q", "n_d", "t_q", "slots"], do_not_specialize_on_alignment=["q_offsets_ptr"])
def sum_slots_kernel(
    parts_ptr,  # [slots, n_d]
    q_offsets_ptr,  # [n_q + 1] int64
    scores_ptr,  # [n_q, n_d]
    n_q, n_d, t_q, slots,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores of ragged queries: the sum of each query's slots, in order."""
    query = (tl.program_id(0) % n_q).to(tl.int64)
    doc = tl.program_id(0) // n_q * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    first, end = span(q_offsets_ptr, query, query >= 0, t_q)
    slot = first // BLOCK_Q + query
    total = tl.zeros([BLOCK], ACC)
    slot_end = tl.minimum(slot + (end - first + BLOCK_Q - 1) // BLOCK_Q, slots)
    for i in range(slot, slot_end):
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
    )
    total = tl.zeros([BLOCK_R], ACC)
    for start in range(0, DIM, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(base[:, None] + columns[None, :], mask=ok[:, None] & (columns < DIM)[None, :], other=0.0).to(ACC)
        total += tl.sum(x * x, 1)
    tl.store(out_ptr + row, 1.0 / tl.maximum(tl.sqrt(total), 1e-12), mask=ok)
