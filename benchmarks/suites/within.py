"""Ten of a million documents: what ``within=`` costs in a store that large, compared with a store of the ten alone.

python -m benchmarks.suites.within [--documents 1000000] [--json FILE]
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.shapes import unit
from benchmarks.tables import Table, markdown
from latemax.search import MeanPool, topk, two_stage
from latemax.store import PatchStore, StoreWriter

# Tiny documents: the time is that of finding them, not of scoring.
TOKENS, DIM, CHOSEN, K = 2, 16, 10, 5


def write(folder: pathlib.Path, n: int) -> None:
    made = torch.Generator().manual_seed(0)
    with StoreWriter(folder) as writer:
        for start in range(0, n, 100_000):
            count = min(100_000, n - start)
            tokens = unit(count * TOKENS, DIM, generator=made).half()
            ids = [f"page-{i}" for i in range(start, start + count)]
            writer.add_packed(tokens, torch.arange(count + 1) * TOKENS, ids)


def measure(tiny: bool = False, documents: int = 1_000_000) -> dict[str, Any]:
    """``documents``: of the large store."""
    n = 2000 if tiny else documents
    result: dict[str, Any] = dict(machine=harness.machine(), documents=n, chosen=CHOSEN, k=K, l_d=TOKENS, dim=DIM)
    with tempfile.TemporaryDirectory() as folder:
        large, small = pathlib.Path(folder) / "large", pathlib.Path(folder) / "small"
        start = time.perf_counter()
        write(large, n)
        result["write_s"] = time.perf_counter() - start
        start = time.perf_counter()
        store = PatchStore(large)
        result["open_s"] = time.perf_counter() - start
        chosen = torch.arange(CHOSEN) * (n // CHOSEN) + 3
        names = [f"page-{i}" for i in chosen.tolist()]
        with StoreWriter(small) as writer:
            for i, name in zip(chosen.tolist(), names, strict=True):
                writer.add(store[i], name)
        alone, q = PatchStore(small), unit(8, DIM, generator=torch.Generator().manual_seed(1)).half()
        mask = torch.zeros(n, dtype=torch.bool)
        mask[chosen] = True
        pool, pool_alone = MeanPool(store, engine="torch"), MeanPool(alone, engine="torch")
        memory = torch.empty(store.n_tokens, DIM, dtype=torch.float16)
        store.read(0, n, memory)
        packed = memory, store.offsets
        exact = topk(q, alone, K)
        calls: dict[str, Callable[[], Any]] = {
            "`topk` of a store of the ten alone": lambda: topk(q, alone, K),
            "`topk`, within ten indices": lambda: topk(q, store, K, within=chosen),
            "`topk`, within ten ids": lambda: topk(q, store, K, within=names),
            "`topk`, within a mask [n_d]": lambda: topk(q, store, K, within=mask),
            "`topk` of (tokens, offsets), within ten indices": lambda: topk(q, packed, K, within=chosen),
            "`two_stage` of a store of the ten alone": lambda: two_stage(q, alone, K, pool_alone),
            "`two_stage`, within ten indices": lambda: two_stage(q, store, K, pool, within=chosen),
            "`two_stage`, within ten ids": lambda: two_stage(q, store, K, pool, within=names),
            "`topk` of all": lambda: topk(q, store, K),
        }
        clock, result["ms"] = harness.timer(), {}
        for name, call in calls.items():
            found = call()
            if name != "`topk` of all":
                same = found.indices if "alone" not in name else chosen[found.indices]
                assert torch.equal(same, chosen[exact.indices]), name
            repeats = 3 if name == "`topk` of all" else 15
            result["ms"][name] = 1e3 * statistics.median(clock(call) for _ in range(repeats))
    return result


def table(result: dict[str, Any]) -> str:
    """Milliseconds of one query."""
    machine = result["machine"]
    rows = [[name, f"{ms:,.2f}"] for name, ms in result["ms"].items()]
    return markdown(["one query", "ms"], rows) + (
        f"\n{result['chosen']} of {result['documents']:,} documents of {result['l_d']} x {result['dim']}, "
        f"k {result['k']}, 8 query tokens; every answer is that of the ten alone. The store opens in "
        f"{result['open_s']:.2f} s. {machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}, "
        f"commit {machine['commit']}, {machine['date']}.\n"
    )


TABLES = {"within": Table("within", table)}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    options = parser.parse_args()
    harness.finish(measure(options.tiny, options.documents), table, options.json)


if __name__ == "__main__":
    main()
