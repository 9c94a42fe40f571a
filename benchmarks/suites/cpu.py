"""The CPU path compared with everything else one could call, interleaved; every row is checked before it is timed.

    python -m benchmarks.suites.cpu [--sweep] [--json FILE]

Peers are optional: ``pip install fast-maxsim==0.2.0 numkong==7.8.6 maxsim-cpu``. numkong screens in 8 bits and is
approximate: its error is printed with its time. Its packing of the documents is not timed. maxsim-cpu can crash its
process: it runs in one of its own, before the others. Limits (matmul rate, read bandwidth) come from the same run.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import latemax
from benchmarks import harness, shapes
from benchmarks.peers_cpu import PEERS, Runs, fast_maxsim, numkong
from benchmarks.shapes import Shape
from benchmarks.tables import Table, markdown, measured_limits

ROUNDS = 15
# a contender that takes longer than this is timed in three rounds, one that takes ten times as long in one
SLOW_SECONDS = 0.5


def chunked(q: torch.Tensor, d: torch.Tensor, documents: int) -> torch.Tensor:
    """Plain chunked matmul + amax, documents as the batch."""
    return torch.cat([torch.matmul(q, part.mT).amax(-1).sum(-1) for part in d.split(documents)])


def contenders(q: torch.Tensor, d: torch.Tensor, exact: bool) -> Runs:
    """name -> function returning scores [n_d]; ``exact``: without the slow and the approximate ones."""
    half_q, half_d = q.bfloat16(), d.bfloat16()
    full_q, full_d = q.half(), d.half()

    def einsum(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ic,njc->nij", q, d).amax(-1).sum(-1)

    runs: Runs = {
        "latemax": lambda: latemax.maxsim(q, d),
        "torch einsum": lambda: einsum(q, d),
        "torch chunked (8 documents)": lambda: chunked(q, d, 8),
        "torch chunked (32 documents)": lambda: chunked(q, d, 32),
    }
    if not exact:
        runs["torch.compile"] = functools.partial(torch.compile(einsum, dynamic=False), q, d)
    runs["latemax, bfloat16 input"] = lambda: latemax.maxsim(half_q, half_d)
    runs["latemax, float16 input"] = lambda: latemax.maxsim(full_q, full_d)
    # exact: every block widened, as latemax does
    runs["torch chunked, bfloat16 widened"] = lambda: torch.cat(
        [chunked(half_q.float(), part.float(), len(part)) for part in half_d.split(8)]
    )
    if not exact:
        runs["torch chunked, bfloat16"] = lambda: chunked(half_q, half_d, 16).float()
    return runs | fast_maxsim(q, d) | ({} if exact else numkong(q, d))


def maxsim_cpu(shape: Shape) -> tuple[float, list[float]] | str:
    """(error, seconds), or why there are none."""
    if importlib.util.find_spec("maxsim_cpu") is None:
        return "not installed"
    arguments = map(str, (shape.l_q, shape.n_d, shape.l_d, shape.dim))
    command = [sys.executable, "-m", "benchmarks.maxsim_cpu_process", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=harness.ROOT)
    if done.returncode:
        return f"its process ended with {done.returncode}"
    error, *seconds = map(float, done.stdout.split())
    return error, seconds


def key(shape: Shape) -> tuple[int, int, int, int]:
    return shape.l_q, shape.n_d, shape.l_d, shape.dim


def row(shape: Shape, name: str, seconds: list[float], ours: list[float], error: float, limit: dict, reads: int = 1):
    """``reads``: how often the tokens pass through memory."""
    ms = harness.fifths(seconds)
    dtype = next((half for half in ("bfloat16", "float16") if half in name), "float32")
    compute = shape.flops / limit[f"matmul_{dtype}_tflops"] / 1e9
    read = reads * shape._replace(dtype=dtype).bytes / limit["read_gbs"] / 1e6
    return dict(
        shape=key(shape), name=name, ms_p20=ms["p20"], ms_p50=ms["p50"], ms_p80=ms["p80"],
        gflops=shape.flops / ms["p50"] / 1e6, max_error=error,
        vs_latemax=ms["p50"] / (1e3 * statistics.median(ours)), binding="matmul" if compute > read else "read",
        allowed_ms=max(compute, read), of_limit=max(compute, read) / ms["p50"],
    )  # fmt: skip


def scan(shape: Shape, limit: dict, rounds: int = ROUNDS, exact: bool = False) -> list[dict]:
    """One query against all documents, a row for each contender."""
    separate = "timed on the main shapes only" if exact else maxsim_cpu(shape)
    q, d, _ = shape.tensors("cpu")
    q = q[0]
    truth = torch.cat([latemax.reference.maxsim(q.double(), part.double()) for part in d.split(10)])
    runs = contenders(q, d, exact)
    errors, fewer = {}, {}
    for name, run in runs.items():
        dtype = "bfloat16" if "float16" in name else "float32"
        allowed = float("inf") if "approximate" in name else harness.tolerance(shape.l_q, dtype)
        errors[name] = harness.check(f"{name} at {shape.name}", run(), truth, allowed)
        start = time.perf_counter()
        run()
        spent = time.perf_counter() - start
        if spent > SLOW_SECONDS:
            fewer[name] = 1 if spent > 10 * SLOW_SECONDS else 3
    times = harness.interleaved(runs, rounds, fewer=fewer)
    if isinstance(separate, tuple):
        error, seconds = separate
        if error <= harness.tolerance(shape.l_q, "float32"):
            errors["maxsim-cpu (own process)"], times["maxsim-cpu (own process)"] = error, seconds
        else:
            print(f"maxsim-cpu is wrong by {error:.2g}: not timed")
    elif not exact:
        print(f"maxsim-cpu: {separate}")
    ours = times["latemax"]
    return [row(shape, name, seconds, ours, errors[name], limit) for name, seconds in times.items()]


def train(shape: Shape, limit: dict, rounds: int = ROUNDS) -> list[dict]:
    """Forward and both gradients; torch's by autograd over the chunked product."""
    q, d, _ = shape.tensors("cpu")
    q = q[0].requires_grad_()
    d.requires_grad_()
    scores: Runs = {"latemax": lambda: latemax.maxsim(q, d)}
    scores |= {f"torch chunked ({n} documents)": lambda n=n: chunked(q, d, n) for n in (8, 32)}
    runs = {name: lambda f=f: torch.autograd.grad(f().sum(), (q, d)) for name, f in scores.items()}
    truth = runs["torch chunked (8 documents)"]()
    errors = {
        name: max(
            harness.check(f"gradient of {name} at {shape.name}", found, right, 1e-4)
            for found, right in zip(run(), truth, strict=True)
        )
        for name, run in runs.items()
    }
    times = harness.interleaved(runs, rounds)
    ours = times["latemax"]
    # the tokens are read twice, their gradient is written
    return [row(shape, name, seconds, ours, errors[name], limit, reads=3) for name, seconds in times.items()]


