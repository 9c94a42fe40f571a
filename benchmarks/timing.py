"""Measuring: contenders interleaved in one process, correctness first, limits of the machine from the same run.

On CUDA a call is timed three ways: ``wall`` (Python included, ended by a synchronisation), ``warm`` (CUDA events around
a graph of the call, inputs in L2 as the last call left them) and ``cold`` (the same after L2 was overwritten). On a CPU
only wall exists.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

import latemax
from benchmarks import peers
from benchmarks.shapes import Shape
from latemax.cli.bench import fifths, interleaved, sync


def bound(shape: Shape, train: bool, limit: dict) -> tuple[str, float]:
    """Which limit binds, and the milliseconds it allows. Backward is counted as its gathers: bytes, no products."""
    compute = shape.flops / limit[f"matmul_{shape.dtype}_tflops"] / 1e9
    # training: the documents are read again, both gradients are written, the winners are written and read
    traffic = shape.bytes * (3 if train else 1) + (8 * shape.n_q * shape.n_d * shape.l_q if train else 0)
    memory = traffic / limit["read_gbs"] / 1e6
    return ("matmul", compute) if compute > memory else ("read", memory)


def check(name: str, scores, truth, shape: Shape) -> float:
    """Largest error; raises where a contender is wrong beyond its dtype."""
    error = (scores.double() - truth).abs().max().item() if truth.numel() else 0.0
    # unit tokens: a similarity rounded to half precision is off by 2^-9, and l_q of them are summed
    allowed = shape.l_q * (2**-9 if shape.dtype != "float32" else 2**-10) + 1e-4
    if not error <= allowed:
        raise RuntimeError(f"{name} is wrong at {shape.name}: error {error:.3g}, allowed {allowed:.3g}")
    return error


def truth_of(q, d, d_mask):
    """float64 scores by a few documents at a time."""
    step = max(1, (1 << 27) // max(1, q.shape[0] * q.shape[1] * d.shape[-2]))
    axis = d.dim() - 3
    masks = [None] * math.ceil(d.shape[axis] / step) if d_mask is None else d_mask.split(step, axis)
    parts = zip(d.split(step, axis), masks, strict=True)
    return torch.cat([latemax.reference.maxsim(q.double(), part.double(), None, m) for part, m in parts], 1)


def graphed(run: Callable) -> Callable | None:
    """The call as a CUDA graph, or None where it can't be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def events(runs: dict[str, Callable], rounds: int, before: Callable) -> dict:
    """name -> GPU seconds of each interleaved round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            before()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    return times


def measure(shape: Shape, device: str, train: bool, limit: dict, rounds: int = 30) -> list[dict]:
    """One row a contender: errors checked, then times, memory and the fraction of the binding limit."""
    q, d, d_mask = shape.tensors(device)
    functions, absent = peers.contenders(shape, device, train)
    truth = truth_of(q, d, d_mask)
    q.requires_grad_(train), d.requires_grad_(train)

    def forward(function):
        return function(q, d, d_mask, shape.normalize)

    def step(function):
        torch.autograd.grad(forward(function).sum(), (q, d))

    rows, runs = {}, {}
    for name, function in functions.items():
        start = time.perf_counter()
        try:
            with torch.set_grad_enabled(train):
                scores = forward(function)
                sync(device)
                first = time.perf_counter() - start
                error = check(name, scores.detach(), truth, shape)
                runs[name] = (lambda f=function: step(f)) if train else (lambda f=function: forward(f))
                runs[name]()
        except Exception as problem:
            if name == "latemax":
                raise
            # a peer that cannot run a shape, or is wrong there, is reported and not timed
            absent[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
            runs.pop(name, None)
            continue
        rows[name] = dict(first_call_ms=1e3 * first, max_error=error)
    binding, allowed_ms = bound(shape, train, limit)
    with torch.set_grad_enabled(train):
        wall = interleaved(runs, device, rounds)
        if device == "cuda":
            # a call that can't be captured is timed as it is, and its row says so
            graphs = {name: graphed(run) for name, run in runs.items()}
            replays = {name: graphs[name] or run for name, run in runs.items()}
            scratch = torch.empty(256 << 20, dtype=torch.uint8, device=device)
            warm = events(replays, rounds, lambda: None)
            cold = events(replays, rounds, scratch.zero_)
            for name, run in runs.items():
                torch.cuda.reset_peak_memory_stats()
                base = torch.cuda.memory_allocated()
                run()
                torch.cuda.synchronize()
                rows[name]["peak_mb"] = (torch.cuda.max_memory_allocated() - base) / 1e6
                rows[name].update(warm=fifths(warm[name]), cold=fifths(cold[name]), graph=graphs[name] is not None)
    ours = statistics.median(wall["latemax"])
    for name, row in rows.items():
        row.update(
            shape=shape._asdict(), label=shape.name, train=train, name=name, wall=fifths(wall[name]),
            flops=shape.flops, bytes=shape.bytes, binding=binding, allowed_ms=allowed_ms,
            vs_latemax=statistics.median(wall[name]) / ours,
        )  # fmt: skip
        # of the graph's time where there is one: the kernel against the machine, without the host
        row["of_limit"] = allowed_ms / row.get("cold", row["wall"])["p50"]
    return [
        *rows.values(),
        *(dict(label=shape.name, train=train, name=name, absent=why) for name, why in absent.items()),
    ]
