"""Device helpers shared by the forward and backward kernels."""

import triton
import triton.language as tl

# How a forward build normalizes: not at all; each tile computes the norms of its own rows (for rows read once); or the
# norms were computed before and are read (for rows read again and again).
NO_NORM = tl.constexpr(0)
NORM_IN_TILE = tl.constexpr(1)
NORM_BEFORE = tl.constexpr(2)
# What document tokens are: numbers, 8-bit codes, or 1-bit codes.
NUMBERS = tl.constexpr(0)
INT8 = tl.constexpr(1)
BITS = tl.constexpr(2)


@triton.jit
def wide(i):
    """A loop counter as int64, for addresses (in the interpreter counters are plain ints without .to)."""
    return i + tl.full([], 0, tl.int64)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The stride itself, as a product that the compiler sees to be a multiple of ALIGN.

    tl.multiple_of has no effect on a kernel argument. Without this no load is 16 bytes wide, nothing is copied
    asynchronously and registers spill.
    """
    return stride // ALIGN * ALIGN


@triton.jit
def nan_max(a, b):
    """Maximum that keeps a NaN, as torch.amax does (max.NaN.f32: one instruction from sm_80 on)."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_max(x, AXIS: tl.constexpr):
    return tl.reduce(x, AXIS, nan_max)


@triton.jit
def same_bits(a, b):
    """Bitwise equality. NaN equals NaN, so the element that turned a running maximum to NaN is recorded as argmax."""
    if a.dtype == tl.float64:
        return a.to(tl.int64, bitcast=True) == b.to(tl.int64, bitcast=True)
    else:
        return a.to(tl.int32, bitcast=True) == b.to(tl.int32, bitcast=True)


@triton.jit
def load_rows(
    base, rows, row_ok, columns, stride, DIM: tl.constexpr, COLUMNS_FULL: tl.constexpr, ROWS_FULL: tl.constexpr
):
    """[rows, columns] tile of a [*, DIM] matrix with row stride ``stride`` and unit column stride.

    Rows are int64, so that tensors of over 2^31 elements are addressed correctly. Elements outside rows and columns
    read as 0.
    """
    ptrs = base + rows[:, None] * stride + columns[None, :]
    if ROWS_FULL:
        if COLUMNS_FULL:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(columns < DIM)[None, :], other=0.0)
    else:
        if COLUMNS_FULL:
            return tl.load(ptrs, mask=row_ok[:, None], other=0.0)
        else:
            return tl.load(ptrs, mask=row_ok[:, None] & (columns < DIM)[None, :], other=0.0)


@triton.jit
def load_bits(
    base, rows, row_ok, first, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    ROWS_FULL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] tile of -1 and 1 from column ``first`` on; columns after DIM hold either."""
    BYTES: tl.constexpr = COLUMNS // 8
    MOST: tl.constexpr = (DIM + 7) // 8
    packed = load_rows(
        base, rows, row_ok, first // 8 + tl.arange(0, BYTES), stride, MOST, DIM % COLUMNS == 0, ROWS_FULL
    )
    bits = (packed.to(tl.int32)[:, :, None] & (128 >> tl.arange(0, 8))[None, None, :]) != 0
    # a choice of two constants: shifts and a conversion took 1716 instructions a tile of 128 x 128, this 773 (sm_90)
    signs = tl.where(bits, tl.full([], 1, COMPUTE), tl.full([], -1, COMPUTE))
    return tl.reshape(signs, [ROWS, COLUMNS])


@triton.jit
def halves(x):
    """float32 -> two numbers that bfloat16 holds, but for 2^-16 of x. The first is cut, not rounded, so that it is
    finite where x is; it carries infinity and NaN alone."""
    high = tl.where(x == x, (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True), x)
    low = x - high
    return high, tl.where(low == low, low, 0.0)


@triton.jit
def sum_of_squares(x, ACC: tl.constexpr):
    """[rows, columns] -> [rows]."""
    x = x.to(ACC)
    return tl.sum(x * x, axis=1)


@triton.jit
def inverse(squares):
    """1 / max(‖row‖₂, 1e-12), the eps of torch.nn.functional.normalize."""
    return tl.rsqrt(tl.maximum(squares, 1e-24))


@triton.jit
def inverse_norm(x, ACC: tl.constexpr):
    return inverse(sum_of_squares(x, ACC))


@triton.jit
def slot_owner(offsets_ptr, slot, n, BLOCK: tl.constexpr):
    """Which of n ragged items owns a slot.

    Item a owns the slots from offsets[a] // BLOCK + a on: one for each BLOCK of its tokens and at most one more, which
    is empty. With this numbering nobody counts tiles beforehand.
    """
    lo = slot * 0
    hi = n - 1
    while lo < hi:
        middle = (lo + hi + 1) // 2
        before = tl.load(offsets_ptr + middle) // BLOCK + middle <= slot
        lo = tl.where(before, middle, lo)
        hi = tl.where(before, hi, middle - 1)
    return lo


@triton.jit
def span(offsets_ptr, i, ok, total):
    """First token and end of item i, int64, clamped to ``total`` tokens whatever the offsets hold."""
    first = tl.minimum(tl.maximum(tl.load(offsets_ptr + i, mask=ok, other=0), 0), total)
    return first, tl.minimum(tl.maximum(tl.load(offsets_ptr + i + 1, mask=ok, other=0), first), total)
