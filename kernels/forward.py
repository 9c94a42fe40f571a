"""Forward: one program scores one document against a tile of query tokens and never writes a similarity to memory.

The running maximum stays elementwise, [BLOCK_D, BLOCK_Q] against [BLOCK_D, BLOCK_Q], inside the loop over document
tiles; lanes meet once, after it. See kernels/README.md for the picture.
"""

import triton
import triton.language as tl

from latemax.kernels.common import aligned, inverse_norm, load_rows, nan_max, row_max, same_bits, wide


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
        for k in range(0, DIM, BLOCK_K):
            d = load_rows(base, j, ok, k + columns, d_stride, DIM, DIM % BLOCK_K == 0, FULL).to(COMPUTE)
            q = load_rows(q_base, q_rows, q_ok, k + columns, q_stride, DIM, DIM % BLOCK_K == 0, False).to(COMPUTE)
            if SWAP:
                s = tl.dot(d, tl.trans(q), s, input_precision=PRECISION, out_dtype=ACC)
            else:
                s = tl.dot(q, tl.trans(d), s, input_precision=PRECISION, out_dtype=ACC)
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
        "d_inv_stride_n", "n_q", "n_d", "l_q", "l_d", "chunks",
    ],
    do_not_specialize_on_alignment=["q_mask_ptr", "d_mask_ptr"],
)  # fmt: skip
def forward_kernel(
    q_ptr,  # [n_q, l_q, dim]
    d_ptr,  # [n_q, n_d, l_d, dim]; the stride of n_q is 0 where all queries share the documents
    q_mask_ptr,  # [n_q, l_q] bool
    d_mask_ptr,  # [n_q, n_d, l_d] bool
    q_inv_ptr,  # [n_q * l_q] inverse norms
    d_inv_ptr,  # [n_q * n_d * l_d] inverse norms ([n_d * l_d] where shared)
    scores_ptr,  # [chunks, n_q, n_d], to be summed over chunks
    argmax_ptr,  # [n_q, n_d, l_q] int32
    q_stride_n, q_stride_l, d_stride_n, d_stride_k, d_stride_l,
    q_mask_stride_n, q_mask_stride_l, d_mask_stride_n, d_mask_stride_k, d_mask_stride_l, d_inv_stride_n,
    n_q, n_d, l_q, l_d, chunks, empty_score: tl.float64,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PACK: tl.constexpr, SWAP: tl.constexpr,
    Q_MASKED: tl.constexpr, D_MASKED: tl.constexpr, NORM: tl.constexpr, ARGMAX: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """PACK queries share a tile of BLOCK_Q rows, BLOCK_Q / PACK tokens each; a longer query is cut in chunks of
    BLOCK_Q, one program each (a loop over chunks cost 255 registers and spills where one chunk takes 102).

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
    q_tiles = tl.cdiv(n_q, PACK)
    pid = tl.program_id(0)
    q_first = (pid % q_tiles) * PACK
    chunk = pid // q_tiles % chunks
    doc = (pid // q_tiles // chunks).to(tl.int64)
    d_base = d_ptr + q_first.to(tl.int64) * d_stride_n + doc * d_stride_k
    d_inv_base = d_inv_ptr + q_first.to(tl.int64) * d_inv_stride_n + doc * l_d

    # first and past-the-last valid document token: masked tiles before and behind are never read; and whether some
    # token between is masked
    lo = l_d * 0
    hi = l_d
    masked_hi = 0
    d_mask_base = d_mask_ptr + q_first.to(tl.int64) * d_mask_stride_n + doc * d_mask_stride_k
    if D_MASKED:
        lo = l_d
        hi = l_d * 0
        count = l_d * 0
        for start in range(0, l_d, 1024):
            j = start + tl.arange(0, 1024).to(tl.int64)
            keep = tl.load(d_mask_base + j * d_mask_stride_l, mask=j < l_d, other=0) != 0
            count += tl.sum(keep.to(tl.int32), 0)
            lo = tl.minimum(lo, tl.min(tl.where(keep, j, l_d), 0).to(tl.int32))
            hi = tl.maximum(hi, tl.max(tl.where(keep, j + 1, 0), 0).to(tl.int32))
        masked_hi = tl.where(count < hi - lo, hi, 0)
    full_end = lo + tl.maximum(hi - lo, 0) // BLOCK_D * BLOCK_D

    r = tl.arange(0, BLOCK_Q)
    j = tl.arange(0, BLOCK_D).to(tl.int64)
    query = (q_first + r // L).to(tl.int64)
    token = chunk * L + r % L
    q_ok = (query < n_q) & (token < l_q)
    q_rows = token.to(tl.int64)
    q_base = q_ptr + query[:, None] * q_stride_n
    q_tile = tl.zeros([BLOCK_Q, BLOCK_K], COMPUTE)
    q_inv = tl.full([BLOCK_Q], 1.0, ACC)
    if DIM <= BLOCK_K:
        q_raw = load_rows(
            q_base, q_rows, q_ok, tl.arange(0, BLOCK_K), q_stride_l, DIM, DIM == BLOCK_K, False
        )  # fmt: skip
        q_tile = q_raw.to(COMPUTE)
        if NORM == 1:
            q_inv = inverse_norm(q_raw, ACC)
    if NORM == 2:
        q_inv = tl.load(q_inv_ptr + query * l_q + token, mask=q_ok, other=0.0)

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
        keep_q = tl.load(
            q_mask_ptr + query * q_mask_stride_n + q_rows * q_mask_stride_l, mask=q_ok, other=0
        ) != 0  # fmt: skip
    if ARGMAX:
        position = tile + (j[:, None] if SWAP else j[None, :]).to(tl.int32)
        hit = (best == (value[None, :] if SWAP else value[:, None])) | (best != best)
        winner = tl.min(tl.where(hit, position, 2147483647), AXIS)
        # where every valid similarity is -inf nothing ever beat the initial value: the first valid token wins
        winner = tl.where(value == float("-inf"), lo, winner)
        winner = tl.where(keep_q & (hi > 0), winner, -1)
        tl.store(argmax_ptr + (query * n_d + doc) * l_q + token, winner, mask=q_ok)
    if NORM > 0:
        value *= q_inv
    total = tl.sum(tl.reshape(tl.where(keep_q, value, 0.0), [PACK, L]), 1)

    p = q_first + tl.arange(0, PACK)
    if hi == 0:
        # an empty document: the first chunk answers for the whole query, the others add nothing
        if Q_MASKED:
            counted = tl.zeros([PACK], tl.int32)
            for start in range(0, l_q, L):
                token = start + r % L
                keep_q = tl.load(
                    q_mask_ptr + query * q_mask_stride_n + token.to(tl.int64) * q_mask_stride_l,
                    mask=(query < n_q) & (token < l_q), other=0,
                ) != 0  # fmt: skip
                counted += tl.sum(tl.reshape(keep_q.to(tl.int32), [PACK, L]), 1)
            total = tl.where((counted > 0) & (chunk == 0), empty_score, 0.0).to(ACC)
        else:
            total = tl.zeros([PACK], ACC) + tl.where(chunk == 0, empty_score, 0.0).to(ACC)
    out = (chunk.to(tl.int64) * n_q + p) * n_d + doc
    tl.store(scores_ptr + out, total, mask=p < n_q)


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
