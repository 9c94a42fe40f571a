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
import time

import torch


def microseconds(run, rounds: int = 40, calls: int = 200) -> float:
    """Median over rounds of the mean processor time of a call: what else the machine does stays out of it."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            run()
        times.append((time.thread_time() - start) / calls * 1e6)
    return statistics.median(times)


def prepare():
    """latemax with the null driver, and a tiny problem: (driver, q, d)."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter has no launch to time")
    from benchmarks.null_driver import NullDriver
    from latemax.ops import select

    null = NullDriver()
    # CPU tensors stand in for CUDA ones
    select.triton_status = lambda: (True, "null driver")
    select.interpreted = lambda: True
    torch.set_num_threads(1)
    q, d = torch.zeros(1, 32, 128, dtype=torch.bfloat16), torch.zeros(4, 16, 128, dtype=torch.bfloat16)
    return null, q, d


def steps() -> list[dict]:
    import latemax
    from latemax import _check
    from latemax.ops import launch, triton_backend

    null, q, d = prepare()
    start = time.thread_time()
    latemax.maxsim(q, d, backend="triton")
    first = time.thread_time() - start
    args = _check.arguments(q, d)
    choice = launch.choose(args, "triton", normalize=False, argmax=False, train=False)
    scores, argmax = launch.allocate(q, d, False)
    options = dict(normalize=False, empty_score=float("-inf"), tile=choice.tile)
    keep = torch.ones(4, 16, dtype=torch.bool)
    q_grad = q.clone().requires_grad_()
    rows = {
        "whole call": lambda: latemax.maxsim(q, d, backend="triton"),
        "  check the arguments": lambda: _check.arguments(q, d),
        "  choose backend and tile": lambda: launch.choose(args, "triton", normalize=False, argmax=False, train=False),
        "  allocate the outputs": lambda: launch.allocate(q, d, False),
        "  prepare and launch": lambda: triton_backend.forward(q, d, None, None, scores, argmax, **options),
        "whole call, with a document mask": lambda: latemax.maxsim(q, d, None, keep, backend="triton"),
        "whole call, normalize and winners": lambda: latemax.maxsim(
            q, d, normalize=True, return_argmax=True, backend="triton"
        ),
        "whole call that records for backward": lambda: latemax.maxsim(q_grad, d, backend="triton"),
    }
    launched = null.launches
    table = [dict(step=name, microseconds=microseconds(run)) for name, run in rows.items()]
    if null.launches == launched:
        raise RuntimeError("nothing was launched: the steps timed something else")
    return [*table, dict(step="first call, compilation included (ms)", microseconds=first * 1e3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    rows = steps()
    for row in rows:
        print(f"{row['step']:42} {row['microseconds']:8.1f}")
    if options.json:
        import triton

        from benchmarks.cpu import machine

        result = dict(machine=machine() | dict(triton=triton.__version__), rows=rows)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
