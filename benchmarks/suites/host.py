"""Host time of an eager call on the Triton backend, step by step, with a driver that launches nothing.

    python -m benchmarks.suites.host [--json FILE]

No GPU is needed: kernels are compiled for sm_90, and the launch ends where it would call the CUDA driver. A GPU machine
adds that call, and has torch's CUDA allocator in place of the CPU's.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

import latemax
from benchmarks import harness, internals, shapes
from benchmarks.tables import Table, markdown

if TYPE_CHECKING:
    from benchmarks.null_driver import NullDriver


def prepare() -> tuple[NullDriver, torch.Tensor, torch.Tensor]:
    """latemax with the null driver, and a small problem: (driver, q, d)."""
    null = internals.install_null_driver()
    torch.set_num_threads(1)
    shape = shapes.HOST
    dtype = getattr(torch, shape.dtype)
    q, d = (torch.zeros(*size, shape.dim, dtype=dtype) for size in ((shape.n_q, shape.l_q), (shape.n_d, shape.l_d)))
    return null, q, d


def first_calls(q: torch.Tensor, d: torch.Tensor) -> dict[str, float]:
    """Processor seconds, ptxas included, of first calls with an empty triton cache; they tune nothing."""
    import triton

    def step() -> None:
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


def steps(rounds: int = 40, calls: int = 200) -> list[dict[str, Any]]:
    """A row for each step; indented ones are parts of the call above."""
    null, q, d = prepare()
    first = first_calls(q, d)
    mask = torch.ones(d.shape[:-1], dtype=torch.bool)
    q_grad, small = q.clone().requires_grad_(), torch.zeros(8)

    def call(**options: Any) -> object:
        return latemax.maxsim(q, d, backend="triton", **options)

    def unprepared() -> None:
        internals.forget_prepared_launches()
        call()

    rows: dict[str, Callable[[], object]] = {
        "torch.add of 8 numbers, for comparison": lambda: torch.add(small, small),
        "whole call": call,
        **{f"  {name}": run for name, run in internals.steps_of_a_prepared_call(q, d).items()},
        "whole call, with a document mask": lambda: call(d_mask=mask),
        "whole call, normalize and argmax": lambda: call(normalize=True, return_argmax=True),
        "whole call that records for backward": lambda: latemax.maxsim(q_grad, d, backend="triton"),
        "whole call without a prepared launch": unprepared,
        **{f"  {name}": run for name, run in internals.steps_of_an_unprepared_call(q, d).items()},
    }
    launched = null.launches
    # processor time of this thread: what else the machine does stays out of it
    microseconds = {
        name: 1e6 * seconds
        for name, seconds in harness.medians(rows, rounds, harness.timer(time.thread_time, calls)).items()
    }
    if null.launches == launched:
        raise RuntimeError("nothing was launched: the steps timed something else")
    add = next(iter(microseconds.values()))
    table = [dict(step=name, microseconds=spent, adds=spent / add) for name, spent in microseconds.items()]
    return [*table, *(dict(step=name, seconds=spent) for name, spent in first.items())]


def measure(tiny: bool = False) -> dict[str, Any]:
    rows = steps(2, 20) if tiny else steps()
    import triton

    return dict(machine=harness.machine() | dict(triton=triton.__version__), rows=rows)


def table(result: dict) -> str:
    machine = result["machine"]
    rows = [
        [row["step"].replace("  ", "– "), f"{row['microseconds']:.1f}", f"{row['adds']:.1f}"]
        for row in result["rows"]
        if "adds" in row
    ]
    first = ", ".join(f"{row['step']} {row['seconds']:.2f} s" for row in result["rows"] if "seconds" in row)
    return markdown(["step", "µs", "of torch.add"], rows) + (
        f"\nMedian of interleaved rounds, processor time; the last column survives a slow machine. "
        f"Compiled with an empty cache, in processor time with ptxas: {first}. "
        f"{machine['cpu']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}.\n"
    )


TABLES = {"host": Table("host", table)}


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    harness.finish(measure(options.tiny), table, options.json)


if __name__ == "__main__":
    main()
