"""pytest-benchmark suite: latemax and its peers at every registered shape. ``make bench``, or

    python -m pytest benchmarks -q --rows benchmarks/results/NAME.json

pytest-benchmark's own table times latemax; the rows with all contenders, interleaved, go to ``--rows``.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers, shapes, timing

CUDA = torch.cuda.is_available()
FORWARD = shapes.CORE + shapes.VARIANTS if CUDA else shapes.CPU
TRAIN = shapes.TRAIN if CUDA else shapes.CPU_TRAIN


def run(shape, train, benchmark, device, limit, rows, request):
    tiny = request.config.getoption("--tiny")
    shape = shape.tiny() if tiny else shape
    found = timing.measure(shape, device, train, limit, rounds=3 if tiny else 30)
    rows.extend(found)
    for row in found:
        detail = row.get("absent") or f"{row['wall']['p50']:.3f} ms, {row['vs_latemax']:.2f}x, {row['of_limit']:.0%}"
        print(f"{row['label']:44} {row['name']:26} {detail}")
    q, d, d_mask = shape.tensors(device)
    q.requires_grad_(train), d.requires_grad_(train)

    def once():
        scores = peers.ours(q, d, d_mask, shape.normalize)
        if train:
            torch.autograd.grad(scores.sum(), (q, d))
        timing.sync(device)

    benchmark.extra_info.update(shape=shape.name, train=train, flops=shape.flops, bytes=shape.bytes)
    benchmark.pedantic(once, rounds=3 if tiny else 20, warmup_rounds=2)


@pytest.mark.parametrize("shape", FORWARD, ids=lambda shape: shape.name.strip().replace(" ", "-"))
def test_forward(shape, benchmark, device, limit, rows, request):
    run(shape, False, benchmark, device, limit, rows, request)


@pytest.mark.parametrize("shape", TRAIN, ids=lambda shape: shape.name.strip().replace(" ", "-"))
def test_forward_and_backward(shape, benchmark, device, limit, rows, request):
    run(shape, True, benchmark, device, limit, rows, request)
