"""The operator of bounds, registered with torch.library, and its choice of backend."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latemax.ops import dispatch, operator
from latemax.ops.backends import bounds, native, triton
from latemax.ops.problem import Batch, Codes, Side, problem_of

_library = torch.library.Library("latemax", "FRAGMENT")  # kept alive: the registrations end with it
# exported programs hold these names: arguments are only ever appended
_library.define(
    "maxsim_bounds(Tensor q, Tensor d, Tensor scale, Tensor error, Tensor? q_mask, Tensor? d_mask, bool normalize, "
    "float? empty_score, str backend, Tensor? cu_q=None, Tensor? cu_d=None, Tensor? candidates=None, "
    "Tensor? q_weights=None, bool mean=False, bool coarse=False) -> (Tensor, Tensor)"
)


COARSE = 14  # its place among the arguments


def _batch(
    q: Tensor, d: Tensor, scale: Tensor, error: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, normalize: bool,
    empty_score: float | None, backend: str, q_offsets: Tensor | None = None, d_offsets: Tensor | None = None,
    candidates: Tensor | None = None, q_weights: Tensor | None = None, mean: bool = False, coarse: bool = False,
) -> Batch:  # fmt: skip
    queries = Side(q, q_mask, q_offsets, weights=q_weights)
    documents = Side(d, d_mask, d_offsets, codes=Codes("int8", q.shape[-1], scale, error))
    empty_score = -math.inf if empty_score is None else empty_score
    return Batch(queries, documents, candidates, normalize, empty_score, mean=mean)


def _allocate(b: Batch) -> tuple[Tensor, Tensor]:
    shape, dtype = (b.n_q, b.n_d), b.score_dtype
    return b.q.tokens.new_empty(shape, dtype=dtype), b.q.tokens.new_empty(shape, dtype=dtype)


def _run(b: Batch, backend: str, coarse: bool) -> tuple[Tensor, Tensor]:
    plan = dispatch.plan_for(problem_of(b, argmax=False, bounds="coarse" if coarse else "exact"), backend)
    lower, upper = _allocate(b)
    if plan.backend == native.name:
        native.bounds(b, plan, lower, upper, coarse=coarse)
    elif lower.numel() and plan.backend == triton.name:
        triton.bounds(b.joined(documents=False), plan, lower, upper, coarse=coarse)
    elif lower.numel():
        bounds.forward(b.joined(), lower, upper)
    return lower, upper


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _run(_batch(*args), args[8], len(args) > COARSE and args[COARSE])


for _key in ("CPU", "CUDA"):
    _library.impl("maxsim_bounds", _forward, _key)


@torch.library.register_fake("latemax::maxsim_bounds", lib=_library)
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return _allocate(_batch(*args))


def maxsim_bounds(b: Batch, backend: str, *, coarse: bool = False) -> tuple[Tensor, Tensor]:
    """(lower, upper), [n_q, n_d]. coarse: a backend may round q to 8 bits, which is faster and loosens the bounds."""
    q, d, codes = b.q, b.d, b.d.codes
    if not torch.compiler.is_compiling() and operator.plain(q.tokens, d.tokens, q.mask, d.mask, q.weights):
        with torch.no_grad():
            return _run(b, backend, coarse)
    b = b.joined()
    q, d = b.q, b.d
    assert codes is not None and codes.error is not None
    empty_score = None if b.empty_score == -math.inf else b.empty_score
    with torch.no_grad():
        return torch.ops.latemax.maxsim_bounds(
            q.tokens, d.tokens, codes.scale, codes.error, q.mask, d.mask, b.normalize, empty_score, backend, q.offsets,
            d.offsets, b.candidates, q.weights, b.mean, coarse,
        )  # fmt: skip
