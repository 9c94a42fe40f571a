"""A store larger than the memory it may use: searched whole, compared with the rates of the disk and the memory.

    python -m benchmarks.suites.corpus [--gb 10] [--limit-gb 2] [--folder DIR] [--json FILE]

Writes a store of random tokens into DIR, searches it in a fresh process whose resident set is watched and whose address
space may grow by the limit only, and deletes it. The disk is measured with the page cache of the files dropped
(posix_fadvise), the memory by summing an array.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pathlib
import resource
import shutil
import statistics
import tempfile
import time
from typing import Any

import torch

from benchmarks import harness
from benchmarks.shapes import CORPUS as SHAPE
from benchmarks.shapes import CORPUS_K as K
from benchmarks.shapes import unit
from benchmarks.tables import Table, markdown
from latemax.search import topk
from latemax.store import PatchStore, StoreWriter

BLOCK = 1 << 23
MEMORY = 1 << 28
DOCUMENT_BYTES = SHAPE.l_d * SHAPE.dim * 2


def write_store(folder: pathlib.Path, gb: float) -> float:
    """Seconds to write a float16 store of gb · 10⁹ bytes of tokens."""
    pool = unit(64 * SHAPE.l_d, SHAPE.dim, generator=torch.Generator().manual_seed(0)).half()
    start = time.perf_counter()
    with StoreWriter(folder) as writer:
        for i in range(int(gb * 1e9 / DOCUMENT_BYTES)):
            # rows of the pool from a start of its own, columns rotated: no two documents share a token's best
            at = (i * 7919) % (63 * SHAPE.l_d)
            writer.add(pool[at : at + SHAPE.l_d].roll(i % 127, 1))
    return time.perf_counter() - start


def query() -> torch.Tensor:
    return unit(SHAPE.l_q, SHAPE.dim, generator=torch.Generator().manual_seed(1)).half()


def read_rate(folder: pathlib.Path) -> float:
    """GB/s of plain reads of all files into one buffer."""
    buffer, total, start = bytearray(BLOCK), 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - start) / 1e9


def memory_rate(elements: int) -> float:
    """GB/s of summing an array of float32."""
    x, seconds = torch.ones(elements), harness.timer()
    return x.numel() * 4 / min(seconds(x.sum) for _ in range(10)) / 1e9


def scoring_rate(documents: int) -> float:
    """GB/s of documents in memory that the operator scores, without any disk."""
    d = unit(documents, SHAPE.l_d, SHAPE.dim, generator=torch.Generator().manual_seed(2)).half()
    q, offsets, seconds = d[0, : SHAPE.l_q].clone(), torch.arange(documents + 1) * SHAPE.l_d, harness.timer()
    times = [seconds(lambda: topk(q, (d.view(-1, SHAPE.dim), offsets), K)) for _ in range(7)]
    return d.numel() * 2 / statistics.median(times) / 1e9


def resident() -> dict[str, int]:
    """Bytes now, by kind, and the highest so far."""
    found = {}
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "VmSize"):
            found[name] = int(value.split()[0]) << 10
    return found


def search(folder: pathlib.Path, limit: int) -> dict[str, Any]:
    """In the fresh process: the search, its rate and its resident set; the address space may grow by ``limit``."""
    store, q = PatchStore(folder), query()
    topk(q, (store[0], torch.tensor([0, SHAPE.l_d])), 1)
    before = resident()
    # libraries reserve addresses they never touch: the limit is on what the search adds
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + limit, resource.RLIM_INFINITY))
    start = time.perf_counter()
    found = topk(q, store, K, memory=MEMORY)
    seconds = time.perf_counter() - start
    after = resident()
    return dict(
        seconds=seconds, gbs=store.n_tokens * SHAPE.dim * 2 / seconds / 1e9, peak_bytes=after["VmHWM"],
        before_bytes=before["VmRSS"], address_space_added=limit, memory=MEMORY,
        scores=found.scores.tolist(), indices=found.indices.tolist(),
    )  # fmt: skip


def search_in_fresh_process(folder: pathlib.Path, limit: int) -> dict[str, Any]:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(search, folder, limit).result()


def brute_force(folder: pathlib.Path) -> torch.Tensor:
    """Every score by plain torch over each shard, in float32 of the same float16 tokens."""
    q, scores = query().float(), []
    for tokens, _ in PatchStore(folder).packed():
        for part in tokens.view(-1, SHAPE.l_d, SHAPE.dim).split(512):
            scores.append((part.float() @ q.T).amax(1).sum(-1))
    return torch.cat(scores)


def measure(
    tiny: bool = False, gb: float = 10.0, limit_gb: float = 2.0, folder: str | os.PathLike | None = None
) -> dict[str, Any]:
    """``limit_gb``: of address space that the search may add; ``folder``: where the store is written."""
    gb = 0.02 if tiny else gb
    store = pathlib.Path(tempfile.mkdtemp(dir=folder)) / "store"
    try:
        shape = dict(l_q=SHAPE.l_q, l_d=SHAPE.l_d, dim=SHAPE.dim, dtype=SHAPE.dtype, k=K)
        result: dict[str, Any] = dict(machine=harness.machine(), shape=shape, gb=gb)
        result["write_gbs"] = gb / write_store(store, gb)
        result["documents"] = len(PatchStore(store))
        limit = int(limit_gb * 1e9)
        harness.drop_cache(store)
        result["disk_gbs"] = read_rate(store)
        harness.drop_cache(store)
        result["cold"] = search_in_fresh_process(store, limit)
        read_rate(store)
        result["cached_read_gbs"] = read_rate(store)
        result["cached"] = search_in_fresh_process(store, limit)
        # four times the size of any cache here
        result["memory_gbs"] = memory_rate(1 << 20 if tiny else 1 << 27)
        result["scoring_gbs"] = scoring_rate(20 if tiny else SHAPE.n_d)
        scores = brute_force(store)
        for name in ("cold", "cached"):
            # by score at the index and by rank: documents with equal scores may come in any order
            found = torch.tensor(result[name]["scores"])
            result[name]["error"] = max(
                harness.check(f"{name}: score", found, scores[result[name]["indices"]], 1e-5),
                harness.check(f"{name}: ranking", found, scores.topk(K).values, 1e-5),
            )
    finally:
        shutil.rmtree(store.parent)
    return result


def table(result: dict) -> str:
    """A store searched within a bound of memory, and the rates of the machine."""
    machine, shape = result["machine"], result["shape"]
    rows = [
        ["plain read of the files, page cache dropped", f"{result['disk_gbs']:.2f}", ""],
        ["plain read of the files again", f"{result['cached_read_gbs']:.2f}", ""],
        ["sum of an array in memory", f"{result['memory_gbs']:.2f}", ""],
        ["`topk` of documents in memory", f"{result['scoring_gbs']:.2f}", ""],
        *(
            [f"**`topk` of the store**, {what}", f"{result[key]['gbs']:.2f}", f"{result[key]['peak_bytes'] / 1e6:.0f}"]
            for key, what in (("cold", "page cache dropped"), ("cached", "again"))
        ),
    ]
    one = result["cold"]
    return markdown(["what", "GB/s", "peak resident MB"], rows) + (
        f"\n{result['gb']:g} GB of {shape['dtype']} tokens, {result['documents']:,} documents of {shape['l_d']} x "
        f"{shape['dim']}, one query of {shape['l_q']} tokens, k {shape['k']}; memory={one['memory'] / 1e6:.0f} MB, "
        f"{one['before_bytes'] / 1e6:.0f} MB resident before the search, and the address space held to "
        f"{one['address_space_added'] / 1e9:g} GB more (RLIMIT_AS). Scores within {one['error']:.1g} of brute force. "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{machine['commit']}, {machine['date']}.\n"
    )


def table_of_scale(result: dict) -> str:
    """Seconds to score every page of a billion, by GPUs; inputs marked measured or spec."""
    shape = result["shape"]
    page = shape["l_d"] * shape["dim"] * 2
    total, rows = page * 1e9, []
    for name, gbs, source in (
        ("PCIe 5.0 x16, a direction", 64.0, "spec"),
        ("HBM3 of one H100 SXM", 3350.0, "spec"),
        ("disk of the CPU machine above", result["disk_gbs"], "measured"),
        ("topk of the CPU machine above", result["cold"]["gbs"], "measured"),
    ):
        seconds = [total / gbs / 1e9 / n for n in (1, 8, 64, 512)]
        rows.append([name, f"{gbs:.3g}", source, *(f"{s:,.3g}" for s in seconds)])
    head = ["what feeds the scoring", "GB/s each", "input is", "1", "8", "64", "512"]
    return markdown(head, rows) + (
        f"\nSeconds to pass 10⁹ pages of {shape['l_d']} float16 tokens of dim {shape['dim']} ({page:,} bytes per page, "
        f"{total / 1e12:.1f} TB) once through N devices, at the full rate of the link named.\n"
    )


def table_of_ten_million(result: dict) -> str:
    """Bytes and seconds of 10⁷ pages of a retriever, by what a token is stored as."""
    pages, tokens, dim, rows = 10**7, 1030, 128, []
    rate = result["cold"]["gbs"]
    for name, each in (
        ("float16", 2 * dim),
        ("8-bit codes, scale and error", dim + 8),
        ("1-bit codes and scale", dim // 8 + 4),
    ):
        total = pages * tokens * each
        seconds = total / rate / 1e9
        rows.append([name, f"{tokens * each / 1e3:,.1f}", f"{total / 1e12:.2f}", f"{seconds:,.0f}",
                     f"{-(-seconds // 10):,.0f}", f"{-(-total // (512 * 10**9)):,.0f}"])  # fmt: skip
    head = [
        "a token is stored as",
        "kB per page",
        "TB",
        "seconds, one machine",
        "machines for 10 s",
        "machines of 512 GB",
    ]
    return markdown(head, rows) + (
        f"\n{pages:,} pages of {tokens:,} tokens of dim {dim}, each read once at {rate:.2f} GB/s, the rate "
        f"measured for float16 from disk. Rows with codes assume the same rate, which has not been measured.\n"
    )


def reason(result: dict) -> str:
    """A line of the README: search in less memory than the corpus has."""
    one = result["cold"]
    return (
        f"- **A corpus larger than memory**: exact search of {result['gb']:g} GB on disk ({result['documents']:,} "
        f"documents of {result['shape']['l_d']} random tokens) takes {one['seconds']:.1f} s and peaks at "
        f"{one['peak_bytes'] / 1e6:.0f} MB of resident memory; scores within {one['error']:.0e} of brute force.\n"
    )


TABLES = {
    "corpus": Table("corpus", table),
    "scale": Table("corpus", table_of_scale),
    "scale-ten-million": Table("corpus", table_of_ten_million),
    "reason-corpus": Table("corpus", reason),
}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--gb", type=float, default=10.0)
    parser.add_argument("--limit-gb", type=float, default=2.0, help="of address space the search may add")
    parser.add_argument("--folder", type=pathlib.Path, help="where the store is written (default: the temporary one)")
    options = parser.parse_args()
    result = measure(options.tiny, options.gb, options.limit_gb, options.folder)
    harness.finish(result, table, options.json)


if __name__ == "__main__":
    main()