def one_document(shape: Shape, limit: dict, rounds: int = ROUNDS, calls: int = 300) -> list[dict]:
    """Latency: microseconds of a call from Python, in a row of calls."""
    q, d, _ = shape.tensors("cpu")
    q, d = q[0], d[0]
    runs: Runs = {
        "latemax": lambda: latemax.maxsim(q, d),
        "torch matmul": lambda: (q @ d.mT).amax(-1).sum(-1),
        "torch einsum": lambda: torch.einsum("ic,jc->ij", q, d).amax(-1).sum(-1),
    } | fast_maxsim(q, d[None])
    truth = latemax.reference.maxsim(q.double(), d.double())
    for name, run in runs.items():
        harness.check(f"{name} at {shape.name}", run().squeeze(), truth, harness.tolerance(shape.l_q, "float32"))
    us = {name: 1e6 * x for name, x in harness.medians(runs, rounds, harness.timer(calls=calls)).items()}
    allowed = shape.flops / limit["matmul_float32_tflops"] / 1e6
    return [
        dict(shape=(shape.l_q, shape.l_d, shape.dim), name=name, us=x, vs_latemax=x / us["latemax"], allowed_us=allowed)
        for name, x in us.items()
    ]


def ragged(shape: shapes.Ragged, rounds: int = ROUNDS) -> dict:
    """Ragged documents compared with as many tokens in documents of one length: the cost of raggedness."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shape.shortest, shape.longest + 1, (shape.n_d,), generator=generator)
    mean = int(lengths.sum()) // shape.n_d
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    q = shapes.unit(shape.l_q, shape.dim, generator=generator)
    d = shapes.unit(int(offsets[-1]), shape.dim, generator=generator)
    same = d[: mean * shape.n_d].view(shape.n_d, mean, shape.dim)
    q_offsets = torch.tensor([0, shape.l_q])
    runs: Runs = {
        "ragged": lambda: latemax.maxsim_varlen(q, d, q_offsets, offsets),
        "dense": lambda: latemax.maxsim(q, same),
    }
    truth = torch.stack([latemax.reference.maxsim(q, part) for part in d.split(lengths.tolist())])
    harness.check("ragged", runs["ragged"]()[0], truth, harness.tolerance(shape.l_q, "float32"))
    ms = {name: 1e3 * x for name, x in harness.medians(runs, rounds).items()}
    per_token = (ms["ragged"] / len(d)) / (ms["dense"] / (mean * shape.n_d))
    return dict(
        lengths=f"{shape.shortest} to {shape.longest}", tokens=len(d), longest=shape.longest, ms=ms,
        per_token_vs_dense=per_token,
    )  # fmt: skip


def measure(tiny: bool = False, sweep: bool = False) -> dict[str, Any]:
    """Everything; ``sweep``: also the exact contenders at every shape of the sweep."""
    limit = harness.limits("cpu", 2 if tiny else 20)
    rounds = 2 if tiny else ROUNDS
    result: dict[str, Any] = dict(machine=harness.machine(packages=PEERS), limits=limit)

    def sized(listed: tuple) -> list:
        return [shape.tiny() for shape in listed] if tiny else list(listed)

    def over(listed: tuple, one: Callable[..., list[dict]], **options: Any) -> list[dict]:
        rows = []
        for shape in sized(listed):
            found = one(shape, limit, **options)
            print(f"{one.__name__} {shape.name}: latemax {found[0].get('ms_p50') or found[0]['us'] / 1e3:.3g} ms")
            rows += found
        return rows

    result["rows"] = over(shapes.SCAN, scan, rounds=rounds, exact=tiny)
    result["train"] = over(shapes.SCAN_TRAIN, train, rounds=rounds)
    result["one"] = over(shapes.ONE_DOCUMENT, one_document, rounds=rounds)
    result["ragged"] = [ragged(shape, rounds) for shape in sized(shapes.SCAN_RAGGED)]
    result["sweep"] = over(shapes.SWEEP if sweep else (), scan, rounds=min(rounds, 5), exact=True)
    return result


def by_shape(rows: list[dict]) -> dict[tuple, list[dict]]:
    found: dict[tuple, list] = {}
    for row in rows:
        found.setdefault(tuple(row["shape"]), []).append(row)
    return found


def table(result: dict) -> str:
    """The main shapes, a row for each contender."""
    machine, limit = result["machine"], result.get("limits")
    shapes = list(by_shape(result["rows"]))
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    cells = {(tuple(row["shape"]), row["name"]): row for row in result["rows"]}
    rows = []
    for name in names:
        line = [f"**{name}**" if name.startswith("latemax") else name]
        for shape in shapes:
            row = cells.get((shape, name))
            if row is None:
                line.append("")
                continue
            error = f", error {row['max_error']:.2g}" if "approximate" in name or "bfloat16" in name else ""
            share = f", {row['of_limit']:.0%} of limit" if limit and name.startswith("latemax") else ""
            line.append(f"{row['ms_p50']:.1f} ms ({row['vs_latemax']:.2f}×{error}{share})")
        rows.append(line)
    head = ["(l_q, n_d, l_d, dim)", *(str(shape) for shape in shapes)]
    peers = "".join(f", {name} {version}" for name, version in machine["peers"].items())
    return markdown(head, rows) + (
        f"\nMedian of interleaved rounds; in brackets the time as a multiple of latemax float32. {machine['cpu']} "
        f"({machine['capability']}), {machine['threads']} threads, torch {machine['torch']}{peers}, commit "
        f"{machine['commit']}, {machine['date']}.{' ' + measured_limits(limit) if limit else ''}\n"
    )


def table_of_others(result: dict) -> str:
    """Forward and backward, one document, ragged documents, and the sweep in one line."""
    rows = []
    for shape, here in by_shape(result["train"]).items():
        mine, best = here[0], min(here[1:], key=lambda row: row["ms_p50"])
        rows.append([f"forward and backward {shape}", f"{mine['ms_p50']:.1f} ms",
                     f"{best['name']} by autograd {best['ms_p50']:.1f} ms: {best['vs_latemax']:.2f}×"])  # fmt: skip
    for shape, here in by_shape(result["one"]).items():
        mine, best = here[0], min(here[1:], key=lambda row: row["us"])
        rows.append([f"a call with one document {shape}", f"{mine['us']:.1f} µs",
                     f"{best['name']} {best['us']:.1f} µs: {best['vs_latemax']:.2f}×; only its products at the "
                     f"matmul rate {mine['allowed_us']:.1f} µs"])  # fmt: skip
    for row in result["ragged"]:
        rows.append([f"1000 ragged documents of {row['lengths']} tokens", f"{row['ms']['ragged']:.1f} ms",
                     f"a token costs {row['per_token_vs_dense']:.2f}× that of equally long documents"])  # fmt: skip
    ratios = []
    peers = [row for row in result["sweep"] if "float16" not in row["name"] and row["name"] != "latemax"]
    for shape, here in by_shape(peers).items():
        ratios.append((min(row["vs_latemax"] for row in here), shape))
    if ratios:
        ratios.sort()
        middle = ratios[len(ratios) // 2][0]
        rows.append([f"sweep of {len(ratios)} shapes, float32", f"best exact peer {middle:.2f}× (median)",
                     f"least {ratios[0][0]:.2f}× at {ratios[0][1]}"])  # fmt: skip
    return markdown(["what", "latemax", "compared with"], rows)


def table_in_short(result: dict) -> str:
    """Two shapes, short and long queries, without the contenders that the long table has too."""
    machine = result["machine"]
    by_name = {(tuple(row["shape"]), row["name"]): row for row in result["rows"]}
    every = list(by_shape(result["rows"]))
    shown = every[0], every[-1]
    rows = []
    for name in ("latemax", "latemax, bfloat16 input", "torch einsum", "torch chunked (32 documents)", "fast-maxsim"):
        cells = [by_name[shape, name] for shape in shown]
        times = [f"{row['ms_p50']:.1f} ms ({row['vs_latemax']:.2f}×)" for row in cells]
        rows.append([f"**{name}**" if name.startswith("latemax") else name, *times])
    return markdown(["(l_q, n_d, l_d, dim)", *map(str, shown)], rows) + (
        f"\nIn brackets: times of latemax float32. {machine['cpu']} ({machine['capability']}), {machine['threads']} "
        f"threads, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}.\n"
    )


def table_of_peers(result: dict) -> str:
    """What each exact or approximate contender takes, over the main shapes."""
    machine, rows = result["machine"], []
    names = [row["name"] for row in result["rows"] if not row["name"].startswith("latemax")]
    for name in dict.fromkeys(names):
        here = [row for row in result["rows"] if row["name"] == name]
        ratios, error = [row["vs_latemax"] for row in here], max(row["max_error"] for row in here)
        rows.append([name, machine["peers"].get(name.split(" ")[0], f"torch {machine['torch']}"),
                     f"{min(ratios):.2f}× to {max(ratios):.2f}×", f"{error:.2g}"])  # fmt: skip
    return markdown(["contender", "version", "time, of latemax float32", "largest error of a score"], rows) + (
        f"\nThe shapes of [performance](performance.md). {machine['cpu']} ({machine['capability']}), "
        f"{machine['threads']} threads, commit {machine['commit']}, {machine['date']}.\n"
    )


def reason(result: dict) -> str:
    """A line of the README: scoring and training compared with the best exact alternative."""
    best = sorted(
        min(row["vs_latemax"] for row in here)
        for here in by_shape(
            [row for row in result["sweep"] if "float16" not in row["name"] and row["name"] != "latemax"]
        ).values()
    )
    steps = [min(row["vs_latemax"] for row in here[1:]) for here in by_shape(result["train"]).values()]
    return (
        f"- **Exact scores in half the time**: the best exact alternative takes {best[len(best) // 2]:.2f}× as long in "
        f"the median of {len(best)} shapes, {best[0]:.2f}× at least; a training step by autograd {min(steps):.1f}× to "
        f"{max(steps):.1f}× ({result['machine']['capability']}).\n"
    )


TABLES = {
    "cpu": Table("cpu", table),
    "cpu-more": Table("cpu", table_of_others),
    "cpu-avx512": Table("cpu-avx512", table),
    "cpu-peers": Table("cpu", table_of_peers),
    "cpu-peers-avx512": Table("cpu-avx512", table_of_peers),
    "cpu-short": Table("cpu-avx512", table_in_short),
    "reason-scoring": Table("cpu", reason),
}


def main() -> None:
    parser = harness.parser(__doc__)
    sweep = f"also the {len(shapes.SWEEP)} shapes of the sweep, exact peers"
    parser.add_argument("--sweep", action="store_true", help=sweep)
    options = parser.parse_args()
    harness.finish(measure(options.tiny, options.sweep), lambda x: table(x) + table_of_others(x), options.json)


if __name__ == "__main__":
    main()
