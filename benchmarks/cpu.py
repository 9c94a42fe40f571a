"""The CPU path beside what else one could call, interleaved in one run; every row is checked before it is timed.

    python -m benchmarks.cpu [--sweep] [--json FILE]

Peers are optional: ``pip install fast-maxsim==0.2.0 numkong==7.8.6 maxsim-cpu``. numkong screens in 8 bits and is
approximate: its error stands beside its time. Its packing of the documents is not timed. maxsim-cpu can end its
process: it runs in one of its own, before the others. Limits (matmul rate, read bandwidth) come from the same run.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import latemax
from latemax.cli.bench import limits
from latemax.ops import native_cpu_backend

# (l_q, n_d, l_d, dim)
SHAPES = [(32, 1000, 512, 128), (32, 1000, 196, 128), (128, 200, 1024, 128), (1024, 20, 1024, 128)]
# (l_q, n_d, l_d, dim) of forward and backward
TRAIN = [(32, 200, 196, 128), (32, 100, 512, 128)]
# (l_q, l_d, dim) of one query against one document, a call at a time
ONE = [(32, 196, 128), (8, 196, 128), (32, 1030, 128)]
SWEEP = [
    (l_q, n_d, l_d, dim)
    for l_q in (8, 32, 128, 1024)
    for l_d in (196, 512, 1024)
    for dim in (64, 128, 768)
    for n_d in (100, 1000, 10_000)
    # 1 GB of documents, 20 GFLOP
    if n_d * l_d * dim <= 1 << 28 and l_q * n_d * l_d * dim <= 10**10
]
ROUNDS = 15
# a contender that takes longer than this is timed in three rounds, one that takes ten times as long in one
SLOW_SECONDS = 0.5
MAXSIM_CPU = """
import sys, time, numpy, maxsim_cpu
l_q, n_d, l_d, dim = map(int, sys.argv[1:])
random = numpy.random.default_rng(0)
q, d = random.standard_normal((l_q, dim), "float32"), random.standard_normal((n_d, l_d, dim), "float32")
q /= numpy.linalg.norm(q, axis=-1, keepdims=True)
d /= numpy.linalg.norm(d, axis=-1, keepdims=True)
truth = numpy.array([(document @ q.T).max(0).sum() for document in d])
error = abs(numpy.asarray(maxsim_cpu.maxsim_scores(q, d)) - truth).max()
times = []
for _ in range(7):
    start = time.perf_counter()
    maxsim_cpu.maxsim_scores(q, d)
    times.append(time.perf_counter() - start)
