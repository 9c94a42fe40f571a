"""Codes as numbers, in plain torch on any device: the formats of ``latemax.quantized``."""

from __future__ import annotations

import torch
from torch import Tensor

from latemax.ops.problem import Side
from latemax.quantized import unpack_bits


def integers(tokens: Tensor, kind: str, dim: int, dtype: torch.dtype) -> Tensor:
    """Codes [..., dim] without their scale: -127 to 127, or -1 and 1, which every float dtype holds."""
    return tokens.to(dtype) if kind == "int8" else unpack_bits(tokens, dim).to(dtype).mul_(2).sub_(1)


def decoded(s: Side, dtype: torch.dtype) -> Side:
    """A side whose tokens are numbers. In float64 they are exact."""
    if s.codes is None:
        return s
    tokens = integers(s.tokens, s.codes.kind, s.codes.dim, dtype).mul_(s.codes.scale.to(dtype).unsqueeze(-1))
    return s._replace(tokens=tokens, codes=None)


def unit_factors(codes: Tensor, scale: Tensor) -> Tensor:
    """What makes integers [..., dim] unit vectors [...]: scale / max(‖scale · codes‖, 1e-12)."""
    scale = scale.to(codes.dtype)
    return scale / (torch.linalg.vector_norm(codes, dim=-1) * scale).clamp_min_(1e-12)
