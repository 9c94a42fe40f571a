"""Exact top-k from 8-bit codes against the scan of the tokens: from the page cache, and with the cache dropped.

    python -m benchmarks.suites.codes_topk [--source STORE] [--queries STORE] [--folder DIR] [--json FILE]

``--source`` is a store of real tokens, which is copied with codes if it has none (default: random tokens alone);
``--queries`` a store whose documents are the queries. Every answer is compared bit for bit.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import statistics
import tempfile
from typing import Any

import torch

from benchmarks import harness
from benchmarks.shapes import unit
from benchmarks.tables import Table, markdown
from latemax.search import TopK, topk
from latemax.store import PatchStore, StoreWriter

K = 10
L_D, DIM = 64, 384
# documents of random tokens
RANDOM = (2000, 20_000)


def with_codes(source: pathlib.Path, folder: pathlib.Path) -> PatchStore:
    """A copy of a store's tokens, with codes."""
    store = PatchStore(source)
    with StoreWriter(folder, codes="int8") as writer:
        for tokens, offsets in store.packed():
            writer.add_packed(tokens, offsets)
            writer.commit()
    return PatchStore(folder)


def random_store(folder: pathlib.Path, documents: int) -> PatchStore:
    generator = torch.Generator().manual_seed(0)
    with StoreWriter(folder, codes="int8") as writer:
        for _ in range(documents):
            writer.add(unit(L_D, DIM, generator=generator).half())
    return PatchStore(folder)


def same(a: TopK, b: TopK) -> bool:
    return torch.equal(a.indices, b.indices) and torch.equal(a.scores.view(torch.int32), b.scores.view(torch.int32))


def compare(name: str, store: PatchStore, queries: list[torch.Tensor], rounds: int) -> dict[str, Any]:
    """Seconds of a search, with codes and without, in turns; the median over queries of the median of rounds."""
    modes = {"codes": "auto", "plain": "off"}
    found: dict[str, Any] = dict(
        name=name, documents=len(store), gb=store.n_tokens * (store.dim or 0) * 2 / 1e9, queries=len(queries),
        l_q=len(queries[0]), k=K,
    )  # fmt: skip
    shares, read = [], []
    for q in queries:
        ours, plain = (topk(q, store, K, codes=mode) for mode in modes.values())
        if not same(ours, plain):
            raise RuntimeError(f"{name}: another answer from codes")
        stats = ours.stats or dict(rescored=len(store), bytes=found["gb"] * 1e9)
        shares.append(stats["rescored"] / len(store))
        read.append(stats["bytes"] / 1e9)
    found["rescored"], found["read_gb"] = statistics.mean(shares), statistics.mean(read)
    for state in ("cached", "cold"):
        times: dict[str, list[float]] = {mode: [] for mode in modes}
        for q in queries:

            def run(mode: str, q: torch.Tensor = q) -> Any:
                return lambda: topk(q, store, K, codes=mode)

            before = (lambda: harness.drop_cache(store.path)) if state == "cold" else (lambda: None)
            taken: dict[str, list[float]] = {mode: [] for mode in modes}
            for turn in range(rounds):
                for key in sorted(modes, reverse=turn % 2 == 1):
                    before()
                    taken[key].append(harness.timer()(run(modes[key])))
            for key, values in taken.items():
                times[key].append(statistics.median(values))
        found[state] = {key: statistics.median(values) for key, values in times.items()}
    return found


def measure(
    tiny: bool = False, source: str | os.PathLike | None = None, queries: str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None, n_queries: int = 3, rounds: int = 3,
) -> dict[str, Any]:  # fmt: skip
    scratch = pathlib.Path(tempfile.mkdtemp(dir=folder))
    rows = []
    try:
        if source is not None and queries is not None:
            asked = PatchStore(queries)
            chosen = [asked.floats(i).half() for i in range(0, len(asked), max(1, len(asked) // n_queries))][:n_queries]
            real = PatchStore(source)
            if real.codes is None:
                real = with_codes(pathlib.Path(source), scratch / "real")
            rows.append(compare("DINOv2 patches of crops", real, chosen, rounds))
        generator = torch.Generator().manual_seed(1)
        asked_of_random = [unit(L_D, DIM, generator=generator).half() for _ in range(1 if tiny else n_queries)]
        for documents in (200,) if tiny else RANDOM:
            store = random_store(scratch / f"random-{documents}", documents)
            rows.append(compare("random unit tokens", store, asked_of_random, 1 if tiny else rounds))
    finally:
        shutil.rmtree(scratch)
    return dict(machine=harness.machine(), rows=rows)


def table(result: dict) -> str:
    """Exact top-k from codes and from tokens."""
    rows = [
        [
            row["name"], f"{row['documents']:,} ({row['gb']:.2f} GB)", f"{100 * row['rescored']:.1f} %",
            f"{row['read_gb']:.2f}",
            *(
                f"{1e3 * row[state]['plain']:.0f} / {1e3 * row[state]['codes']:.0f} "
                f"({row[state]['plain'] / row[state]['codes']:.2f}×)"
                for state in ("cached", "cold")
            ),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    machine, first = result["machine"], result["rows"][0]
    head = [
        "float16 tokens", "documents", "scored from tokens", "GB read", "ms without / with codes, page cache",
        "ms, cache dropped",
    ]  # fmt: skip
    loaded = f" Other programs ran meanwhile (load average {machine['load']:.0f})." if machine["load"] > 2 else ""
    return markdown(head, rows) + (
        f"\nOne query of {first['l_q']} tokens, k {first['k']}, the median of {first['queries']} queries, in turns; "
        f"every answer equal bit for bit. {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date']}.{loaded}\n"
    )


ABSENT = "(not measured yet: `python -m benchmarks.suites.codes_topk`)\n"
TABLES = {
    "codes-topk": Table("codes_topk", table, absent=ABSENT),
    "codes-topk-avx2": Table("codes_topk-avx2", table, absent=ABSENT),
}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--source", type=pathlib.Path, help="a store of real tokens")
    parser.add_argument("--queries", type=pathlib.Path, help="a store whose documents are the queries")
    parser.add_argument("--folder", type=pathlib.Path, help="where stores are written (default: the temporary one)")
    options = parser.parse_args()
    result = measure(options.tiny, options.source, options.queries, options.folder)
    harness.finish(result, table, options.json)


if __name__ == "__main__":
    main()