print(error, *times)
"""


def chunked(q, d, documents):
    """Plain chunked matmul + amax, documents as the batch."""
    return torch.cat([torch.matmul(q, part.mT).amax(-1).sum(-1) for part in d.split(documents)])


def contenders(q, d, compiled: bool) -> dict:
    """name -> function returning scores [n_d]."""
    half_q, half_d = q.bfloat16(), d.bfloat16()
    full_q, full_d = q.half(), d.half()

    def einsum(q, d):
        return torch.einsum("ic,njc->nij", q, d).amax(-1).sum(-1)

    runs = {
        "latemax": lambda: latemax.maxsim(q, d),
        "torch einsum": lambda: einsum(q, d),
        "torch chunked (8 documents)": lambda: chunked(q, d, 8),
        "torch chunked (32 documents)": lambda: chunked(q, d, 32),
    }
    if compiled:
        runs["torch.compile"] = functools.partial(torch.compile(einsum, dynamic=False), q, d)
    runs["latemax, bfloat16 input"] = lambda: latemax.maxsim(half_q, half_d)
    runs["latemax, float16 input"] = lambda: latemax.maxsim(full_q, full_d)
    # exact: every block widened, as latemax does
    runs["torch chunked, bfloat16 widened"] = lambda: torch.cat(
        [chunked(half_q.float(), part.float(), len(part)) for part in half_d.split(8)]
    )
    if compiled:
        runs["torch chunked, bfloat16"] = lambda: chunked(half_q, half_d, 16).float()
    if importlib.util.find_spec("fast_maxsim"):
        from fast_maxsim import maxsim_scores

        a, b = q.numpy(), d.numpy()
        runs["fast-maxsim"] = lambda: torch.as_tensor(maxsim_scores(a, b))
    if compiled and importlib.util.find_spec("numkong"):
        import numkong

        packed_q = numkong.maxsim_pack(q.numpy())
        packed_d = [numkong.maxsim_pack(document) for document in d.numpy()]
        # it returns Σ (1 - similarity) of unit vectors
        runs["numkong (approximate, 1 thread)"] = lambda: torch.tensor(
            [len(q) - numkong.maxsim_packed(packed_q, document) for document in packed_d]
        )
    return runs


def maxsim_cpu(shape) -> tuple[float, list[float]] | str:
    """(error, seconds), or why there are none."""
    if importlib.util.find_spec("maxsim_cpu") is None:
        return "not installed"
    done = subprocess.run([sys.executable, "-c", MAXSIM_CPU, *map(str, shape)], capture_output=True, text=True)
    if done.returncode:
        return f"its process ended with {done.returncode}"
    error, *seconds = map(float, done.stdout.split())
    return error, seconds


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def interleave(runs: dict, rounds: int, first: dict) -> dict[str, list[float]]:
    """name -> seconds; ``first``: what a call of each took before.

    Every round has an order of its own: who follows a call on one thread finds the other threads asleep.
    """
    times = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for turn in range(rounds):
        shuffle(order)
        for name in order:
            run = runs[name]
            if turn >= (1 if first[name] > 10 * SLOW_SECONDS else 3 if first[name] > SLOW_SECONDS else rounds):
                continue
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def row(shape, name, seconds, ours, error, limit, flops, traffic) -> dict:
    fifths = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
    p20, p50, p80 = (1e3 * x for x in (fifths[0], statistics.median(seconds), fifths[3]))
    half = "bfloat16" if "bfloat16" in name else "float16" if "float16" in name else "float32"
    compute = flops / limit[f"matmul_{half}_tflops"] / 1e9
    read = traffic / limit["read_gbs"] / 1e6 / (1 if half == "float32" else 2)
    return dict(
        shape=shape, name=name, ms_p20=p20, ms_p50=p50, ms_p80=p80, gflops=flops / p50 / 1e6, max_error=error,
        vs_latemax=p50 / (1e3 * statistics.median(ours)), binding="matmul" if compute > read else "read",
        allowed_ms=max(compute, read), of_limit=max(compute, read) / p50,
    )  # fmt: skip


def measure(shape, limit, rounds: int = ROUNDS, whole: bool = True) -> list[dict]:
    """A row a contender; ``whole``: the slow and the approximate ones too."""
    l_q, n_d, l_d, dim = shape
    torch.manual_seed(0)
    apart = maxsim_cpu(shape) if whole else "timed on the main shapes only"
    q, d = unit(l_q, dim), unit(n_d, l_d, dim)
    runs = contenders(q, d, whole)
    truth = torch.cat([latemax.reference.maxsim(q.double(), part.double()) for part in d.split(10)])
    errors, first = {}, {}
    for name, run in runs.items():
        errors[name] = (run().double() - truth).abs().max().item()
        start = time.perf_counter()
        run()
        first[name] = time.perf_counter() - start
        # a bfloat16 similarity of unit vectors is off by up to 2^-9; l_q of them are summed
        allowed = l_q / 512 if "float16" in name else 1e-4 + 1e-6 * l_q
        if "approximate" not in name and errors[name] > allowed:
            raise RuntimeError(f"{name} at {shape}: error {errors[name]:.3g} exceeds {allowed}")
    times = interleave(runs, rounds, first)
    if isinstance(apart, tuple):
        error, _ = apart
        if error < 1e-4 + 1e-6 * l_q:
            errors["maxsim-cpu (own process)"], times["maxsim-cpu (own process)"] = apart
        else:
            print(f"maxsim-cpu is wrong by {error:.2g}: not timed")
    elif whole:
        print(f"maxsim-cpu: {apart}")
    counted = limit, 2 * l_q * n_d * l_d * dim, 4 * n_d * l_d * dim
    return [row(shape, name, seconds, times["latemax"], errors[name], *counted) for name, seconds in times.items()]


def train(shape, limit) -> list[dict]:
    """Forward and both gradients; torch's by autograd over the chunked product."""
    l_q, n_d, l_d, dim = shape
    q, d = unit(l_q, dim).requires_grad_(), unit(n_d, l_d, dim).requires_grad_()
    scores = {"latemax": lambda: latemax.maxsim(q, d)}
    scores |= {f"torch chunked ({n} documents)": lambda n=n: chunked(q, d, n) for n in (8, 32)}
    runs = {name: lambda f=f: torch.autograd.grad(f().sum(), (q, d)) for name, f in scores.items()}
    truth = runs["torch chunked (8 documents)"]()
    errors = {
        name: max((x - y).abs().max().item() for x, y in zip(run(), truth, strict=True)) for name, run in runs.items()
    }
    if errors["latemax"] > 1e-4:
        raise RuntimeError(f"gradients at {shape}: error {errors['latemax']:.3g}")
    times = interleave(runs, ROUNDS, dict.fromkeys(runs, 0.0))
    # documents read twice, their gradient written
    counted = limit, 2 * l_q * n_d * l_d * dim, 3 * 4 * n_d * l_d * dim
    return [row(shape, name, seconds, times["latemax"], errors[name], *counted) for name, seconds in times.items()]


