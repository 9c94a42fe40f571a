"""A store larger than the memory it may use: searched whole, beside what the disk and the memory give.

    python -m benchmarks.corpus [--gb 10] [--limit-gb 2] [--folder DIR] [--json FILE]

Writes a store of random tokens into DIR, then searches it in a fresh process whose resident set is watched, and whose
address space is limited beyond what the libraries take, and deletes it. The disk is measured with the page cache of the
files dropped (posix_fadvise), the memory by summing an array.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks.cpu import machine
from latemax.search import topk
from latemax.store import PatchStore, StoreWriter

DIM, L_D, L_Q, K = 128, 196, 32, 10
BLOCK = 1 << 23


def write(folder: pathlib.Path, gb: float) -> float:
    """Seconds to write a float16 store of gb · 10⁹ bytes of tokens."""
    documents = int(gb * 1e9 / (L_D * DIM * 2))
    generator = torch.Generator().manual_seed(0)
    pool = torch.nn.functional.normalize(torch.randn(64 * L_D, DIM, generator=generator), dim=-1).half()
    start = time.perf_counter()
    with StoreWriter(folder) as writer:
        for i in range(documents):
            # a run of the pool's rows at a place of its own, its columns turned: no two documents share a token's best
            at = (i * 7919) % (63 * L_D)
            writer.add(pool[at : at + L_D].roll(i % 127, 1))
    return time.perf_counter() - start


def drop_cache(folder: pathlib.Path) -> None:
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_rate(folder: pathlib.Path) -> float:
    """GB/s of plain reads of all files into one buffer."""
    buffer, total, start = bytearray(BLOCK), 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - start) / 1e9


def memory_rate() -> float:
    """GB/s of summing an array four times the size of any cache here."""
    x, times = torch.ones(1 << 27), []
    for _ in range(10):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return x.numel() * 4 / min(times) / 1e9


def resident() -> dict[str, int]:
    """Bytes now, by kind, and the highest so far."""
    found = {}
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "VmSize"):
            found[name] = int(value.split()[0]) << 10
    return found


def search(folder: pathlib.Path, limit: int, memory: int) -> dict:
    """In the fresh process: the search, its rate and its resident set; the address space held to ``limit`` more."""
    store = PatchStore(folder)
    generator = torch.Generator().manual_seed(1)
    q = torch.nn.functional.normalize(torch.randn(L_Q, DIM, generator=generator), dim=-1).half()
    topk(q, (store[0], torch.tensor([0, L_D])), 1)
    before = resident()
    # libraries reserve addresses they never touch: the limit is on what the search adds
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + limit, resource.RLIM_INFINITY))
    start = time.perf_counter()
    found = topk(q, store, K, memory=memory)
    seconds = time.perf_counter() - start
    after = resident()
    return dict(
        seconds=seconds, gbs=store.n_tokens * DIM * 2 / seconds / 1e9, peak_bytes=after["VmHWM"],
        before_bytes=before["VmRSS"], address_space_added=limit, memory=memory,
        scores=found.scores.tolist(), indices=found.indices.tolist(),
    )  # fmt: skip


def fresh(folder: pathlib.Path, limit: int, memory: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.corpus", "--search", folder, "--limit", limit, "--memory", memory]
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def brute(folder: pathlib.Path) -> torch.Tensor:
    """Every score by plain torch over each shard, in float32 of the same float16 tokens."""
    generator = torch.Generator().manual_seed(1)
    q = torch.nn.functional.normalize(torch.randn(L_Q, DIM, generator=generator), dim=-1).half().float()
    scores = []
    for tokens, _ in PatchStore(folder).packed():
        for part in tokens.view(-1, L_D, DIM).split(512):
            scores.append((part.float() @ q.T).amax(1).sum(-1))
    return torch.cat(scores)


def scoring_rate() -> float:
    """GB/s of documents that the operator scores out of memory, without any disk."""
    d = torch.nn.functional.normalize(torch.randn(4000, L_D, DIM), dim=-1).half()
    q, offsets, times = d[0, :L_Q].clone(), torch.arange(4001) * L_D, []
    for _ in range(7):
        start = time.perf_counter()
        topk(q, (d.view(-1, DIM), offsets), K)
        times.append(time.perf_counter() - start)
    return d.numel() * 2 / statistics.median(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=10.0)
    parser.add_argument("--limit-gb", type=float, default=2.0, help="of address space the search may add")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--search", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        print(json.dumps(search(options.search, options.limit, options.memory)))
        return
    folder = pathlib.Path(tempfile.mkdtemp(dir=options.folder)) / "store"
    try:
        result = dict(machine=machine(), shape=dict(l_q=L_Q, l_d=L_D, dim=DIM, dtype="float16", k=K), gb=options.gb)
        result["write_gbs"] = options.gb / write(folder, options.gb)
        result["documents"] = len(PatchStore(folder))
        limit = int(options.limit_gb * 1e9)
        drop_cache(folder)
        result["disk_gbs"] = read_rate(folder)
        drop_cache(folder)
        result["cold"] = fresh(folder, limit, 1 << 28)
        read_rate(folder)
        result["cached_read_gbs"] = read_rate(folder)
        result["cached"] = fresh(folder, limit, 1 << 28)
        result["memory_gbs"] = memory_rate()
        result["scoring_gbs"] = scoring_rate()
        scores = brute(folder)
        for name in ("cold", "cached"):
            # scores that float32 cannot tell apart may stand in another order
            found = torch.tensor(result[name]["scores"])
            here = (found - scores[result[name]["indices"]]).abs().max().item()
            rank = (found - scores.topk(K).values).abs().max().item()
            result[name]["error"] = max(here, rank)
            if not result[name]["error"] < 1e-5:
                raise RuntimeError(f"{name}: not the brute force ranking: scores differ by {result[name]['error']:.2g}")
    finally:
        shutil.rmtree(folder.parent)
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
