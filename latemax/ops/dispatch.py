"""Chooses a backend for a problem, allocates the outputs, runs it, and runs its backward.

``auto`` takes the first backend of the device's list that gives no reason against the problem. Nothing falls back in
silence: each reason is a note of the plan, and an error lists them all.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from latemax.ops import tiles
from latemax.ops.backends import blocks, cuda, gather, native, reference, triton
from latemax.ops.backends.base import Backend, PreparedLaunch, Status, WrongDevice
from latemax.ops.problem import Batch, Codes, Gradients, Needs, Plan, Problem, allocate, problem_of

# what backend="auto" tries on a device, and what each name tries
AUTO: dict[str, tuple[Backend, ...]] = {"cpu": (native, blocks), "cuda": (cuda, triton, reference)}
BY_NAME: dict[str, tuple[Backend, ...]] = {
    "triton": (triton,),
    "cuda": (cuda,),
    "cpu": (native, blocks),
    "reference": (reference,),
}
MODULES: dict[str, Backend] = {backend.name: backend for group in BY_NAME.values() for backend in group}


class Choice(NamedTuple):
    """The backend that would run, and why.

    Attributes:
        backend: "triton", "cuda", "cpu" or "reference".
        why: the reason for this backend.
        tile: of the Triton backend, else None.
        notes: why each other backend does not run.
        native: of backend "cpu": True for the native kernel, False for blocked torch matmul.
    """

    backend: str
    why: str
    tile: tiles.TileConfig | None = None
    notes: tuple[str, ...] = ()
    native: bool = False


def backend_status() -> dict[str, tuple[bool, str]]:
    """Backend name → (usable here, reason)."""
    status: dict[str, tuple[bool, str]] = {
        name: backends[0].status() for name, backends in BY_NAME.items() if len(backends) == 1
    }
    usable, reason = native.status()
    threads = f"on {torch.get_num_threads()} threads"
    fast = f"{reason} {threads}; blocked torch matmul for float64"
    slow = f"blocked torch matmul {threads}; {reason}"
    status["cpu"] = Status(True, fast if usable else slow)
    return {name: status[name] for name in BY_NAME}


# remembered: a known problem costs a look-up instead of a search of the tile table
@functools.lru_cache(maxsize=4096)
def plan_for(p: Problem, asked: str) -> Plan:
    """What runs ``p`` under ``backend=asked``.

    Raises:
        ValueError: no backend takes tensors on this device.
        RuntimeError: a backend asked for by name, or all that auto could take, cannot run; the message says why.
    """
    by_name = asked != "auto"
    if asked != "reference" and p.device.type not in AUTO:
        raise ValueError(f"q and d must be on a CPU or CUDA device; got {p.device} (backend='reference' runs anywhere)")
    tried = BY_NAME[asked] if by_name else AUTO[p.device.type]
    reasons: dict[str, str] = {}
    for backend in tried:
        reason = backend.why_not(p, by_name)
        if not reason:
            plan = backend.plan(p, by_name)
            later = {other.name: _comes_later(other, p, backend) for other in tried if other.name not in reasons}
            del later[backend.name]
            return plan._replace(notes=(*plan.notes, *reasons.values(), *later.values()))
        reasons[backend.name] = reason
    if by_name:
        reason = reasons[tried[0].name]
        if isinstance(reason, WrongDevice):
            raise ValueError(f"backend={asked!r} {reason}")
        raise RuntimeError(f"backend={asked!r} cannot run: {reason}")
    raise RuntimeError(
        f"backend={asked!r} cannot run on {p.device}: " + "; ".join(f"{name}: {why}" for name, why in reasons.items())
    )


def _comes_later(backend: Backend, p: Problem, chosen: Backend) -> str:
    return backend.why_not(p, False) or f"{backend.name} can run this too; {chosen.name} comes first"


def explain(b: Batch, asked: str, *, argmax: bool, bounds: str = "") -> Choice:
    plan = plan_for(problem_of(b, argmax=argmax, bounds=bounds), asked)
    backend = "cpu" if plan.backend in ("native", "blocks") else plan.backend
    tile = plan.launch.tile if isinstance(plan.launch, tiles.Launch) else None
    return Choice(backend, plan.why, tile, plan.notes, plan.backend == "native")


# everything that decides the launch of a forward → its prepared launch and plan
_prepared: dict[tuple, tuple[PreparedLaunch, Plan]] = {}
MOST_PREPARED = 4096


def forward(b: Batch, want_argmax: bool, asked: str) -> tuple[tuple[Tensor, Tensor | None], Plan]:
    """((scores, argmax or None), the plan that ran)."""
    q, d, q_mask, d_mask = b.q.tokens, b.d.tokens, b.q.mask, b.d.mask
    key = None
    if (q.is_cuda or asked == "triton") and b.q.offsets is None and b.d.offsets is None:
        # all but data pointers and empty_score
        key = (
            q.shape, q.stride(), q.dtype, d.shape, d.stride(), d.dtype, q.device, q.data_ptr() & 15, d.data_ptr() & 15,
            None if q_mask is None else q_mask.stride(), None if d_mask is None else d_mask.stride(),
            b.normalize, b.mean, b.q.weights is None, want_argmax, asked, torch.get_float32_matmul_precision(),
            q.is_neg(), d.is_neg(), None if b.d.codes is None else _form_of_codes(b.d.codes, b.q.codes),
        )  # fmt: skip
        known = _prepared.get(key)
        if known is not None:
            launch, plan = known
            out = launch(b)
            if out is not None:
                return out, plan
    plan = plan_for(problem_of(b, argmax=want_argmax), asked)
    out = allocate(b, want_argmax)
    backend = MODULES[plan.backend]
    if backend is not native:
        b = b.joined(documents=backend is not triton)
    prepared = backend.forward(b, plan, out)
    if key is not None and prepared is not None:
        if len(_prepared) >= MOST_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared, plan
    return out, plan


def _form_of_codes(d: Codes, q: Codes | None) -> tuple:
    return d.dim, d.scale.data_ptr() & 15, None if q is None else q.scale.data_ptr() & 15


def backward(b: Batch, plan: Plan, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
    """Gradients by the plan that ran forward. Only the mean needs a mask, that of q: argmax names no masked token."""
    if b.mean:
        g = g / b.q.valid().clamp_(min=1).unsqueeze(1)
    weights = b.q.weights
    if weights is None:
        return _gradients(b, plan, argmax, g, needs)
    # a token that no document's maximum counts may have a weight, or tokens, of NaN or infinity: 0 times them is NaN
    counted = (argmax >= 0).any(1 if b.q.offsets is None else 0)
    b = b._replace(q=b.q._replace(weights=weights.where(counted, 0.0)))
    grads = _gradients(b, plan, argmax, g, needs)
    return grads if grads.weights is None else grads._replace(weights=grads.weights.where(counted, 0.0))


def _gradients(b: Batch, plan: Plan, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
    if b.d.codes is not None:
        # no kernel of a backward pass reads codes
        return gather.backward(b, argmax, g, needs)
    return MODULES[plan.backend].backward(b, plan, argmax, g, needs)
