"""The operator as torch knows it: autograd in eager mode, torch.library for compile, export, FakeTensor and vmap.

Eager calls on plain tensors go straight to ``dispatch``: the dispatcher costs more microseconds than a small problem.
Only this file spells a batch out as the flat arguments that a torch.library schema allows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from latemax.ops import dispatch
from latemax.ops.backends import native
from latemax.ops.problem import Batch, Codes, Needs, Side, allocate, problem_of

SECOND_DERIVATIVE = (
    "maxsim has no second derivative: its gradient was asked to be differentiated again "
    "(use latemax.reference.maxsim where double backward is needed)"
)

_library = torch.library.Library("latemax", "DEF")  # kept alive: the registrations end with it
# empty_score: None for -inf, which AOTInductor of torch 2.13 writes as a string that it cannot read back;
# exported programs and inductor's cache hold these names: arguments are only ever appended
_library.define(
    "maxsim(Tensor q, Tensor d, Tensor? q_mask, Tensor? d_mask, bool normalize, float? empty_score, bool argmax, "
    "str backend, Tensor? cu_q=None, Tensor? cu_d=None, Tensor? candidates=None, Tensor? q_weights=None, "
    "bool mean=False, Tensor? q_scale=None, Tensor? d_scale=None, str q_kind='', str d_kind='', int dim=0) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "maxsim_backward(Tensor g, Tensor q, Tensor d, Tensor argmax, bool normalize, bool needs_q, bool needs_d, "
    "str backend, Tensor? cu_q=None, Tensor? cu_d=None, Tensor? candidates=None, Tensor? q_weights=None, "
    "Tensor? q_mask=None, bool mean=False, bool needs_weights=False, Tensor? q_scale=None, Tensor? d_scale=None, "
    "str q_kind='', str d_kind='', int dim=0) -> (Tensor, Tensor, Tensor)"
)


def _batch(
    q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, normalize: bool, empty_score: float | None,
    argmax: bool, backend: str, q_offsets: Tensor | None = None, d_offsets: Tensor | None = None,
    candidates: Tensor | None = None, q_weights: Tensor | None = None, mean: bool = False, *codes: Any,
) -> Batch:  # fmt: skip
    empty_score = -math.inf if empty_score is None else empty_score
    q_codes, d_codes = _codes(*codes)
    queries = Side(q, q_mask, q_offsets, weights=q_weights, codes=q_codes)
    documents = Side(d, d_mask, d_offsets, codes=d_codes)
    return Batch(queries, documents, candidates, normalize, empty_score, mean=mean)


def _codes(
    q_scale: Tensor | None = None, d_scale: Tensor | None = None, q_kind: str = "", d_kind: str = "", dim: int = 0
) -> tuple[Codes | None, Codes | None]:
    """Of q and of d."""
    q_codes = None if q_scale is None else Codes(q_kind, dim, q_scale)
    return q_codes, None if d_scale is None else Codes(d_kind, dim, d_scale)


def _flat_codes(b: Batch) -> tuple:
    q, d = b.q.codes, b.d.codes
    if d is None:
        return None, None, "", "", 0
    return None if q is None else q.scale, d.scale, "" if q is None else q.kind, d.kind, d.dim


def _flat(b: Batch, argmax: bool, backend: str) -> tuple:
    q, d = b.q, b.d
    empty_score = None if b.empty_score == -math.inf else b.empty_score
    return (
        q.tokens, d.tokens, q.mask, d.mask, b.normalize, empty_score, argmax, backend, q.offsets, d.offsets,
        b.candidates, q.weights, b.mean, *_flat_codes(b),
    )  # fmt: skip


def _for_backward(
    q: Tensor, d: Tensor, normalize: bool, mean: bool, q_offsets: Tensor | None, d_offsets: Tensor | None,
    candidates: Tensor | None, q_weights: Tensor | None, q_mask: Tensor | None, *codes: Any,
) -> Batch:  # fmt: skip
    q_codes, d_codes = _codes(*codes)
    queries = Side(q, q_mask, q_offsets, weights=q_weights, codes=q_codes)
    return Batch(queries, Side(d, None, d_offsets, codes=d_codes), candidates, normalize, mean=mean)


# an operator returns tensors, not None: an output that is not wanted has no element
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    b = _batch(*args)
    (scores, argmax), _ = dispatch.forward(b, args[6], args[7])
    return scores, b.q.tokens.new_empty(0, dtype=torch.int32) if argmax is None else argmax


def _backward(
    g: Tensor, q: Tensor, d: Tensor, argmax: Tensor, normalize: bool, needs_q: bool, needs_d: bool, backend: str,
    q_offsets: Tensor | None = None, d_offsets: Tensor | None = None, candidates: Tensor | None = None,
    q_weights: Tensor | None = None, q_mask: Tensor | None = None, mean: bool = False, needs_weights: bool = False,
    *codes: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    b = _for_backward(q, d, normalize, mean, q_offsets, d_offsets, candidates, q_weights, q_mask, *codes)
    # the same facts give the plan that ran forward
    plan = dispatch.plan_for(problem_of(b, argmax=True), backend)
    grads = dispatch.backward(b, plan, argmax, g, Needs(needs_q, needs_d, needs_weights))
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


for _key in ("CPU", "CUDA"):
    _library.impl("maxsim", _forward, _key)
    _library.impl("maxsim_backward", _backward, _key)


@torch.library.register_fake("latemax::maxsim", lib=_library)
def _(*args: Any) -> tuple[Tensor, Tensor]:
    scores, argmax = allocate(_batch(*args), args[6])
    return scores, args[0].new_empty(0, dtype=torch.int32) if argmax is None else argmax


@torch.library.register_fake("latemax::maxsim_backward", lib=_library)
def _(
    g: Tensor, q: Tensor, d: Tensor, argmax: Tensor, normalize: bool, needs_q: bool, needs_d: bool, backend: str,
    q_offsets: Tensor | None = None, d_offsets: Tensor | None = None, candidates: Tensor | None = None,
    q_weights: Tensor | None = None, q_mask: Tensor | None = None, mean: bool = False, needs_weights: bool = False,
    *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        q.new_empty(0) if x is None or not needed else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, needed in ((q, needs_q), (d, needs_d), (q_weights, needs_weights))
    )


def _save(ctx: Any, b: Batch, argmax: Tensor, backend: str) -> None:
    q, d = b.q, b.d
    # only the mean needs a mask: argmax names no masked token
    mask = q.mask if b.mean else None
    *scales, q_kind, d_kind, dim = _flat_codes(b)
    ctx.save_for_backward(q.tokens, d.tokens, argmax, q.offsets, d.offsets, b.candidates, q.weights, mask, *scales)
    ctx.normalize, ctx.mean, ctx.backend, ctx.codes = b.normalize, b.mean, backend, (q_kind, d_kind, dim)
    ctx.mark_non_differentiable(argmax)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    if not inputs[6]:
        raise RuntimeError("latemax::maxsim must be called with argmax=True where a gradient is needed")
    _save(ctx, _batch(*inputs), output[1], inputs[7])


def _gradients(ctx: Any, g: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    """By the registered operator, of q, d and the weights."""
    q, d, argmax, *rest, q_scale, d_scale = ctx.saved_tensors
    grads = torch.ops.latemax.maxsim_backward(
        g, q, d, argmax, ctx.normalize, needs.q, needs.d, ctx.backend, *rest, ctx.mean, needs.weights, q_scale, d_scale,
        *ctx.codes,
    )  # fmt: skip
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


# the place of q_weights among the arguments of the operator, and how many follow
WEIGHTS, AFTER_WEIGHTS = 11, 6


def _differentiate(ctx: Any, g: Tensor, _: Tensor | None) -> tuple:
    needed = ctx.needs_input_grad  # arguments that are their defaults may be missing at the end
    of_q, of_d, of_weights = _gradients(ctx, g, Needs(needed[0], needed[1], any(needed[WEIGHTS : WEIGHTS + 1])))
    grads = (of_q, of_d, *[None] * (WEIGHTS - 2), of_weights, *[None] * AFTER_WEIGHTS)
    return grads[: len(needed)]


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(SECOND_DERIVATIVE)


torch.library.register_autograd("latemax::maxsim", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("latemax::maxsim_backward", _refuse, lib=_library)


class _MaxSim(torch.autograd.Function):
    """scores, argmax of a batch in eager mode. Its tensors that may need a gradient are arguments of their own, since
    autograd sees no others."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, d: Tensor, weights: Tensor | None, b: Batch, backend: str
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (scores, argmax), ctx.plan = dispatch.forward(b, True, backend)
        assert argmax is not None
        _save(ctx, b, argmax, backend)
        return scores, argmax

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple:
        needs = Needs(*ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() or not plain(g) or torch._C._functorch.is_legacy_batchedtensor(g):
            # the registered operator refuses a second derivative, and takes tensors that are not plain
            return (*_gradients(ctx, g, needs), None, None)
        q, d, argmax, *rest = ctx.saved_tensors
        b = _for_backward(q, d, ctx.normalize, ctx.mean, *rest, *ctx.codes)
        return (*dispatch.backward(b, ctx.plan, argmax, g, needs), None, None)


def no_mode() -> bool:
    """No dispatch mode, no functorch transform and no ``torch.jit.trace`` is active."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def plain(*tensors: Tensor | None) -> bool:
    """Eager execution of ordinary tensors."""
    return no_mode() and all(x is None or type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors)


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """Refuses transforms that an operator registered with torch.library cannot be differentiated by.

    A tangent of forward-mode differentiation would be dropped in silence.
    """
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise NotImplementedError(f"{name} has no forward-mode derivative (jvp); use reverse mode")
    level = torch._C._functorch.peek_interpreter_stack()
    if level is not None and level.key() == torch._C._functorch.TransformType.Grad:
        # torch's own error for any operator registered this way mentions a setup_context that no caller wrote
        raise NotImplementedError(
            f"{name} runs under torch.func.vmap, not under torch.func.grad; use torch.autograd.grad"
        )


def fast_path(q: Any, d: Any, normalize: bool, empty_score: float, backend: str) -> Tensor | None:
    """Scores of plain eager CPU tensors without masks, argmax or gradient. None if it does not apply.

    Skips validation, which would cost more than a small problem.
    """
    if (
        torch.compiler.is_compiling()
        or type(q) is not torch.Tensor
        or type(d) is not torch.Tensor
        or backend not in ("auto", "cpu")
        or ((q.requires_grad or d.requires_grad) and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
        or not no_mode()
    ):
        return None
    return native.score(q, d, normalize, empty_score)


def needs_gradient(b: Batch) -> bool:
    weights = b.q.weights
    return (
        b.q.tokens.requires_grad or b.d.tokens.requires_grad or (weights is not None and weights.requires_grad)
    )  # fmt: skip


def maxsim(b: Batch, want_argmax: bool, backend: str) -> tuple[Tensor, Tensor | None]:
    """(scores, argmax); argmax is None or empty where it is not wanted."""
    q, d, weights = b.q.tokens, b.d.tokens, b.q.weights
    train = torch.is_grad_enabled() and needs_gradient(b)
    if not torch.compiler.is_compiling():
        refuse_transforms("maxsim", q, d, weights)
        eager = plain(q, d, b.q.mask, b.d.mask) and (weights is None or plain(weights))
        if eager and not train:
            return dispatch.forward(b, want_argmax, backend)[0]
    b = b.joined()
    if not torch.compiler.is_compiling():
        if eager:
            return _MaxSim.apply(b.q.tokens, b.d.tokens, b.q.weights, b, backend)
        # below a vmap, a tensor may require a gradient although none here does
        train = train or (torch.is_grad_enabled() and not no_mode())
    return torch.ops.latemax.maxsim(*_flat(b, want_argmax or train, backend))
