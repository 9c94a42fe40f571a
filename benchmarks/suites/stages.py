"""First stages: candidates that hold the exact top 10, build time, bytes per document and time per query.

    python -m benchmarks.suites.stages [--crops 20000] [--add STAGE] [--json FILE] [--plot docs/img/stages.png]

Two corpora: crops of the demo's photos through DINOv2 (`benchmarks.crops` encodes them once and keeps them), and ragged
synthetic documents with planted neighbours. fastembed's encoding is built next to ours where it is installed.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import crops, harness
from benchmarks.tables import Table, markdown
from latemax import search

K = 10
CURVE = (10, 20, 50, 100, 200, 500, 1000)
Packed = tuple[Tensor, Tensor]


class FastEmbed(search.vectors.OneVector):
    """fastembed's Muvera as a first stage: its encodings, our search."""

    def __init__(self, corpus: Packed):
        from fastembed.postprocess.muvera import Muvera

        self._made = Muvera(corpus[0].shape[1])
        super().__init__(corpus, engine="torch", factory="Flat", memory=1 << 30, progress=False)

    def _width(self) -> int:
        return self._made.embedding_size

    def _encode(self, tokens: Tensor, offsets: Tensor, lengths: Tensor, out: dict[str, Tensor]) -> None:
        for i, (a, b) in enumerate(zip(offsets.tolist(), offsets[1:].tolist(), strict=False)):
            out["vectors"][i] = torch.from_numpy(self._made.process_document(tokens[a:b].float().numpy()))

    def _query(self, q: Tensor, q_mask: Tensor | None) -> Tensor:
        return torch.stack([torch.from_numpy(self._made.process_query(x.float().numpy())).float() for x in q])


def real(n: int, folder: pathlib.Path) -> tuple[Packed, Tensor]:
    """n crops and 100 queries, which are crops of the same photos: (tokens, offsets), q."""
    documents, queries = crops.encode(n, folder / "documents", 0), crops.encode(200, folder / "queries", 1)
    offsets = documents.offsets[: n + 1].clone()
    tokens = torch.empty(int(offsets[-1]), documents.dim, dtype=documents.dtype)
    documents.read(0, n, tokens)
    return (tokens, offsets), torch.stack([queries[i] for i in range(100)])


