"""What 8-bit codes, one-bit codes and mean pooling keep of the exact ranking, alone and as a first stage.

    python -m benchmarks.suites.quality [--source STORE --queries STORE] [--json FILE] [--plot FILE]

``--source`` is a store of real tokens (default: random ones), ``--queries`` a store whose documents are the queries.
"""

from __future__ import annotations

import os
import pathlib
import types
from typing import Any

import torch

from benchmarks import harness
from benchmarks.shapes import unit
from benchmarks.tables import Table, markdown
from latemax.search import retention
from latemax.store import PatchStore

K, CANDIDATES = 10, 50


def measure(
    tiny: bool = False, source: str | os.PathLike | None = None, queries: str | os.PathLike | None = None,
    n_queries: int = 20,
) -> dict[str, Any]:  # fmt: skip
    corpus: Any
    if source is None or queries is None:
        generator = torch.Generator().manual_seed(0)
        corpus, q = unit(60 if tiny else 2000, 8, 32, generator=generator), unit(3, 4, 32, generator=generator)
        name, lengths = "random unit tokens", 8.0
    else:
        corpus, asked = PatchStore(source), PatchStore(queries)
        q = torch.stack([asked.floats(i).float() for i in range(0, len(asked), max(1, len(asked) // n_queries))])
        q, name, lengths = q[:n_queries], "DINOv2 patches of crops", corpus.n_tokens / len(corpus)
    rows = [
        {name: value for name, value in row._asdict().items() if name != "indices"}
        for row in retention(q, corpus, K, n_candidates=CANDIDATES)
    ]
    shape = dict(documents=len(corpus), l_d=lengths, dim=q.shape[-1], n_q=len(q), l_q=q.shape[1], k=K)
    return dict(machine=harness.machine(), name=name, shape=shape, rows=rows)


def table(result: dict) -> str:
    """Quality and bytes of every search."""
    shape, machine = result["shape"], result["machine"]
    rows = [
        [row["method"], f"{row['overlap']:.3f}", f"{row['ndcg']:.3f}", f"{row['bytes']:,.0f}", f"{row['ms']:.1f}"]
        for row in result["rows"]
    ]
    head = ["search", f"share of the exact top {shape['k']}", "nDCG", "bytes per document", "ms per query"]
    return markdown(head, rows) + (
        f"\n{result['name']}: {shape['documents']:,} documents of {shape['l_d']:.0f} x {shape['dim']}, {shape['n_q']} "
        f"queries of {shape['l_q']} tokens. The exact ranking says what is relevant. {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}.\n"
    )


TABLES = {"quality": Table("quality", table, absent="(not measured yet: `python -m benchmarks.suites.quality`)\n")}


def plot(result: dict, path: pathlib.Path) -> None:
    from latemax.viz import plot_quality

    plot_quality([types.SimpleNamespace(**row) for row in result["rows"]], title=result["name"]).savefig(path)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--source", type=pathlib.Path, help="a store of real tokens")
    parser.add_argument("--queries", type=pathlib.Path, help="a store whose documents are the queries")
    parser.add_argument("--plot", type=pathlib.Path, help="write the plot of quality against bytes")
    options = parser.parse_args()
    result = measure(options.tiny, options.source, options.queries)
    if options.plot is not None:
        plot(result, options.plot)
    harness.finish(result, table, options.json)


if __name__ == "__main__":
    main()
