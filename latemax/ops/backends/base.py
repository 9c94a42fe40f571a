"""What a backend offers to ``latemax.ops.dispatch``. A backend is a module with these names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from latemax.ops.problem import Batch, Gradients, Needs, Outputs, Plan, Problem


class Status(NamedTuple):
    usable: bool
    reason: str  # why not, or with what it runs


class WrongDevice(str):
    """A reason that is the caller's mistake (ValueError), not the machine's (RuntimeError)."""


# a batch of the same form → (scores, argmax or None); None where the launch does not apply
PreparedLaunch = Callable[[Batch], tuple[Tensor, Tensor | None] | None]


class Backend(Protocol):
    name: str

    def status(self) -> Status:
        """Whether it runs on this machine at all."""

    def why_not(self, p: Problem, by_name: bool) -> str:
        """Why it does not run this problem; empty if it does. ``by_name``: the caller asked for this backend."""

    def plan(self, p: Problem, by_name: bool) -> Plan: ...

    def forward(self, b: Batch, plan: Plan, out: Outputs) -> PreparedLaunch | None:
        """Fills ``out``. May return how to repeat the call on another batch of the same form without planning."""

    def backward(self, b: Batch, plan: Plan, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
        """Gradients from the recorded argmax, given that of the scores, g [n_q, n_d]."""


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability as 90 for 9.0; off CUDA (the interpreter) that of sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def pairs_by_document(candidates: Tensor, documents: int) -> tuple[Tensor, Tensor]:
    """(numbers in candidates [n_q * k] of the pairs of document 0, 1, and so on; where each starts [documents + 1]).

    Stable, so that sums over the pairs of a document repeat bit for bit. Pairs of no document are before and after.
    """
    names, pairs = torch.sort(candidates.reshape(-1), stable=True)
    return pairs, torch.searchsorted(names, torch.arange(documents + 1, device=names.device))
