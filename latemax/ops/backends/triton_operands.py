"""How the Triton kernels take tokens: alignment, the types of products and sums, factors of codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latemax.ops.backends import decode
from latemax.ops.problem import Batch, Side

TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
# D_CODES of a forward build
CODES = {"": 0, "int8": 1, "binary": 2}
# decided when the kernels are decorated, at import
INTERPRETED = triton.knobs.runtime.interpret


def align(*tensors: Tensor) -> int:
    """How many elements every row address is a multiple of: 16 bytes' worth, or 1."""
    most = 16
    for x in tensors:
        step = 16 // x.element_size()
        odd = x.data_ptr() % 16
        for stride in x.stride()[:-1]:
            odd |= stride % step
        if odd:
            return 1
        most = min(most, step)
    return most


def compute(dtype: torch.dtype) -> tl.dtype:
    """The type of the products' operands. The interpreter multiplies bfloat16 bit patterns as integers (triton 3.9), so
    it is given float32, which holds them exactly."""
    return tl.float32 if dtype == torch.bfloat16 and INTERPRETED else TL_DTYPES[dtype]


def split(b: Batch) -> bool:
    """Whether query tokens are multiplied as two halves: float32 ones, with codes."""
    return b.d.codes is not None and b.q.tokens.dtype == torch.float32


def of_products(b: Batch) -> tl.dtype:
    """``compute`` of a forward pass. bfloat16 holds every code, and every half of a float32."""
    if b.q.codes is not None:
        return tl.int8
    return compute(torch.bfloat16 if split(b) else b.dtype)


def code_factors(s: Side, normalize: bool) -> Tensor:
    """[n * l] scales of query tokens, or what makes their codes unit vectors."""
    assert s.codes is not None
    if not normalize:
        return s.codes.scale
    return decode.unit_factors(decode.integers(s.tokens, s.codes.kind, s.codes.dim, torch.float32), s.codes.scale)


def precision(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