def planted(n: int, n_q: int = 100, dim: int = 128, seed: int = 0) -> tuple[Packed, Tensor]:
    """n documents of 16 to 256 tokens around topics they share; ten of each query's hold noisy copies of its tokens."""
    made = torch.Generator().manual_seed(seed)
    topics = torch.randn(256, dim, generator=made)
    q = F.normalize(
        topics[torch.randint(0, 256, (n_q, 32), generator=made)] + torch.randn(n_q, 32, dim, generator=made)
    )
    lengths = torch.randint(16, 257, (n,), generator=made)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    tokens = torch.empty(int(offsets[-1]), dim, dtype=torch.float16)
    neighbours = torch.randperm(n, generator=made)[: n_q * K].tolist()
    planted_in = {document: (i // K, i % K) for i, document in enumerate(neighbours)}
    for i, (a, b) in enumerate(zip(offsets.tolist(), offsets[1:].tolist(), strict=False)):
        own = topics[torch.randint(0, 256, (6,), generator=made)]
        made_of = own[torch.randint(0, 6, (b - a,), generator=made)] + torch.randn(b - a, dim, generator=made)
        if i in planted_in:
            query, rank = planted_in[i]
            count = min(b - a, 32)
            copies = q[query][torch.randperm(32, generator=made)[:count]] * dim**0.5
            made_of[:count] = copies + (0.6 + 0.1 * rank) * torch.randn(count, dim, generator=made)
        tokens[a:b] = F.normalize(made_of, dim=-1).half()
    return (tokens, offsets), q.half()


def contenders(tiny: bool) -> dict[str, Callable[[Packed], Any]]:
    small: dict[str, Any] = dict(width=64, solve=256, documents=64, tokens=512) if tiny else {}
    found: dict[str, Callable[[Packed], Any]] = {
        "MeanPool": lambda corpus: search.MeanPool(corpus, engine="torch"),
        "RowPool": search.RowPool,
        "Muvera": lambda corpus: search.Muvera(corpus, engine="torch"),
        "Muvera, projection 16": lambda corpus: search.Muvera(corpus, engine="torch", projection=16),
        "Lemur": lambda corpus: search.Lemur(corpus, engine="torch", **small),
    }
    if hasattr(search, "BinaryScan"):
        found["BinaryScan"] = search.BinaryScan
    try:
        import faiss  # noqa: F401

        found["MeanPool, faiss"] = lambda corpus: search.MeanPool(corpus, engine="faiss")
        found["MeanPool, faiss HNSW32"] = lambda corpus: search.MeanPool(corpus, engine="faiss", factory="HNSW32")
        found["Lemur, faiss"] = lambda corpus: search.Lemur(corpus, engine="faiss", **small)
    except ImportError:
        print("faiss is not installed: left out")
    try:
        import fastembed  # noqa: F401

        found["fastembed's Muvera, projection 16"] = FastEmbed
    except ImportError:
        print("fastembed is not installed: left out")
    return found


def judge(name: str, build: Callable[[Packed], Any], corpus: Packed, q: Tensor, exact: Tensor) -> dict[str, Any]:
    """One first stage on one corpus. Candidates needed for this share of the queries' exact top 10."""
    begin = time.perf_counter()
    first = build(corpus)
    seconds, n = time.perf_counter() - begin, min(1000, len(first))
    found = torch.cat([first.first(part, None, n) for part in q.split(10)])
    hit = exact.unsqueeze(-1) == found.unsqueeze(1)
    rank = torch.where(hit.any(-1), hit.float().argmax(-1), len(first)).flatten().sort().values + 1
    needed = {f"{share}": int(rank[-(-share * len(rank) // 100) - 1]) for share in (95, 99)}
    clock = harness.timer()
    times = [clock(lambda row=row: first.first(row.unsqueeze(0), None, n)) for row in q[:30]]
    row = dict(
        name=name, build_s=seconds, bytes=first.bytes_per_document, ms=1e3 * statistics.median(times[2:]),
        needed={share: count if count <= n else None for share, count in needed.items()},
        recall={m: float((rank <= m).float().mean()) for m in CURVE if m <= n},
    )  # fmt: skip
    print(row, flush=True)
    return row


def measure(
    tiny: bool = False, n: int = 20_000, folder: pathlib.Path = crops.FOLDER, only: str | None = None
) -> dict[str, Any]:
    """``n``: crops, and as many synthetic documents; ``folder``: of `benchmarks.crops`; ``only``: one stage."""
    result: dict[str, Any] = dict(machine=harness.machine(packages=("faiss-cpu", "fastembed")), tiny=tiny, corpora=[])
    made = [("planted", *planted(300, 5))] if tiny else [("crops", *real(n, folder)), ("planted", *planted(n))]
    for name, corpus, q in made:
        begin = time.perf_counter()
        exact = search.topk(q, corpus, K).indices
        exact_ms = 1e3 * (time.perf_counter() - begin) / len(q)
        result["corpora"].append(
            dict(
                name=name, documents=len(corpus[1]) - 1, tokens=len(corpus[0]), dim=q.shape[2], queries=len(q),
                l_q=q.shape[1], exact_ms=exact_ms, bytes=corpus[0].numel() * 2 / (len(corpus[1]) - 1),
                stages=[
                    judge(which, build, corpus, q, exact)
                    for which, build in contenders(tiny).items()
                    if only in (None, which)
                ],
            )
        )  # fmt: skip
    return result


def added(known: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A result with the stages of another one, which keep the commit of their run."""
    for into, corpus in zip(known["corpora"], new["corpora"], strict=True):
        names = [row["name"] for row in corpus["stages"]]
        into["stages"] = [row for row in into["stages"] if row["name"] not in names]
        into["stages"] += [row | dict(commit=new["machine"]["commit"]) for row in corpus["stages"]]
    return known


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Recall of the exact top 10 against candidates, one panel a corpus."""
    from latemax.viz._style import CYCLE, style

    with style() as plt:
        figure, axes = plt.subplots(1, len(result["corpora"]), figsize=(11, 5.2), sharey=True, squeeze=False)
        for axis, corpus in zip(axes[0], result["corpora"], strict=True):
            lines = [row for row in corpus["stages"] if "faiss" not in row["name"]]
            for i, row in enumerate(lines):
                points = {int(m): share for m, share in row["recall"].items()}
                dashed = "--" if "projection" in row["name"] else "-"
                axis.plot(list(points), list(points.values()), dashed, marker="o", ms=3.5,
                          color=[*CYCLE, "0.2"][i], label=f"{row['name']}, {row['bytes'] / 1e3:.1f} kB")  # fmt: skip
            axis.axhline(0.99, color="#D9D9D9", zorder=0)
            axis.set(xscale="log", xlabel="candidates", title=f"{corpus['documents']:,} documents: {corpus['name']}")
            axis.set_xticks(CURVE, [str(m) for m in CURVE])
            axis.minorticks_off()
        axes[0][0].set_ylabel("share of the exact top 10 among them")
        for axis, anchor in zip(axes[0], (0.27, 0.76), strict=False):
            figure.legend(*axis.get_legend_handles_labels(), frameon=False, fontsize=8.5, ncols=2, loc="upper center",
                          bbox_to_anchor=(anchor, 0.17))  # fmt: skip
        figure.tight_layout(rect=(0, 0.17, 1, 1))
        figure.savefig(path, dpi=110)
        plt.close(figure)


def table(result: dict[str, Any]) -> str:
    """Every first stage on every corpus."""
    text = ""
    for corpus in result["corpora"]:
        rows = []
        for row in corpus["stages"]:
            counts = [f"{count:,}" if count else "> 1,000" for count in row["needed"].values()]
            rows.append([row["name"], *counts, f"{row['build_s']:.1f}", f"{row['bytes']:,.0f}", f"{row['ms']:.2f}"])
        head = ["first stage", "candidates for 95 %", "for 99 %", "build, s", "bytes per document", "ms per query"]
        text += markdown(head, rows) + (
            f"\n{corpus['name'].capitalize()}: {corpus['documents']:,} documents, {corpus['tokens']:,} tokens of dim "
            f"{corpus['dim']}, {corpus['bytes']:,.0f} bytes per document in float16; {corpus['queries']} queries of "
            f"{corpus['l_q']} tokens, which `topk` answers exactly in {corpus['exact_ms']:.0f} ms each.\n\n"
        )
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    later = {row["name"]: row["commit"] for corpus in result["corpora"] for row in corpus["stages"] if "commit" in row}
    runs = "".join(f"; {name} in a run of its own, commit {commit}" for name, commit in later.items())
    return text + (
        f"Candidates that hold this share of all queries' exact top 10. One query at a time, 1,000 candidates. "
        f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}, torch {machine['torch']}"
        f"{', ' + versions if versions else ''}, commit {machine['commit']}, {machine['date']}{runs}.\n"
    )


def table_of_scale(result: dict[str, Any]) -> str:
    """What first stages of the crops take for more documents, in proportion to what was measured."""
    corpus, rows = result["corpora"][0], []
    n = corpus["documents"]
    exact = dict(name="exact `topk`, float16 tokens", bytes=corpus["bytes"], ms=corpus["exact_ms"], build_s=0.0)
    for row in [
        exact,
        *(row for row in corpus["stages"] if "HNSW" not in row["name"] and "fastembed" not in row["name"]),
    ]:
        per, seconds, build = row["bytes"], row["ms"] / 1e3 / n, row["build_s"] / n
        rows.append(
            [
                row["name"], f"{per:,.0f}", f"{128e9 / per:,.2g}", f"{1e6 * seconds:,.2g}", f"{1e9 * seconds:,.3g}",
                f"{1e6 * build / 3600:,.2g}", f"{1e9 * build / 3600:,.3g}",
            ]
        )  # fmt: skip
    head = [
        "search", "bytes per document", "documents in 128 GB", "core-seconds per query, 10⁶", "10⁹",
        "core-hours to build, 10⁶", "10⁹",
    ]  # fmt: skip
    return markdown(head, rows) + (
        f"\nDocuments of {corpus['tokens'] // n} tokens of dim {corpus['dim']}, queries of {corpus['l_q']}; in "
        f"proportion to {n:,} documents on one core of {result['machine']['cpu']}, encoding left out. Lemur's learning "
        f"does not grow.\n"
    )


TABLES = {"stages": Table("stages", table), "scale-stages": Table("stages", table_of_scale)}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--crops", type=int, default=20_000)
    parser.add_argument("--folder", type=pathlib.Path, default=crops.FOLDER, help="where crops are kept")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the curves into this file")
    parser.add_argument("--add", metavar="STAGE", help="measure this one and add it to the JSON")
    options = parser.parse_args()
    result = measure(options.tiny, options.crops, options.folder, options.add)
    if options.add:
        result = added(json.loads(pathlib.Path(options.json).read_text()), result)
    harness.finish(result, table, options.json)
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
