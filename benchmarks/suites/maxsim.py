"""latemax and its peers at every registered shape, on CUDA where there is one, else on the CPU.

    python -m benchmarks.suites.maxsim [--seconds 440] [--json FILE]

Contenders are interleaved in one process, checked before they are timed; the limits of the machine come from the same
run. On CUDA a call is timed three ways: ``wall`` (Python included, ended by a synchronisation), ``warm`` (CUDA events
around a graph of the call, L2 as the last call left it) and ``cold`` (the same after L2 was evicted). On a CPU only
wall exists.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

import latemax
from benchmarks import harness, peers, shapes
from benchmarks.shapes import Shape
from benchmarks.tables import Table, markdown, measured_limits

ROUNDS = 30


def cases(device: str) -> list[tuple[Shape, bool]]:
    """(shape, forward and backward), in the order of what matters most, should time run out."""
    forward, train, last = (
        (shapes.CORE, shapes.TRAIN, shapes.VARIANTS) if device == "cuda" else (shapes.CPU, shapes.CPU_TRAIN, ())
    )
    return [*((shape, False) for shape in forward), *((shape, True) for shape in train),
            *((shape, False) for shape in last)]  # fmt: skip


def bound(shape: Shape, train: bool, limit: dict) -> tuple[str, float]:
    """Which limit binds, and the milliseconds it allows. Backward is counted as its gathers: bytes, no products."""
    compute = shape.flops / limit[f"matmul_{shape.dtype}_tflops"] / 1e9
    # training: the documents are read again, both gradients are written, the argmax is written and read
    traffic = shape.bytes * (3 if train else 1) + (8 * shape.n_q * shape.n_d * shape.l_q if train else 0)
    memory = traffic / limit["read_gbs"] / 1e6
    return ("matmul", compute) if compute > memory else ("read", memory)


def truth_of(q: torch.Tensor, d: torch.Tensor, d_mask: torch.Tensor | None) -> torch.Tensor:
    """float64 scores by a few documents at a time."""
    step = max(1, (1 << 27) // max(1, q.shape[0] * q.shape[1] * d.shape[-2]))
    axis = d.dim() - 3
    masks = [None] * math.ceil(d.shape[axis] / step) if d_mask is None else d_mask.split(step, axis)
    parts = zip(d.split(step, axis), masks, strict=True)
    return torch.cat([latemax.reference.maxsim(q.double(), part.double(), None, m) for part, m in parts], 1)


# a call below this many seconds is timed as a graph of several: an event pair around one would include the 5 to 8 µs
# that the host needs to launch a graph on an idle stream
SHORT, CALLS = 50e-6, 10


def graphed(run: Callable[[], object], calls: int = 1) -> Callable[[], object] | None:
    """``calls`` calls as one CUDA graph, or None if they can't be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        return graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def gpu_rows(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
    """name -> warm and cold times of the call's graph, and its peak memory beyond the inputs."""
    # a call that can't be captured is timed as it is, and its row says so
    graphs = {name: graphed(run) for name, run in runs.items()}
    replays = {name: graphs[name] or run for name, run in runs.items()}
    once = harness.gpu_timer()
    short = [name for name, replay in replays.items() if graphs[name] and once(replay) < SHORT]
    several = {name: graphed(runs[name], CALLS) for name in short}
    calls = {name: CALLS if several.get(name) else 1 for name in runs}
    repeated = {name: several.get(name) or replay for name, replay in replays.items()}
    warm = harness.interleaved(repeated, rounds, once)
    warm = {name: [seconds / calls[name] for seconds in times] for name, times in warm.items()}
    # L2 is evicted by reading: written lines would be flushed during the call that is timed
    evict = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")
    cold = harness.interleaved(replays, rounds, harness.gpu_timer(evict.sum))
    rows = {}
    for name, run in runs.items():
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        rows[name] = dict(
            peak_mb=(torch.cuda.max_memory_allocated() - base) / 1e6, warm=harness.fifths(warm[name]),
            cold=harness.fifths(cold[name]), graph=graphs[name] is not None,
        )  # fmt: skip
    return rows


