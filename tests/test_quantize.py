"""quantize: codes, scales and errors as the contract defines them, on values that are hard to round."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st

from latemax import QuantizedTokens, quantize
from latemax.quantized import DTYPES, KINDS


def _hard(seed: int, l: int, dim: int, dtype: torch.dtype) -> torch.Tensor:  # noqa: E741
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(l, dim, generator=g, dtype=torch.float64)
    x[0] = x[0] * torch.logspace(-30, 3, dim, dtype=torch.float64)  # huge range
    x[1] = 2.0**-140 * torch.arange(dim)  # subnormal in float32
    x[2] = 0.3
    x[3] = 0.0
    x[3, -1] = 7.0
    x[4] = x[0]
    return x.to(dtype)


def _norm_squared(row: torch.Tensor, code: torch.Tensor, scale: float) -> Fraction:
    return sum(
        ((Fraction(a) - Fraction(scale) * int(c)) ** 2 for a, c in zip(row.tolist(), code.tolist(), strict=True)),
        Fraction(0),
    )


@given(
    st.integers(0, 1000),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
)
@settings(max_examples=30, deadline=None)
def test_error_bounds_the_exact_distance(seed: int, dim: int, dtype: torch.dtype) -> None:
    x = _hard(seed, 6, dim, dtype)
    kept, codes = x.clone(), quantize(x)
    assert torch.equal(x, kept) and codes.error is not None
    for row, code, scale, error in zip(
        x.double(), codes.codes, codes.scale.tolist(), codes.error.tolist(), strict=True
    ):
        exact = _norm_squared(row, code, scale)
        assert Fraction(error) ** 2 >= exact
        assert error == 2.0**-126 or Fraction(error) ** 2 <= exact * Fraction(1.000001)


def test_int8_is_symmetric_and_rounds_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    codes = quantize(x)
    assert codes.codes.tolist() == [[127, 0, 2, -2, -127], [0, 0, 0, 0, 0]]
    assert codes.scale.tolist() == [1.0, 0.0] and codes.error[1] == 0
    assert codes.codes.dtype == torch.int8 and codes.scale.dtype == codes.error.dtype == torch.float32
    tiny = quantize(torch.full((1, 3), 2.0**-120))
    assert tiny.scale.item() == 0 and not tiny.codes.any() and tiny.error.item() >= 3**0.5 * 2.0**-120


def test_binary_packs_the_most_significant_bit_first() -> None:
    x = torch.tensor([[1.0, -1.0, 0.0, -0.0, -3.0, -2.0, -1.0, 4.0, 2.0]])
    codes = quantize(x, "binary")
    assert codes.codes.tolist() == [[0b10110001, 0b10000000]] and codes.error is None
    assert codes.scale.item() == pytest.approx(14 / 9)
    assert torch.equal(codes.dequantize().sign(), torch.tensor([[1.0, -1, 1, 1, -1, -1, -1, 1, 1]]))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_are_zero_whatever_they_hold(kind: str) -> None:
    x, mask = torch.randn(2, 3, 9), torch.tensor([[True, False, True], [True, True, False]])
    x[0, 1], x[1, 2] = float("nan"), float("inf")
    codes = quantize(x, kind, mask=mask)
    assert not codes.codes[~mask].any() and not codes.scale[~mask].any()
    assert torch.equal(codes.codes[mask], quantize(x[mask], kind).codes)
    assert codes.error is None or not codes.error[~mask].any()
    for other in (mask.int(), mask * 0.5, mask.numpy()):
        assert torch.equal(quantize(x, kind, mask=other).codes, codes.codes)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_numpy_and_large_inputs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 4, 10)
    codes = quantize(x, kind)
    assert codes.shape == x.shape and codes.dequantize(torch.float64).dtype == torch.float64
    assert torch.equal(quantize(x.numpy(), kind).codes, codes.codes)
    assert torch.equal(codes[1].codes, codes.codes[1]) and codes[1, 2].shape == (4, 10) and len(codes) == 2
    assert quantize(x[:, :, :0], kind).shape == (2, 3, 0, 10)
    monkeypatch.setattr("latemax.quantized.CHUNK", 20)
    assert torch.equal(quantize(x, kind).codes, codes.codes) and torch.equal(quantize(x, kind).scale, codes.scale)
    # as many tokens as dims
    square, turned = quantize(x[..., :4], kind), torch.tensor([3, 1, 2, 0])
    assert torch.equal(square[..., turned].codes, square.codes[:, :, turned]) and square[..., 1:].shape == (2, 3, 3, 4)
    with pytest.raises(IndexError, match="axis of tokens"):
        codes[0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pytree_of_its_tensors(kind: str) -> None:
    codes = quantize(torch.randn(3, 5), kind)
    leaves, spec = pytree.tree_flatten(codes)
    assert len([x for x in leaves if x is not None]) == (3 if kind == "int8" else 2)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, QuantizedTokens) and torch.equal(again.dequantize(), codes.dequantize())


def test_refusals() -> None:
    x = torch.randn(2, 3)
    for bad in (float("nan"), float("inf")):
        y = x.clone()
        y[1, 2] = bad
        with pytest.raises(ValueError, match=r"finite; token \[1\]"):
            quantize(y)
    with pytest.raises(ValueError, match="finite in float32"):
        quantize(torch.full((1, 2), 1e300, dtype=torch.float64))
    with pytest.raises(ValueError, match="kind must be"):
        quantize(x, "int4")
    with pytest.raises(TypeError, match="tokens must"):
        quantize(x.int())
    with pytest.raises(TypeError, match="tokens must"):
        quantize(np.arange(4).reshape(2, 2))
    with pytest.raises(ValueError, match=r"\[\.\.\., l, dim\]"):
        quantize(x[0])
    with pytest.raises(TypeError, match="mask must be bool"):
        quantize(x, mask=torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="mask must be nonzero where"):
        quantize(x, mask=torch.tensor([0.0, -math.inf]))
    with pytest.raises(ValueError, match="mask must be"):
        quantize(x, mask=torch.ones(3, dtype=torch.bool))
    codes = quantize(x)
    with pytest.raises(ValueError, match="scale must be"):
        QuantizedTokens(codes.codes, codes.scale[:1], codes.error, "int8", 3)
    with pytest.raises(TypeError, match="codes of kind"):
        QuantizedTokens(codes.codes.float(), codes.scale, codes.error, "int8", 3)
