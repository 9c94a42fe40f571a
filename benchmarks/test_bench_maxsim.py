"""pytest-benchmark suite: latemax and its peers at every registered shape. ``make bench``, or

    python -m pytest benchmarks -q --rows benchmarks/results/NAME.json

pytest-benchmark's own table times latemax; the rows with all contenders, interleaved, go to ``--rows``.
"""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import peers, shapes, timing

CUDA = torch.cuda.is_available()
# in the order of what matters most, should time run out
CASES = (
    [(shape, False) for shape in (shapes.CORE if CUDA else shapes.CPU)]
    + [(shape, True) for shape in (shapes.TRAIN if CUDA else shapes.CPU_TRAIN)]
    + [(shape, False) for shape in (shapes.VARIANTS if CUDA else [])]
)


def run(shape, train, benchmark, device, limit, rows, request):
    tiny = request.config.getoption("--tiny")
    if time.monotonic() - rows.start > request.config.getoption("--seconds"):
        reason = "the time given to the run was over"
        rows.extend([dict(label=shape.name, train=train, name="latemax", absent=reason)])
        pytest.skip(reason)
    shape = shape.tiny() if tiny else shape
    found = timing.measure(shape, device, train, limit, rounds=3 if tiny else 30)
    rows.extend(found)
    for row in found:
        detail = row.get("absent") or f"{row['wall']['p50']:.3f} ms, {row['vs_latemax']:.2f}x, {row['of_limit']:.0%}"
        print(f"{row['label']:44} {row['name']:26} {detail}")
    q, d, d_mask = shape.tensors(device)
    q.requires_grad_(train), d.requires_grad_(train)

    ours = peers.ours_with_winners if shape.argmax else peers.ours

    def once():
        scores = ours(q, d, d_mask, shape.normalize)
        if train:
            torch.autograd.grad(scores.sum(), (q, d))
        timing.sync(device)

    benchmark.extra_info.update(shape=shape.name, train=train, flops=shape.flops, bytes=shape.bytes)
    benchmark.pedantic(once, rounds=3 if tiny else 20, warmup_rounds=2)


def name(case) -> str:
    shape, train = case
    return shape.name.strip().replace(" ", "-") + ("-forward-and-backward" if train else "")


@pytest.mark.parametrize("case", CASES, ids=name)
def test_speed(case, benchmark, device, limit, rows, request):
    run(*case, benchmark, device, limit, rows, request)
