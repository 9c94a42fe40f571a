"""Device helpers shared by the forward and backward kernels."""

import triton
import triton.language as tl


@triton.jit
def wide(i):
    """A loop counter as int64, for addresses (in the interpreter counters are plain ints without .to)."""
    return i + tl.full([], 0, tl.int64)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The stride itself, as a product the compiler can see to be a multiple of ALIGN (tl.multiple_of has no effect on
    a kernel argument: without this no load is 16 bytes wide, nothing is copied asynchronously, registers spill)."""
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
    """Bitwise equality: NaN equals NaN, so the one that turned a running maximum to NaN is recorded as its winner."""
    if a.dtype == tl.float64:
        return a.to(tl.int64, bitcast=True) == b.to(tl.int64, bitcast=True)
    else:
        return a.to(tl.int32, bitcast=True) == b.to(tl.int32, bitcast=True)


@triton.jit
def load_rows(
    base, rows, row_ok, columns, stride, DIM: tl.constexpr, COLUMNS_FULL: tl.constexpr, ROWS_FULL: tl.constexpr
):
    """[rows, columns] tile of a [*, DIM] matrix with row stride ``stride`` and unit column stride.

    Rows are int64, so that tensors of over 2^31 elements are addressed right. Outside rows and columns read as 0.
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
def slot_owner(cu_ptr, slot, n, BLOCK: tl.constexpr):
    """Which of n items of tokens end to end owns a slot. Item a owns slots cu[a] // BLOCK + a on, one for each BLOCK of
    its tokens, and at most one more that is empty: numbered so, nobody has to count tiles beforehand."""
    lo = slot * 0
    hi = n - 1
    while lo < hi:
        middle = (lo + hi + 1) // 2
        before = tl.load(cu_ptr + middle) // BLOCK + middle <= slot
        lo = tl.where(before, middle, lo)
        hi = tl.where(before, hi, middle - 1)
    return lo


@triton.jit
def span(cu_ptr, i, ok, total):
    """First and past-the-last token of item i, int64, kept inside ``total`` tokens whatever the offsets hold."""
    first = tl.minimum(tl.maximum(tl.load(cu_ptr + i, mask=ok, other=0), 0), total)
    return first, tl.minimum(tl.maximum(tl.load(cu_ptr + i + 1, mask=ok, other=0), first), total)
