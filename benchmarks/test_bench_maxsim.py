"""pytest-benchmark cases: latemax at every registered shape, for comparing runs of latemax with each other.

    python -m pytest benchmarks -q --benchmark-autosave

``python -m benchmarks.suites.maxsim`` compares it with its peers.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness, peers
from benchmarks.shapes import Shape
from benchmarks.suites.maxsim import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def name(case: tuple[Shape, bool]) -> str:
    shape, train = case
    return shape.name.replace(" ", "-") + ("-forward-and-backward" if train else "")


@pytest.mark.parametrize("case", cases(DEVICE), ids=name)
def test_speed(case: tuple[Shape, bool], benchmark, request: pytest.FixtureRequest):
    shape, train = case
    tiny = request.config.getoption("--tiny")
    shape = shape.tiny() if tiny else shape
    q, d, d_mask = shape.tensors(DEVICE)
    q.requires_grad_(train), d.requires_grad_(train)
    ours = peers.ours_with_argmax if shape.argmax else peers.ours

    def run() -> None:
        scores = ours(q, d, d_mask, shape.normalize)
        if train:
            torch.autograd.grad(scores.sum(), (q, d))
        harness.sync(DEVICE)

    benchmark.extra_info.update(shape=shape.name, train=train, flops=shape.flops, bytes=shape.bytes)
    benchmark.pedantic(run, rounds=3 if tiny else 20, warmup_rounds=2)
