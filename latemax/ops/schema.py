"""The operators as torch.library knows them: for torch.compile, torch.export, FakeTensor, vmap, tensor subclasses.

Eager calls on plain tensors go straight to the launcher: the dispatcher costs more microseconds than small problems do.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from latemax import _check
from latemax.ops import autograd, launch, native_cpu_backend

_library = torch.library.Library("latemax", "DEF")  # kept alive: the registrations end with it
_library.define(
    "maxsim(Tensor q, Tensor d, Tensor? q_mask, Tensor? d_mask, bool normalize, float empty_score, bool argmax, "
    "str backend, Tensor? cu_q=None, Tensor? cu_d=None, Tensor? candidates=None) -> (Tensor, Tensor)"
)
_library.define(
    "maxsim_backward(Tensor g, Tensor q, Tensor d, Tensor argmax, bool normalize, bool needs_q, bool needs_d, "
    "str backend, Tensor? cu_q=None, Tensor? cu_d=None, Tensor? candidates=None) -> (Tensor, Tensor)"
)


# an operator returns tensors, not None: an output that is not wanted has no element
def _forward(q, d, *args):
    scores, winners = launch.forward(q, d, *args)
    return scores, q.new_empty(0, dtype=torch.int32) if winners is None else winners


def _backward(g, q, d, *args):
    grads = launch.backward(g, q, d, *args)
    return tuple(x.new_empty(0) if grad is None else grad for grad, x in zip(grads, (q, d), strict=True))


for _key in ("CPU", "CUDA"):
    _library.impl("maxsim", _forward, _key)
    _library.impl("maxsim_backward", _backward, _key)


@torch.library.register_fake("latemax::maxsim", lib=_library)
def _(q, d, q_mask, d_mask, normalize, empty_score, argmax, backend, cu_q=None, cu_d=None, candidates=None):
    return launch.allocate(q, d, argmax, _check.Packing(cu_q, cu_d, candidates))


@torch.library.register_fake("latemax::maxsim_backward", lib=_library)
def _(g, q, d, argmax, normalize, needs_q, needs_d, backend, cu_q=None, cu_d=None, candidates=None):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for x, needed in ((q, needs_q), (d, needs_d))
    )


def _setup(ctx, inputs, output):
    q, d, _, _, ctx.normalize, _, argmax, ctx.backend, *packing = inputs
    if not argmax:
        raise RuntimeError("latemax::maxsim must be called with argmax=True where a gradient is needed")
    ctx.save_for_backward(q, d, output[1], *packing)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, g, _):
    q, d, argmax, *packing = ctx.saved_tensors
    needs_q, needs_d = ctx.needs_input_grad[:2]
    grad_q, grad_d = torch.ops.latemax.maxsim_backward(
        g, q, d, argmax, ctx.normalize, needs_q, needs_d, ctx.backend, *packing
    )
    return (grad_q if needs_q else None, grad_d if needs_d else None, *[None] * 9)


def _refuse(ctx, *_):
    raise RuntimeError(autograd.SECOND_DERIVATIVE)


torch.library.register_autograd("latemax::maxsim", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("latemax::maxsim_backward", _refuse, lib=_library)


def _no_mode() -> bool:
    """No dispatch mode and no functorch transform is at work."""
    return torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None


def _plain(*tensors) -> bool:
    """Nothing but eager execution of ordinary tensors is going on."""
    return _no_mode() and all(x is None or type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors)


def _refuse_transforms(*tensors) -> None:
    """What an operator registered with torch.library can't be differentiated by, said before it goes wrong.

    A tangent of forward-mode differentiation would be dropped in silence.
    """
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("maxsim has no forward-mode derivative (jvp); use reverse mode")
    level = torch._C._functorch.peek_interpreter_stack()
    if level is not None and level.key() == torch._C._functorch.TransformType.Grad:
        # torch's own error for any operator registered this way speaks of a setup_context that no caller wrote
        raise NotImplementedError(
            "maxsim runs under torch.func.vmap, not under torch.func.grad; use torch.autograd.grad"
        )


def at_once(q, d, normalize: bool, empty_score: float, backend: str) -> torch.Tensor | None:
    """Scores by the native CPU kernel where they take neither masks, winners nor a gradient and nothing but eager
    execution of ordinary tensors is going on; else None. All that is checked and arranged elsewhere is right already,
    and would take longer than a small problem does."""
    if (
        torch.compiler.is_compiling()
        or type(q) is not torch.Tensor
        or type(d) is not torch.Tensor
        or backend not in ("auto", "cpu")
        or ((q.requires_grad or d.requires_grad) and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
        or not _no_mode()
    ):
        return None
    return native_cpu_backend.score(q, d, normalize, empty_score)


def maxsim(args, normalize: bool, empty_score: float, want_argmax: bool, backend: str):
    """Canonical arguments → (scores, argmax), by the shortest way that is right here."""
    q, d, q_mask, d_mask, _, _, packing = args
    train = torch.is_grad_enabled() and (q.requires_grad or d.requires_grad)
    if not torch.compiler.is_compiling():
        _refuse_transforms(q, d)
        if _plain(q, d, q_mask, d_mask):
            if train:
                return autograd.MaxSim.apply(q, d, q_mask, d_mask, normalize, empty_score, backend, *packing)
            return launch.forward(q, d, q_mask, d_mask, normalize, empty_score, want_argmax, backend, *packing)
    return torch.ops.latemax.maxsim(
        q, d, q_mask, d_mask, normalize, empty_score, want_argmax or train, backend, *packing
    )