def measure_shape(shape: Shape, device: str, train: bool, limit: dict, rounds: int = ROUNDS) -> list[dict]:
    """A row for each contender: errors checked, then times, memory and the fraction of the binding limit."""
    q, d, d_mask = shape.tensors(device)
    contenders, absent = peers.contenders(shape, device, train)
    truth = truth_of(q, d, d_mask)
    allowed = harness.tolerance(shape.l_q, shape.dtype, device)
    q.requires_grad_(train), d.requires_grad_(train)

    def forward(contender: peers.Contender) -> torch.Tensor:
        return contender(q, d, d_mask, shape.normalize)

    def step(contender: peers.Contender) -> object:
        return torch.autograd.grad(forward(contender).sum(), (q, d))

    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name, contender in contenders.items():
        run = functools.partial(step if train else forward, contender)
        start = time.perf_counter()
        try:
            with torch.set_grad_enabled(train):
                scores = forward(contender)
                harness.sync(device)
                first = time.perf_counter() - start
                error = harness.check(f"{name} at {shape.name}", scores.detach(), truth, allowed)
                run()
        except Exception as problem:
            if name == "latemax":
                raise
            # a peer that cannot run a shape, or is wrong there, is reported and not timed
            absent[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
            continue
        runs[name], rows[name] = run, dict(first_call_ms=1e3 * first, max_error=error)
    binding, allowed_ms = bound(shape, train, limit)
    with torch.set_grad_enabled(train):
        wall = harness.interleaved(runs, rounds, harness.timer(device=device))
        on_gpu = gpu_rows(runs, rounds) if device == "cuda" else {}
    ours = statistics.median(wall["latemax"])
    for name, row in rows.items():
        row.update(
            shape=shape._asdict(), label=shape.name, train=train, name=name, wall=harness.fifths(wall[name]),
            flops=shape.flops, bytes=shape.bytes, binding=binding, allowed_ms=allowed_ms,
            vs_latemax=statistics.median(wall[name]) / ours, **on_gpu.get(name, {}),
        )  # fmt: skip
        # of the graph's time where there is one: the kernel against the machine, without the host
        row["of_limit"] = allowed_ms / row.get("cold", row["wall"])["p50"]
    return [
        *rows.values(),
        *(dict(label=shape.name, train=train, name=name, absent=why) for name, why in absent.items()),
    ]


def measure(
    tiny: bool = False, seconds: float = math.inf, save: Callable[[dict[str, Any]], None] = lambda result: None
) -> dict[str, Any]:
    """Every case; ``seconds``: no case starts later; ``save`` is given the result after each case, so that a run cut
    short leaves what it had."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start, limit = time.monotonic(), harness.limits(device, rounds=2 if tiny else 20)
    result: dict[str, Any] = dict(machine=harness.machine(device), limits=limit, tiny=tiny, rows=[])
    for shape, train in cases(device):
        shape = shape.tiny() if tiny else shape
        if time.monotonic() - start > seconds:
            late = "the time given to the run was over"
            found = [dict(label=shape.name, train=train, name="latemax", absent=late)]
        else:
            found = measure_shape(shape, device, train, limit, rounds=3 if tiny else ROUNDS)
        for row in found:
            times = "{p50:.3f} ms".format(**row["wall"]) if "wall" in row else row["absent"]
            print(f"{row['label']:44} {row['name']:26} {times}", flush=True)
        result["rows"] += found
        save(result)
    return result


GPU_COLUMNS = ["on the GPU, cold ms (other)", "warm ms", "peak MB (other)", "first call ms (other)"]


def gpu_cells(mine: dict, best: dict) -> list[str]:
    """Time of a graph replay with L2 evicted and as left, memory beyond the inputs, first call."""
    return [
        f"{mine['cold']['p50']:.3f} ({best['cold']['p50']:.3f})", f"{mine['warm']['p50']:.3f}",
        f"{mine['peak_mb']:.1f} ({best['peak_mb']:.1f})", f"{mine['first_call_ms']:.0f} ({best['first_call_ms']:.0f})",
    ]  # fmt: skip


def table(result: dict) -> str:
    """latemax, the fastest other contender and the binding limit, a row for each shape."""
    machine = result["machine"]
    cases: dict[tuple, list] = {}
    for row in result["rows"]:
        cases.setdefault((row["label"], row["train"]), []).append(row)
    lines = []
    on_gpu = "gpu" in machine
    for (label, train), rows in cases.items():
        timed = {row["name"]: row for row in rows if "wall" in row and row["name"] != "latemax cuda"}
        if "latemax" not in timed or len(timed) < 2:
            continue
        mine = timed.pop("latemax")
        best = min(timed.values(), key=lambda row: row["wall"]["p50"])
        lines.append(
            [
                label + (" forward+backward" if train else ""), f"{mine['wall']['p50']:.2f}",
                f"{best['name']} {best['wall']['p50']:.2f}", f"{best['wall']['p50'] / mine['wall']['p50']:.2f}×",
                f"{mine['allowed_ms']:.2f} ({mine['binding']})", f"{mine['of_limit']:.0%}",
                *(gpu_cells(mine, best) if on_gpu else []),
            ]
        )  # fmt: skip
    head = ["(n_q,n_d,l_q,l_d) dim", "latemax ms", "fastest other ms", "ratio", "limit ms", "of limit"]
    head += GPU_COLUMNS * on_gpu
    where = machine.get("gpu", machine["cpu"])
    return markdown(head, lines) + (
        f"\n{where}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}. Wall time, median of "
        f"interleaved rounds. {measured_limits(result['limits'])}\n"
    )


TABLES = {
    "suite-cpu": Table("bench-cpu", table),
    "suite-gpu": Table(
        "bench-gpu", table, "No GPU has run the suite yet; benchmarks/GPU_PENDING.md says how it is to be done.\n"
    ),
}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case later than this")
    options = parser.parse_args()
    save = functools.partial(harness.write, options.json) if options.json else lambda result: None
    harness.finish(measure(options.tiny, options.seconds, save), table, options.json)


if __name__ == "__main__":
    main()