def one_document(shape, limit, calls: int = 300) -> list[dict]:
    """Latency: microseconds a call from Python, in a row of calls."""
    l_q, l_d, dim = shape
    q, d = unit(l_q, dim), unit(l_d, dim)
    runs = {
        "latemax": lambda: latemax.maxsim(q, d),
        "torch matmul": lambda: (q @ d.mT).amax(-1).sum(-1),
        "torch einsum": lambda: torch.einsum("ic,jc->ij", q, d).amax(-1).sum(-1),
    }
    if importlib.util.find_spec("fast_maxsim"):
        from fast_maxsim import maxsim_scores

        a, b = q.numpy(), d[None].numpy()
        runs["fast-maxsim"] = lambda: maxsim_scores(a, b)
    truth = latemax.reference.maxsim(q.double(), d.double())
    error = (runs["latemax"]() - truth).abs().item()
    if error > 1e-4:
        raise RuntimeError(f"latemax at {shape}: error {error:.3g}")
    rows = {name: functools.partial(repeat, run, calls) for name, run in runs.items()}
    times = interleave(rows, ROUNDS, dict.fromkeys(rows, 0.0))
    us = {name: 1e6 * statistics.median(seconds) / calls for name, seconds in times.items()}
    allowed = 2e-6 * l_q * l_d * dim / limit["matmul_float32_tflops"]
    return [
        dict(shape=shape, name=name, us=x, vs_latemax=x / us["latemax"], allowed_us=allowed) for name, x in us.items()
    ]


def repeat(run, times: int) -> None:
    for _ in range(times):
        run()


def ragged(l_q: int = 32, n_d: int = 1000, dim: int = 128) -> list[dict]:
    """Documents end to end against as many tokens in documents of one length: the cost of raggedness."""
    rows, outputs = [], (torch.empty(1, n_d), torch.empty(0, dtype=torch.int32))
    options = dict(normalize=False, empty_score=0.0)
    for name, shortest, longest in (("16 to 512", 16, 512), ("196 to 1030", 196, 1030), ("1 to 2000", 1, 2000)):
        lengths = torch.randint(shortest, longest + 1, (n_d,))
        mean = int(lengths.sum()) // n_d
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        q, d = unit(1, l_q, dim), unit(int(offsets[-1]), dim)
        same = d[: mean * n_d].view(n_d, mean, dim)
        packed = functools.partial(native_cpu_backend.forward_packed, q, d, None, None, None, offsets, None)
        dense = functools.partial(native_cpu_backend.forward, q, same, None, None)
        runs = {key: functools.partial(run, *outputs, **options) for key, run in (("ragged", packed), ("dense", dense))}
        times = interleave(runs, ROUNDS, dict.fromkeys(runs, 0.0))
        ms = {key: 1e3 * statistics.median(x) for key, x in times.items()}
        per_token = (ms["ragged"] / len(d)) / (ms["dense"] / same[..., 0].numel())
        rows.append(dict(lengths=name, tokens=len(d), longest=longest, ms=ms, per_token_vs_dense=per_token))
    return rows


def machine() -> dict:
    model = platform.processor()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")), model
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    peers = {}
    for name in ("fast-maxsim", "maxsim-cpu", "numkong"):
        try:
            peers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed: left out")
    return dict(
        cpu=model, capability=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads(),
        load=os.getloadavg()[0], torch=torch.__version__, latemax=latemax.__version__, commit=commit, peers=peers,
        date=datetime.date.today().isoformat(),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write machine and rows there")
    parser.add_argument("--sweep", action="store_true", help=f"also the {len(SWEEP)} shapes of the sweep, exact peers")
    options = parser.parse_args()
    result = dict(machine=machine(), limits=limits("cpu"), rows=[], train=[], one=[], ragged=[], sweep=[])
    print(result["machine"], result["limits"])
    for shape in SHAPES:
        result["rows"] += show(measure(shape, result["limits"]))
    for shape in TRAIN:
        print("\nforward and backward")
        result["train"] += show(train(shape, result["limits"]))
    for shape in ONE:
        rows = one_document(shape, result["limits"])
        result["one"] += rows
        print(f"one document {shape}:", ", ".join(f"{row['name']} {row['us']:.1f} us" for row in rows))
    result["ragged"] = ragged()
    for line in result["ragged"]:
        print(f"ragged, {line['lengths']} tokens: {line['per_token_vs_dense']:.2f}x dense a token")
    for shape in SWEEP if options.sweep else ():
        result["sweep"] += show(measure(shape, result["limits"], rounds=5, whole=False))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def show(rows: list[dict]) -> list[dict]:
    print("\n(l_q, n_d, l_d, dim) =", rows[0]["shape"])
    for row in rows:
        print(
            f"{row['name']:34} {row['ms_p50']:8.2f} ms  [{row['ms_p20']:.2f}, {row['ms_p80']:.2f}]"
            f"  {row['gflops']:6.0f} GFLOP/s  {row['vs_latemax']:5.2f}x  max error {row['max_error']:.1e}"
            f"  {row['of_limit']:4.0%} of limit ({row['binding']})",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
