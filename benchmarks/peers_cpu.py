"""What the CPU path is compared with, each where it is installed: name → a call that returns scores [n_d]."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

PEERS = ("fast-maxsim", "maxsim-cpu", "numkong")
Runs = dict[str, Callable[[], Any]]


def fast_maxsim(q: torch.Tensor, d: torch.Tensor) -> Runs:
    if not importlib.util.find_spec("fast_maxsim"):
        return {}
    from fast_maxsim import maxsim_scores

    a, b = q.numpy(), d.numpy()
    return {"fast-maxsim": lambda: torch.as_tensor(maxsim_scores(a, b))}


def numkong(q: torch.Tensor, d: torch.Tensor) -> Runs:
    if not importlib.util.find_spec("numkong"):
        return {}
    import numkong as package

    packed_q = package.maxsim_pack(q.numpy())
    packed_d = [package.maxsim_pack(document) for document in d.numpy()]

    # it returns Σ (1 - similarity) of unit vectors
    def run() -> torch.Tensor:
        return torch.tensor([len(q) - package.maxsim_packed(packed_q, document) for document in packed_d])

    return {"numkong (approximate, 1 thread)": run}
