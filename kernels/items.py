"""What a forward program works on: which query tokens with which document, and where in memory both are.

Named tuples carry related values between jit helpers. They exist at compile time only and cost a build nothing. Triton
has one rule for them: a tuple of constants is passed on as an argument, never assigned to a name, which would turn the
constants into tensors.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from latemax.kernels.common import aligned, slot_owner, span


class Build(NamedTuple):
    """The constants of a build, all tl.constexpr."""

    DIM: Any
    BLOCK_Q: Any  # query tokens in a tile
    BLOCK_D: Any  # document tokens in a tile
    BLOCK_K: Any  # columns in a tile
    PACK: Any  # queries in a tile, BLOCK_Q / PACK tokens each
    SWAP: Any  # tiles of similarities are [BLOCK_D, BLOCK_Q], else [BLOCK_Q, BLOCK_D]
    Q_RAGGED: Any
    D_RAGGED: Any
    D_SEPARATE: Any
    CANDIDATES: Any
    Q_MASKED: Any
    D_MASKED: Any
    PEEL: Any  # the last, partial tile of a document is not in the loop over the others
    NORM: Any  # one of the NORM_ constants
    ARGMAX: Any
    WEIGHTED: Any
    D_CODES: Any  # what document tokens are: NUMBERS, INT8 or BITS
    Q_CODES: Any  # query tokens are that too, and products are those of integers
    SPLIT: Any  # query tokens are multiplied as two halves
    MEAN: Any  # sums are divided by the number of valid query tokens
    PRECISION: Any  # of products of float32
    D_ALIGN: Any  # every row of documents starts at a multiple of this many elements
    COMPUTE: Any  # dtype of the operands of products
    BOUNDS: Any  # what similarities can be at least and at most is added up, instead of themselves
    ACC: Any  # dtype of similarities, maxima and sums


class Side(NamedTuple):
    """q or d of a call, as launched: pointers, strides in elements, sizes."""

    tokens: Any
    mask: Any
    inv: Any  # a factor a token: inverse norms, if NORM_BEFORE; scales of codes
    error: Any  # how far a token is from its code, if BOUNDS
    offsets: Any  # if ragged
    stride_n: Any  # from query to query
    stride_k: Any  # from document to document
    stride_l: Any  # from token to token
    mask_stride_n: Any
    mask_stride_k: Any
    mask_stride_l: Any
    inv_stride_n: Any
    length: Any  # tokens of one query or document, or if ragged of all of them


class Item(NamedTuple):
    """Which query tokens a program scores, and with which document."""

    query: Any  # the first of the PACK queries in the tile
    chunk: Any  # which BLOCK_Q tokens of a longer query
    slot: Any  # the row of scores_ptr, if Q_RAGGED
    begin: Any  # the row of the query's first token, if Q_RAGGED
    length: Any  # tokens of a query
    doc: Any  # int64


class Queries(NamedTuple):
    """The query tokens of a tile, a row each."""

    query: Any  # [BLOCK_Q] int64
    token: Any  # [BLOCK_Q], in its query
    ok: Any  # [BLOCK_Q], whether there is such a token
    base: Any  # pointers to the query's token 0: [BLOCK_Q, 1]
    mask: Any  # [BLOCK_Q]
    inv: Any  # [BLOCK_Q]


class Document(NamedTuple):
    """The document of a program: pointers to its token 0, strides from token to token."""

    base: Any
    stride: Any
    mask: Any
    mask_stride: Any
    inv: Any
    error: Any
    length: Any
    invalid: Any  # the candidate is no document's number


class Kept(NamedTuple):
    """Which document tokens are read: masked tiles before the first and after the last valid token are not."""

    lo: Any  # the first valid token
    hi: Any  # end: 1 + the last valid token
    masked_hi: Any  # hi where a token between is masked, else 0
    full_end: Any  # end of the full tiles, counted from lo


@triton.jit
def find_item(pid, q, n_q, chunks, B):
    """The item of program ``pid``.

    Query tiles of one document are next to each other, so it comes from memory once and from L2 after that.
    """
    if B.Q_RAGGED:
        slot = pid % chunks
        query = slot_owner(q.offsets, slot, n_q, B.BLOCK_Q)
        begin, end = span(q.offsets, query, query >= 0, q.length)
        chunk = slot - (begin // B.BLOCK_Q).to(tl.int32) - query
        return Item(query, chunk, slot, begin, (end - begin).to(tl.int32), (pid // chunks).to(tl.int64))
    else:
        q_tiles = tl.cdiv(n_q, B.PACK)
        query = (pid % q_tiles) * B.PACK
        chunk = pid // q_tiles % chunks
        return Item(query, chunk, chunk, 0, q.length, (pid // q_tiles // chunks).to(tl.int64))


@triton.jit
def find_separate(number, ok, d, items_ptr, B):
    """(pointer to token 0 of document ``number``, stride, pointer to its mask), from its row of the table."""
    row = items_ptr + 3 * number
    tokens = tl.load(row, mask=ok, other=0)
    if B.D_ALIGN > 1:
        tokens = aligned(tokens, 16)
    base = tokens.to(d.tokens.dtype)
    if B.D_ALIGN > 1:
        # the conversion to a pointer forgets it
        base = tl.multiple_of(base, 16)
    stride = aligned(tl.load(row + 2, mask=ok, other=0), B.D_ALIGN)
    mask = d.mask
    if B.D_MASKED:
        mask = tl.load(row + 1, mask=ok, other=0).to(d.mask.dtype)
    return base, stride, mask


@triton.jit
def find_document(item, d, candidates_ptr, items_ptr, n_d, documents, B):
    """The document of an item. An invalid candidate has no tokens."""
    query = item.query.to(tl.int64)
    if B.D_RAGGED:
        if B.CANDIDATES:
            number = tl.load(candidates_ptr + query * n_d + item.doc)
            invalid = (number < -1) | (number >= documents)
        else:
            number = item.doc
            invalid = False
        known = (number >= 0) & (number < documents)
        begin, end = span(d.offsets, number, known, d.length)
        length = (end - begin).to(tl.int32)
        if B.D_SEPARATE:
            base, stride, mask = find_separate(number, known, d, items_ptr, B)
            return Document(base, stride, mask, 1, d.inv + begin, d.error + begin, length, invalid)
        else:
            return Document(
                d.tokens + begin * d.stride_l, d.stride_l,
                d.mask + begin * d.mask_stride_l, d.mask_stride_l,
                d.inv + begin, d.error + begin, length, invalid,
            )  # fmt: skip
    else:
        first = query * d.inv_stride_n + item.doc * d.length
        return Document(
            d.tokens + query * d.stride_n + item.doc * d.stride_k, d.stride_l,
            d.mask + query * d.mask_stride_n + item.doc * d.mask_stride_k, d.mask_stride_l,
            d.inv + first, d.error + first, d.length, False,
        )  # fmt: skip


@triton.jit
def find_kept(d, B):
    """The document tokens to read. One pass over the mask, in blocks of 1024."""
    if B.D_MASKED:
        lo = d.length
        hi = d.length * 0
        count = d.length * 0
        for start in range(0, d.length, 1024):
            j = start + tl.arange(0, 1024).to(tl.int64)
            keep = tl.load(d.mask + j * d.mask_stride, mask=j < d.length, other=0) != 0
            count += tl.sum(keep.to(tl.int32), 0)
            lo = tl.minimum(lo, tl.min(tl.where(keep, j, d.length), 0).to(tl.int32))
            hi = tl.maximum(hi, tl.max(tl.where(keep, j + 1, 0), 0).to(tl.int32))
        full_end = lo + tl.maximum(hi - lo, 0) // B.BLOCK_D * B.BLOCK_D
        return Kept(lo, hi, tl.where(count < hi - lo, hi, 0), full_end)
    else:
        lo = d.length * 0
        return Kept(lo, d.length, 0, lo + tl.maximum(d.length - lo, 0) // B.BLOCK_D * B.BLOCK_D)


@triton.jit
def find_queries(item, q, n_q, B):
    """The rows of the query tile: PACK queries, BLOCK_Q / PACK tokens each."""
    L: tl.constexpr = B.BLOCK_Q // B.PACK
    r = tl.arange(0, B.BLOCK_Q)
    query = (item.query + r // L).to(tl.int64)
    token = item.chunk * L + r % L
    ok = (query < n_q) & (token < item.length)
    if B.Q_RAGGED:
        base = q.tokens + (query[:, None] * 0 + item.begin) * q.stride_l
        mask = q.mask + (query * 0 + item.begin) * q.mask_stride_l
        return Queries(query, token, ok, base, mask, q.inv + query * 0 + item.begin)
    else:
        base = q.tokens + query[:, None] * q.stride_n
        return Queries(query, token, ok, base, q.mask + query * q.mask_stride_n, q.inv + query * q.length)
