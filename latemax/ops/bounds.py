"""The operator of bounds, registered with torch.library, and its choice of backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latemax.ops.backends import bounds
from latemax.ops.problem import Batch, Codes, Side

_library = torch.library.Library("latemax", "FRAGMENT")  # kept alive: the registrations end with it
# exported programs hold these names: arguments are only ever appended
_library.define(
    "maxsim_bounds(Tensor q, Tensor d, Tensor scale, Tensor error, Tensor? q_mask, Tensor? d_mask, bool normalize, "
    "float? empty_score, str backend, Tensor? cu_q=None, Tensor? cu_d=None, Tensor? candidates=None, "
    "Tensor? q_weights=None, bool mean=False, bool coarse=False) -> (Tensor, Tensor)"
)


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


def _forward(*args) -> tuple[Tensor, Tensor]:
    b = _batch(*args)
    lower, upper = _allocate(b)
    if lower.numel():
        bounds.forward(b, lower, upper)
    return lower, upper


for _key in ("CPU", "CUDA"):
    _library.impl("maxsim_bounds", _forward, _key)


@torch.library.register_fake("latemax::maxsim_bounds", lib=_library)
def _(*args) -> tuple[Tensor, Tensor]:
    return _allocate(_batch(*args))


def _check(b: Batch, backend: str) -> None:
    device = b.q.tokens.device
    if backend in ("triton", "cuda"):
        raise RuntimeError(f"backend={backend!r} cannot run: it has no bounds, which blocks of torch matmul compute")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend='cpu' needs tensors on the CPU; got {device}")


def maxsim_bounds(b: Batch, backend: str, *, coarse: bool = False) -> tuple[Tensor, Tensor]:
    """(lower, upper), [n_q, n_d]. coarse: a backend may round q to 8 bits, which is faster and loosens the bounds."""
    _check(b, backend)
    b = b.joined()
    q, d, codes = b.q, b.d, b.d.codes
    assert codes is not None and codes.error is not None
    empty_score = None if b.empty_score == -math.inf else b.empty_score
    with torch.no_grad():
        return torch.ops.latemax.maxsim_bounds(
            q.tokens, d.tokens, codes.scale, codes.error, q.mask, d.mask, b.normalize, empty_score, backend, q.offsets,
            d.offsets, b.candidates, q.weights, b.mean, coarse,
        )  # fmt: skip
