"""Host time of an eager call on the Triton backend, step by step, with a driver that launches nothing.

    python -m benchmarks.host [--json FILE]

No GPU is needed: kernels are compiled for sm_90, and the launch ends where the CUDA driver would be called. A GPU
machine adds that call, and has torch's CUDA allocator in place of the CPU's.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import torch


def interleaved(rows: dict, rounds: int = 40, calls: int = 200) -> dict[str, float]:
    """Median over rounds of the mean processor time of a call, every round timing every row: what else the machine does
    stays out of it, and a slow minute slows all rows alike."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            start = time.thread_time()
            for _ in range(calls):
                run()
            times[name].append((time.thread_time() - start) / calls * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def prepare():
    """latemax with the null driver, and a tiny problem: (driver, q, d)."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter has no launch to time")
    from benchmarks.null_driver import NullDriver
    from latemax.ops.backends import triton
    from latemax.ops.backends.base import Status

    null = NullDriver()
    # CPU tensors stand in for CUDA ones
    triton.status = lambda: Status(True, "null driver")
    triton.interpreted = lambda: True
    torch.set_num_threads(1)
    q, d = torch.zeros(1, 32, 128, dtype=torch.bfloat16), torch.zeros(4, 16, 128, dtype=torch.bfloat16)
    return null, q, d


def first_calls(q, d) -> dict[str, float]:
    """Seconds of processor time, ptxas included, of first calls with triton's cache empty: nothing is tuned in them."""
    import triton

    import latemax

    def step():
        latemax.maxsim(q.clone().requires_grad_(), d.clone().requires_grad_(), backend="triton").sum().backward()

    runs = {"first call": lambda: latemax.maxsim(q, d, backend="triton"), "first training step": step}
    spent, before = {}, triton.knobs.cache.dir
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        for name, run in runs.items():
            start = os.times()
            run()
            # user and system time, of this process and of those it waited for
            spent[name] = sum(os.times()[:4]) - sum(start[:4])
        triton.knobs.cache.dir = before
    return spent


def steps() -> list[dict]:
    import latemax
    from latemax.arguments.batch import batch_of
    from latemax.arguments.check import check_options
    from latemax.ops import dispatch, operator
    from latemax.ops.backends import triton_launch
    from latemax.ops.problem import allocate, problem_of

    null, q, d = prepare()
    first = first_calls(q, d)
    batch, _ = batch_of(q, d, None, None)
    plan = dispatch.plan_for(problem_of(batch, argmax=False), "triton")
    out = allocate(batch, False)
    inf = float("-inf")
    keep = torch.ones(4, 16, dtype=torch.bool)
    q_grad, small = q.clone().requires_grad_(), torch.zeros(8)

    def forgotten():
        dispatch._prepared.clear()
        latemax.maxsim(q, d, backend="triton")

    rows = {
        "torch.add of 8 numbers, for comparison": lambda: torch.add(small, small),
        "whole call": lambda: latemax.maxsim(q, d, backend="triton"),
        "  check the options": lambda: check_options(
            normalize=False, empty_score=inf, return_argmax=False, backend="triton"
        ),
        "  check the arguments": lambda: batch_of(q, d, None, None),
        "  rule out transforms": lambda: (operator._refuse_transforms(q, d), operator._plain(q, d, None, None)),
        "  look up, allocate, launch": lambda: dispatch.forward(batch, False, "triton"),
        "whole call, with a document mask": lambda: latemax.maxsim(q, d, None, keep, backend="triton"),
        "whole call, normalize and winners": lambda: latemax.maxsim(
            q, d, normalize=True, return_argmax=True, backend="triton"
        ),
        "whole call that records for backward": lambda: latemax.maxsim(q_grad, d, backend="triton"),
        "whole call of a form not met before": forgotten,
        "  choose backend and tile": lambda: dispatch.plan_for(problem_of(batch, argmax=False), "triton"),
        "  allocate the outputs": lambda: allocate(batch, False),
        "  prepare and launch": lambda: triton_launch.forward(batch, plan.launch, out),
    }
    launched = null.launches
    found = interleaved(rows)
    if null.launches == launched:
        raise RuntimeError("nothing was launched: the steps timed something else")
    unit = next(iter(found.values()))
    table = [dict(step=name, microseconds=spent, adds=spent / unit) for name, spent in found.items()]
    return [*table, *(dict(step=name, seconds=spent) for name, spent in first.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    rows = steps()
    for row in rows:
        if "seconds" in row:
            print(f"{row['step']:42} {row['seconds']:8.2f} s of processor time")
        else:
            print(f"{row['step']:42} {row['microseconds']:8.1f} µs {row['adds']:6.1f} adds")
    if options.json:
        import triton

        from benchmarks.cpu import machine

        result = dict(machine=machine() | dict(triton=triton.__version__), rows=rows)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
