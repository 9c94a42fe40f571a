"""The operator of the smooth maximum, registered with torch.library, and its choice of backend.

Eager calls go through the dispatcher too: an exponential for every similarity costs more than that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latemax import reference
from latemax.ops.backends import smooth, triton
from latemax.ops.backends.base import WrongDevice
from latemax.ops.operator import refuse_transforms
from latemax.ops.problem import Batch, Needs, Side, problem_of

SECOND_DERIVATIVE = (
    "smooth_maxsim has no second derivative: its gradient was asked to be differentiated again "
    "(use latemax.reference.smooth_maxsim where double backward is needed)"
)
_library = torch.library.Library("latemax", "FRAGMENT")  # kept alive: the registrations end with it
# exported programs hold these names: arguments are only ever appended
_library.define(
    "smooth_maxsim(Tensor q, Tensor d, Tensor? q_mask, Tensor? d_mask, float tau, bool normalize, float? empty_score, "
    "Tensor? cu_q=None, Tensor? cu_d=None, bool kernels=False) -> Tensor"
)
_library.define(
    "smooth_maxsim_backward(Tensor g, Tensor q, Tensor d, Tensor? q_mask, Tensor? d_mask, float tau, bool normalize, "
    "bool needs_q, bool needs_d, Tensor? cu_q=None, Tensor? cu_d=None, bool kernels=False) -> (Tensor, Tensor)"
)


def _batch(
    q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, normalize: bool, empty_score: float | None,
    q_offsets: Tensor | None, d_offsets: Tensor | None,
) -> Batch:  # fmt: skip
    empty_score = -math.inf if empty_score is None else empty_score
    return Batch(Side(q, q_mask, q_offsets), Side(d, d_mask, d_offsets), None, normalize, empty_score)


def _allocate(b: Batch) -> Tensor:
    return b.q.tokens.new_empty((b.n_q, b.n_d), dtype=b.score_dtype)


def _forward(
    q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, tau: float, normalize: bool,
    empty_score: float | None, q_offsets: Tensor | None = None, d_offsets: Tensor | None = None,
    kernels: bool = False,
) -> Tensor:  # fmt: skip
    b = _batch(q, d, q_mask, d_mask, normalize, empty_score, q_offsets, d_offsets)
    scores = _allocate(b)
    smooth.forward(b, tau, scores, kernels)
    return scores


def _backward(
    g: Tensor, q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, tau: float, normalize: bool,
    needs_q: bool, needs_d: bool, q_offsets: Tensor | None = None, d_offsets: Tensor | None = None,
    kernels: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b = _batch(q, d, q_mask, d_mask, normalize, None, q_offsets, d_offsets)
    grads = smooth.backward(b, tau, g, Needs(needs_q, needs_d), kernels)
    none = q.new_empty(0)
    return none if grads.q is None else grads.q, d.new_empty(0) if grads.d is None else grads.d


for _key in ("CPU", "CUDA"):
    _library.impl("smooth_maxsim", _forward, _key)
    _library.impl("smooth_maxsim_backward", _backward, _key)


@torch.library.register_fake("latemax::smooth_maxsim", lib=_library)
def _(
    q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, tau: float, normalize: bool,
    empty_score: float | None, q_offsets: Tensor | None = None, d_offsets: Tensor | None = None,
    kernels: bool = False,
) -> Tensor:  # fmt: skip
    return _allocate(_batch(q, d, q_mask, d_mask, normalize, empty_score, q_offsets, d_offsets))


@torch.library.register_fake("latemax::smooth_maxsim_backward", lib=_library)
def _(
    g: Tensor, q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, tau: float, normalize: bool,
    needs_q: bool, needs_d: bool, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for x, needed in ((q, needs_q), (d, needs_d))
    )


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    q, d, q_mask, d_mask, ctx.tau, ctx.normalize, _, q_offsets, d_offsets, ctx.kernels = inputs
    ctx.save_for_backward(q, d, q_mask, d_mask, q_offsets, d_offsets)


def _differentiate(ctx: Any, g: Tensor) -> tuple:
    q, d, q_mask, d_mask, *offsets = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = torch.ops.latemax.smooth_maxsim_backward(
        g, q, d, q_mask, d_mask, ctx.tau, ctx.normalize, *needs[:2], *offsets, ctx.kernels
    )
    given = (grad if needed else None for grad, needed in zip(grads, needs[:2], strict=True))
    return (*given, *[None] * (len(needs) - 2))


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(SECOND_DERIVATIVE)


torch.library.register_autograd("latemax::smooth_maxsim", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("latemax::smooth_maxsim_backward", _refuse, lib=_library)


def _kernels(b: Batch, backend: str) -> bool:
    """Whether Triton's kernels run, and not blocks of torch matmul."""
    device = b.q.tokens.device
    if backend == "cuda":
        raise RuntimeError("backend='cuda' cannot run: the CUDA kernels have no smooth maximum")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend='cpu' needs tensors on the CPU; got {device}")
    if backend != "reference" and device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"q and d must be on a CPU or CUDA device; got {device} (backend='reference' runs anywhere)"
        )  # fmt: skip
    if backend != "triton" and (backend != "auto" or device.type != "cuda"):
        return False
    reason = triton.why_not(problem_of(b, argmax=False), True)
    if backend == "triton" and reason:
        wrong_device = isinstance(reason, WrongDevice)
        raise (
            ValueError(f"backend='triton' {reason}")
            if wrong_device
            else RuntimeError(f"backend='triton' cannot run: {reason}")
        )
    return not reason


def smooth_maxsim(b: Batch, tau: float, backend: str) -> Tensor:
    """Scores [n_q, n_d].

    Raises:
        ValueError: backend="cpu" with tensors elsewhere, or a device that is neither a CPU nor CUDA.
        RuntimeError: a backend without a smooth maximum.
    """
    kernels = _kernels(b, backend)
    b = b.joined()
    q, d = b.q, b.d
    if backend == "reference":
        return _reference(b, tau)
    if not torch.compiler.is_compiling():
        refuse_transforms("smooth_maxsim", q.tokens, d.tokens)
    empty_score = None if b.empty_score == -math.inf else b.empty_score
    return torch.ops.latemax.smooth_maxsim(
        q.tokens, d.tokens, q.mask, d.mask, tau, b.normalize, empty_score, q.offsets, d.offsets, kernels
    )


def _reference(b: Batch, tau: float) -> Tensor:
    """The oracle, which autograd differentiates itself."""

    def items(s: Side) -> tuple[Any, Any]:
        if s.offsets is None:
            return s.tokens, s.mask
        lengths = s.offsets.diff().tolist()
        total = sum(lengths)
        return s.tokens[:total].split(lengths), None if s.mask is None else s.mask[:total].split(lengths)

    options: dict[str, Any] = dict(tau=tau, normalize=b.normalize, empty_score=b.empty_score)
    (q, q_mask), (d, d_mask) = items(b.q), items(b.d)
    if not (b.own and b.q.offsets is not None):
        return reference.smooth_maxsim(q, d, q_mask, d_mask, **options)
    rows = [
        reference.smooth_maxsim(
            x, d[a], None if q_mask is None else q_mask[a], None if d_mask is None else d_mask[a], **options
        )
        for a, x in enumerate(q)
    ]
    return torch.stack(rows) if rows else _allocate(b)
