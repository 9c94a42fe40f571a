"""Differentiation in eager mode; the formulas are shared with the registered operator."""

from __future__ import annotations

import torch

from latemax.ops import launch

SECOND_DERIVATIVE = (
    "maxsim has no second derivative: its gradient was asked to be differentiated again "
    "(use latemax.reference.maxsim where double backward is needed)"
)


class MaxSim(torch.autograd.Function):
    """scores, argmax = MaxSim.apply(...); gradients flow through scores alone."""

    @staticmethod
    def forward(ctx, q, d, q_mask, d_mask, normalize, empty_score, backend, cu_q, cu_d, candidates):
        scores, argmax = launch.forward(
            q, d, q_mask, d_mask, normalize, empty_score, True, backend, cu_q, cu_d, candidates
        )
        ctx.save_for_backward(q, d, argmax, cu_q, cu_d, candidates)
        ctx.normalize, ctx.backend = normalize, backend
        ctx.mark_non_differentiable(argmax)
        return scores, argmax

    @staticmethod
    def backward(ctx, g, _):
        q, d, argmax, *packing = ctx.saved_tensors
        needs_q, needs_d = ctx.needs_input_grad[:2]
        grads = MaxSimBackward.apply(g, q, d, argmax, ctx.normalize, needs_q, needs_d, ctx.backend, *packing)
        return (*grads, *[None] * 8)


class MaxSimBackward(torch.autograd.Function):
    """The gradient as a function of its own, so that differentiating it again is refused in clear words."""

    @staticmethod
    def forward(ctx, *args):
        return launch.backward(*args)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(SECOND_DERIVATIVE)
