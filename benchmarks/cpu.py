"""The CPU path beside what else one could call, interleaved in one run; every row is checked before it is timed.

    python -m benchmarks.cpu [--json FILE]

Peers are optional: ``pip install fast-maxsim==0.2.0 numkong==7.8.6``. numkong screens in 8 bits and is approximate: its
error stands beside its time. Its packing of the documents is not timed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F

import latemax

# (l_q, n_d, l_d, dim)
SHAPES = [(32, 1000, 512, 128), (32, 1000, 196, 128), (128, 200, 1024, 128), (1024, 20, 1024, 128)]
ROUNDS = 15


def chunked(q, d, documents):
    """Plain chunked matmul + amax, documents as the batch."""
    return torch.cat([torch.matmul(q, part.mT).amax(-1).sum(-1) for part in d.split(documents)])


def contenders(q, d) -> dict:
    """name -> function returning scores [n_d]."""
    runs = {
        "latemax": lambda: latemax.maxsim(q, d),
        "torch einsum": lambda: torch.einsum("ic,njc->nij", q, d).amax(-1).sum(-1),
        "torch chunked (8 documents)": lambda: chunked(q, d, 8),
        "torch chunked (32 documents)": lambda: chunked(q, d, 32),
    }
    half_q, half_d = q.bfloat16(), d.bfloat16()
    runs["latemax, bfloat16 input"] = lambda: latemax.maxsim(half_q, half_d)
    runs["torch chunked, bfloat16"] = lambda: chunked(half_q, half_d, 16).float()
    if importlib.util.find_spec("fast_maxsim"):
        from fast_maxsim import maxsim_scores

        a, b = q.numpy(), d.numpy()
        runs["fast-maxsim"] = lambda: torch.as_tensor(maxsim_scores(a, b))
    if importlib.util.find_spec("numkong"):
        import numkong

        packed_q = numkong.maxsim_pack(q.numpy())
        packed_d = [numkong.maxsim_pack(document) for document in d.numpy()]
        # it returns Σ (1 - similarity) of unit vectors
        runs["numkong (approximate, 1 thread)"] = lambda: torch.tensor(
            [len(q) - numkong.maxsim_packed(packed_q, document) for document in packed_d]
        )
    return runs


def measure(shape) -> list[dict]:
    l_q, n_d, l_d, dim = shape
    torch.manual_seed(0)
    q, d = F.normalize(torch.randn(l_q, dim), dim=-1), F.normalize(torch.randn(n_d, l_d, dim), dim=-1)
    runs = contenders(q, d)
    truth = torch.cat([latemax.reference.maxsim(q.double(), part.double()) for part in d.split(10)])
    errors = {name: (run().double() - truth).abs().max().item() for name, run in runs.items()}
    # a bfloat16 similarity of unit vectors is off by up to 2^-9; l_q of them are summed
    tolerance = {
        name: l_q / 512 if "bfloat16" in name else 1e-4 + 1e-6 * l_q for name in runs if "approximate" not in name
    }
    for name, allowed in tolerance.items():
        if errors[name] > allowed:
            raise RuntimeError(f"{name} at {shape}: error {errors[name]:.3g} exceeds {allowed}")
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    flops = 2 * l_q * n_d * l_d * dim
    rows = []
    for name, seconds in times.items():
        fifths = statistics.quantiles(seconds, n=5)
        p20, p50, p80 = (1e3 * x for x in (fifths[0], statistics.median(seconds), fifths[3]))
        rows.append(
            dict(
                shape=shape, name=name, ms_p20=p20, ms_p50=p50, ms_p80=p80, gflops=flops / p50 / 1e6,
                max_error=errors[name], vs_latemax=p50 / (1e3 * statistics.median(times["latemax"])),
            )
        )  # fmt: skip
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
    for name in ("fast-maxsim", "numkong"):
        try:
            peers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed: left out")
    return dict(
        cpu=model, capability=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads(),
        torch=torch.__version__, latemax=latemax.__version__, commit=commit, peers=peers,
        date=datetime.date.today().isoformat(),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write machine and rows there")
    options = parser.parse_args()
    result = dict(machine=machine(), rows=[])
    print(result["machine"])
    for shape in SHAPES:
        rows = measure(shape)
        result["rows"] += rows
        print("\n(l_q, n_d, l_d, dim) =", shape)
        for row in rows:
            print(
                f"{row['name']:34} {row['ms_p50']:8.1f} ms  [{row['ms_p20']:.1f}, {row['ms_p80']:.1f}]"
                f"  {row['gflops']:6.0f} GFLOP/s  {row['vs_latemax']:5.2f}x  max error {row['max_error']:.1e}"
            )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
