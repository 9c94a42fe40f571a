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
def inverse_norm(x, ACC: tl.constexpr):
    """1 / max(‖row‖₂, 1e-12), the eps of torch.nn.functional.normalize. x: [rows, columns] -> [rows]."""
    x = x.to(ACC)
    return tl.rsqrt(tl.maximum(tl.sum(x * x, axis=1), 1e-24))
