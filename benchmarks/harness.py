"""What the suites share: description of the machine, its limits, interleaved timing, the check, the JSON.

A suite has ``measure(...) -> result`` (what goes into its JSON) and ``table(result) -> str`` (markdown); its ``TABLES``
are what ``benchmarks.report`` renders into the pages.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

import latemax
from benchmarks.internals import fifths, limits, sync

__all__ = ["check", "fifths", "finish", "interleaved", "limits", "machine", "medians", "sync", "tolerance", "write"]

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Run = Callable[[], object]
Timer = Callable[[Run], float]  # runs it and returns the seconds of one call


def machine(device: str = "cpu", packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Where and with what a result was measured; ``packages`` adds the versions of those that are installed."""
    model = platform.processor()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = (
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        )
        model = next(names, model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed: left out")
    found = dict(
        cpu=model, capability=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads(),
        load=os.getloadavg()[0], torch=torch.__version__, latemax=latemax.__version__, commit=commit.stdout.strip(),
        peers=versions, date=datetime.date.today().isoformat(),
    )  # fmt: skip
    if device == "cuda":
        import triton

        found |= dict(
            gpu=torch.cuda.get_device_name(), gpu_capability=torch.cuda.get_device_capability(),
            triton=triton.__version__,
        )  # fmt: skip
    return found


def timer(clock: Callable[[], float] = time.perf_counter, calls: int = 1, device: str = "cpu") -> Timer:
    """A timer by ``clock``: the mean of ``calls`` calls in a row, on CUDA up to the end of their kernels."""

    def seconds(run: Run) -> float:
        sync(device)
        start = clock()
        for _ in range(calls):
            run()
        sync(device)
        return (clock() - start) / calls

    return seconds


def gpu_timer(before: Run = lambda: None) -> Timer:
    """A timer by CUDA events around the call; ``before`` runs outside of them."""

    def seconds(run: Run) -> float:
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def interleaved(
    runs: Mapping[Any, Run], rounds: int, seconds: Timer | None = None, fewer: Mapping[Any, int] | None = None
) -> dict[Any, list[float]]:
    """Seconds of every run in every round.

    All runs take turns in one process, so that a slow minute of the machine slows all of them. Every round has a random
    order of its own: a run that follows a single-threaded one finds the other threads asleep.

    Args:
        runs: name -> what to time.
        rounds: how often each is timed; ``fewer``: name -> a smaller number for slow ones.
        seconds: the timer (default: wall time on the CPU).
    """
    seconds, fewer = seconds or timer(), fewer or {}
    times: dict[Any, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for turn in range(rounds):
        shuffle(order)
        for name in order:
            if turn < fewer.get(name, rounds):
                times[name].append(seconds(runs[name]))
    return times


def medians(runs: Mapping[Any, Run], rounds: int, seconds: Timer | None = None) -> dict[Any, float]:
    """Median seconds of every run, interleaved."""
    return {name: statistics.median(times) for name, times in interleaved(runs, rounds, seconds).items()}


def tolerance(l_q: int, dtype: str, device: str = "cpu") -> float:
    """The largest error of a score of unit tokens that rounding explains.

    A similarity rounded to half precision is off by up to 2^-9, one of TF32 products by 2^-10; ``l_q`` are summed.
    """
    return 1e-4 + l_q * (2**-9 if dtype != "float32" else 2**-10 if device == "cuda" else 1e-6)


def check(name: str, scores: torch.Tensor, truth: torch.Tensor, allowed: float) -> float:
    """The largest error.

    Raises:
        RuntimeError: it exceeds ``allowed`` or is NaN.
    """
    error = (scores.double() - truth.double()).abs().max().item() if truth.numel() else 0.0
    if not error <= allowed:
        raise RuntimeError(f"{name} is wrong: error {error:.3g}, allowed {allowed:.3g}")
    return error


def write(path: pathlib.Path, result: Any) -> None:
    """Writes a result as JSON, whole or not at all."""
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


def parser(doc: str, tiny: bool = True) -> argparse.ArgumentParser:
    """The command line of a suite, described by the first line of its docstring; ``tiny``: it can be rehearsed."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--json", type=pathlib.Path, help="write the result to this file")
    if tiny:
        rehearsal = "small shapes and few rounds: a rehearsal, not a measurement"
        found.add_argument("--tiny", action="store_true", help=rehearsal)
    return found


def finish(result: Any, table: Callable[[Any], str], path: pathlib.Path | None) -> None:
    """Prints the table and writes the JSON where one was asked for."""
    print(table(result), end="")
    if path:
        write(path, result)


def drop_cache(folder: pathlib.Path) -> None:
    """The next read of a store's shards comes from the disk."""
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
