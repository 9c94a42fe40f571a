"""Arguments in, canonical tensors out, or a TypeError / ValueError that names the argument, the rule and what came.

Reads shapes, dtypes and devices only, never values: no device-to-host sync.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch

BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")
FLOAT32_MAX = torch.finfo(torch.float32).max
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Arguments(NamedTuple):
    """What the operator takes, in its canonical form."""

    q: torch.Tensor  # [n_q, l_q, dim]
    d: torch.Tensor  # [n_d, l_d, dim] shared by all queries, or own candidates [n_q, n_d, l_d, dim]
    q_mask: torch.Tensor | None  # bool [n_q, l_q]
    d_mask: torch.Tensor | None  # bool, d.shape[:-1]
    one_query: bool  # the caller's q had no n_q axis
    one_document: bool  # the caller's d had no n_d axis


class Problem(NamedTuple):
    """Shapes and flags of one call: all that the choice of backend and tile may depend on."""

    own: bool  # every query has its own n_d candidates
    n_q: int
    n_d: int
    l_q: int
    l_d: int
    dim: int
    q_dtype: torch.dtype
    d_dtype: torch.dtype
    device: torch.device
    q_masked: bool
    d_masked: bool
    normalize: bool
    argmax: bool
    train: bool
    matmul_precision: str

    @property
    def dtype(self) -> torch.dtype:
        """The promoted dtype of q and d: what the products are taken in."""
        return torch.promote_types(self.q_dtype, self.d_dtype)


def problem(args: Arguments, *, normalize: bool, argmax: bool, train: bool) -> Problem:
    q, d = args.q, args.d
    n_q, l_q, dim = q.shape
    *own, n_d, l_d, _ = d.shape
    return Problem(
        bool(own), n_q, n_d, l_q, l_d, dim, q.dtype, d.dtype, q.device,
        args.q_mask is not None, args.d_mask is not None, normalize, argmax, train,
        torch.get_float32_matmul_precision(),
    )  # fmt: skip


def options(*, normalize, empty_score, return_argmax, backend) -> float:
    """Checks the keyword options; returns empty_score as a float."""
    for name, value in (("normalize", normalize), ("return_argmax", return_argmax)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a Python bool, got {type(value).__module__}.{type(value).__name__}")
    # numbers.Real is an abstract class: asking it takes 0.4 µs
    if type(empty_score) is not float and (isinstance(empty_score, bool) or not isinstance(empty_score, numbers.Real)):
        raise TypeError(f"empty_score must be a number, got {type(empty_score).__name__}")
    if FLOAT32_MAX < abs(empty_score) < math.inf:
        raise ValueError(f"empty_score must be infinite or within the range of float32, got {empty_score}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return float(empty_score)


def tokens(name: str, x, dims: tuple[int, ...], shapes: str) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a list of them, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor or a jagged nested tensor, got layout {x.layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() not in dims:
        raise ValueError(f"{name} must be {shapes}, got shape {list(x.shape)}")


def mask(name: str, m, of: str, x: torch.Tensor) -> torch.Tensor | None:
    """Any bool, int or float mask of exactly ``x.shape[:-1]`` → bool."""
    if m is None:
        return None
    if not isinstance(m, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(m).__name__}")
    if m.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {m.layout}")
    if m.dtype.is_complex:
        raise TypeError(f"{name} must be bool, int or float, got {m.dtype}")
    if m.shape != x.shape[:-1]:
        raise ValueError(f"{name} must have the leading shape of {of}, {list(x.shape[:-1])}; got shape {list(m.shape)}")
    if m.device != x.device:
        raise ValueError(f"{name} must be on the device of {of}, {x.device}; got {m.device}")
    return m if m.dtype == torch.bool else m != 0


def arguments(q, d, q_mask=None, d_mask=None, *, pairs: bool = False) -> Arguments:
    """Canonical tensors of dense arguments. ``pairs``: row b of q meets row b of d alone."""
    if pairs:
        tokens("q", q, (3,), "[b, l_q, dim]")
        tokens("d", d, (3,), "[b, l_d, dim]")
    else:
        tokens("q", q, (2, 3), "[l_q, dim] or [n_q, l_q, dim]")
        tokens("d", d, (2, 3, 4), "[l_d, dim], [n_d, l_d, dim] or [n_q, k, l_d, dim]")
    if q.device != d.device:
        raise ValueError(f"q and d must be on one device; got q on {q.device} and d on {d.device}")
    if q.shape[-1] != d.shape[-1]:
        raise ValueError(f"q and d must have the same dim (last axis); got q {list(q.shape)} and d {list(d.shape)}")
    if q.shape[-1] < 1:
        raise ValueError(f"dim (last axis of q and d) must be at least 1; got q {list(q.shape)}")
    if q.shape[-2] < 1:
        raise ValueError(f"q must have at least one token (l_q >= 1); got q {list(q.shape)}")
    if d.dim() == 4 and (q.dim() != 3 or q.shape[0] != d.shape[0]):
        raise ValueError(
            "own candidates d [n_q, k, l_d, dim] need q [n_q, l_q, dim] with the same n_q; "
            f"got q {list(q.shape)} and d {list(d.shape)}"
        )
    if pairs and q.shape[0] != d.shape[0]:
        raise ValueError(
            f"pairs need q and d with the same b (first axis); got q {list(q.shape)} and d {list(d.shape)}"
        )
    q_mask, d_mask = mask("q_mask", q_mask, "q", q), mask("d_mask", d_mask, "d", d)
    one_query, one_document = q.dim() == 2, d.dim() == 2
    if one_query:
        q, q_mask = q.unsqueeze(0), None if q_mask is None else q_mask.unsqueeze(0)
    if one_document or pairs:
        axis = 1 if pairs else 0
        d, d_mask = d.unsqueeze(axis), None if d_mask is None else d_mask.unsqueeze(axis)
    return Arguments(q, d, q_mask, d_mask, one_query, one_document or pairs)
