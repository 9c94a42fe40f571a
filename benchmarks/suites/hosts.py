"""The hosts' own calls, and the same calls of latemax.compat, interleaved.

    python -m benchmarks.suites.hosts [--json FILE] [--host NAME ...] [--hosts FOLDER] [--avx2]
    python -m benchmarks.suites.hosts --merge FILE ... --json FILE

`make test-hosts` fills the folder (.hosts): a folder per host and `libs`. Each host runs in a process of its own, since
they pin versions of each other. Scores are compared before anything is timed. vLLM needs a GPU: its rows are against
a stand-in.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import latemax
from benchmarks import harness, internals
from benchmarks.runs import calmest
from benchmarks.shapes import unit
from benchmarks.tables import Table, markdown

ROUNDS = 7
# what keeps torch, oneDNN, MKL and OpenBLAS from using anything better
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}  # fmt: skip


class Call(NamedTuple):
    name: str
    host: Callable[..., Any]
    ours: Callable[..., Any]
    inputs: tuple[Any, ...]
    train: bool = False  # forward and backward; the inputs are tensors
    tolerance: float = 1e-3
    scores: Callable[[Any], Tensor] = lambda result: result  # of what both return, to compare


class Make:
    """Random unit tokens; in a rehearsal few of them."""

    def __init__(self, tiny: bool) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.most = 40 if tiny else 10**9

    def dense(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return unit(*(min(n, self.most) for n in shape[:-1]), shape[-1], generator=self.generator).to(dtype)

    def ragged(self, n: int, shortest: int, longest: int, dim: int = 128) -> list[Tensor]:
        lengths = torch.randint(shortest, longest + 1, (min(n, self.most),), generator=self.generator)
        return [self.dense(length, dim) for length in lengths.tolist()]


def retrieval(make: Make, name: str, host: Callable[..., Any], ours: Callable[..., Any]) -> Iterator[Call]:
    q, d = make.dense(16, 20, 128), make.dense(200, 1030, 128)
    yield Call(f"{name} 16×20 vs 200×1030, list, float32", host, ours, (list(q), list(d)))
    halves = (list(q.bfloat16()), list(d.bfloat16()))
    yield Call(f"{name} 16×20 vs 200×1030, list, bfloat16", host, ours, halves, tolerance=0.2)
    pages = make.ragged(200, 300, 1030)
    yield Call(f"{name} 16×20 vs 200×300…1030, list, float32", host, ours, (list(q), pages))


def colpali_engine(make: Make) -> Iterator[Call]:
    from colpali_engine.loss import ColbertLoss
    from colpali_engine.utils import maxsim as host
    from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor

    from latemax.compat import colpali_engine as ours

    yield from retrieval(
        make, "score_multi_vector", BaseVisualRetrieverProcessor.score_multi_vector, ours.score_multi_vector
    )
    pair = make.dense(32, 32, 128), make.dense(32, 1030, 128)
    yield Call("in-batch loss scores 32×32 vs 32×1030", host.maxsim_inbatch, ours.maxsim_inbatch, pair, train=True)
    loss = ColbertLoss(use_smooth_max=True, normalize_scores=False)
    name, smooth = "the same, smooth maximum", functools.partial(ours.inbatch_scores, loss)
    yield Call(name, loss._inbatch_scores, smooth, pair, train=True)


def transformers(make: Make) -> Iterator[Call]:
    from transformers.models.colpali.processing_colpali import ColPaliProcessor

    from latemax.compat import transformers as ours

    def host(q: list[Tensor], d: list[Tensor]) -> Tensor:
        return ColPaliProcessor.score_retrieval(None, q, d)

    yield from retrieval(make, "score_retrieval", host, ours.score_retrieval)


def sentence_transformers(make: Make) -> Iterator[Call]:
    from sentence_transformers.multi_vector_encoder import scoring
    from sentence_transformers.util import similarity as host

    from latemax.compat import sentence_transformers as ours

    q, d = make.dense(1, 32, 128), make.dense(1000, 180, 128)
    for dtype in (torch.float32, torch.bfloat16):
        name, allowed = str(dtype).removeprefix("torch."), 1e-3 if dtype == torch.float32 else 0.3
        pair = q.to(dtype), d.to(dtype)
        yield Call(f"maxsim 1×32 vs 1000×180, tensor, {name}", host.maxsim, ours.maxsim, pair, tolerance=allowed)
        pair = list(pair[0]), list(pair[1])
        yield Call(f"maxsim 1×32 vs 1000×180, list, {name}", host.maxsim, ours.maxsim, pair, tolerance=allowed)
    pair = make.dense(32, 32, 128), make.dense(32, 1, 300, 128)
    yield Call("colbert_scores 32×32 vs 32×300", scoring.colbert_scores, ours.colbert_scores, pair, train=True)
    pair = make.dense(256, 32, 128), make.dense(256, 300, 128)
    yield Call("maxsim_pairwise 256×32 vs 256×300", host.maxsim_pairwise, ours.maxsim_pairwise, pair)


def pylate(make: Make) -> Iterator[Call]:
    from pylate import rank
    from pylate import scores as host

    from latemax.compat import pylate as ours

    q, d = make.dense(1, 32, 128), make.dense(1000, 180, 128)
    for dtype, allowed in ((torch.float32, 1e-3), (torch.bfloat16, 0.5)):
        name = f"colbert_scores 1×32 vs 1000×180, {str(dtype).removeprefix('torch.')}"
        pair = q.to(dtype), d.to(dtype)
        yield Call(name, host.colbert_scores, ours.colbert_scores, pair, tolerance=allowed)
    pair = make.dense(32, 32, 128), make.dense(32, 1, 300, 128)
    yield Call("ColBERTScores 32×32 vs 32×300", host.ColBERTScores(), ours.ColBERTScores(), pair, train=True)
    pair = make.dense(16, 32, 128), make.dense(16, 16, 180, 128)
    yield Call("colbert_kd_scores 16×32 vs 16×16×180", host.colbert_kd_scores, ours.colbert_kd_scores, pair, True)
    pair = make.dense(16, 32, 128), make.dense(16, 2, 300, 128)
    k = min(256, pair[1].shape[2])
    yield Call("XTRScores 16×32 vs 32×300", host.XTRScores(k), ours.XTRScores(k), pair, train=True)
    documents = [x.numpy() for x in make.ragged(1000, 60, 180)]
    ids = [[*range(len(documents))]]

    def scores_of(ranked: list[list[dict[str, Any]]]) -> Tensor:
        return torch.tensor([row["score"] for row in ranked[0]])

    inputs, name = (ids, [q[0].numpy()], [documents]), "rank.rerank 1×32 vs 1000×60…180, numpy"
    yield Call(name, rank.rerank, ours.rerank, inputs, scores=scores_of)


def mteb(make: Make) -> Iterator[Call]:
    from mteb import similarity_functions as host

    from latemax.compat import mteb as ours

    pair: tuple[Any, Any] = make.dense(16, 20, 128), make.dense(200, 1030, 128)
    yield Call("max_sim 16×20 vs 200×1030, tensor", host.max_sim, ours.max_sim, pair)
    pair = make.ragged(64, 8, 32), make.ragged(500, 50, 300)
    yield Call("max_sim 64×8…32 vs 500×50…300, list", host.max_sim, ours.max_sim, pair)


def qdrant_client(make: Make) -> Iterator[Call]:
    from qdrant_client import QdrantClient, models
    from qdrant_client.local import multi_distances

    from latemax.compat import qdrant_client as ours

    points = make.ragged(2000, 64, 192)
    client = QdrantClient(":memory:")
    multi = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    params = models.VectorParams(size=128, distance=models.Distance.COSINE, multivector_config=multi)
    client.create_collection("pages", vectors_config=params)
    for start in range(0, len(points), 500):
        batch = enumerate(points[start : start + 500], start)
        client.upsert("pages", [models.PointStruct(id=i, vector=x.tolist()) for i, x in batch])
    own, query = multi_distances.calculate_multi_distance_core, make.dense(32, 128).tolist()

    def search(function: Callable[..., Any]) -> Callable[..., Tensor]:
        def run() -> Tensor:
            multi_distances.calculate_multi_distance_core = function  # what patch does, without its search of modules
            found = client.query_points("pages", query, limit=10, with_payload=False)
            return torch.tensor([point.score for point in found.points])

        return run

    name = "query_points, local, 1×32 vs 2000×64…192"
    yield Call(name, search(own), search(ours.calculate_multi_distance_core), ())


def lancedb(make: Make) -> Iterator[Call]:
    import lancedb
    import pyarrow as pa

    from latemax.compat import lancedb as ours
    from latemax.store import to_arrow

    documents = make.ragged(2000, 64, 192)
    offsets = torch.tensor([0, *(len(x) for x in documents)]).cumsum(0)
    column = to_arrow((torch.cat(documents), offsets))["tokens"]
    query = make.dense(32, 128).numpy()
    with tempfile.TemporaryDirectory() as folder:
        rows = pa.table({"id": range(len(documents)), "vector": column})
        table = lancedb.connect(folder).create_table("pages", rows)
        in_memory = table.to_arrow()

        def host() -> Tensor:
            found = table.search(query).distance_type("cosine").select(["id", "_distance"]).limit(10).to_arrow()
            return len(query) - torch.from_numpy(found["_distance"].to_numpy().copy())

        def scan(rows: Callable[[], pa.Table]) -> Callable[[], Tensor]:
            return lambda: torch.from_numpy(ours.scan(rows(), query, 10)["_relevance_score"].to_numpy().copy())

        yield Call("search without an index, 1×32 vs 2000×64…192", host, scan(table.to_arrow), ())
        yield Call("the same, its table in memory", host, scan(lambda: in_memory), ())


def vllm(make: Make) -> Iterator[Call]:
    from latemax.compat import vllm as ours

    query, documents = make.dense(32, 128), make.ragged(256, 60, 300)

    def stand_in(q: list[Tensor], d: list[Tensor]) -> Tensor:
        """As documented: 64 pairs a batch, padded with zeros, multiplied, padding masked with -inf."""
        scores = []
        for start in range(0, len(q), 64):
            a, b = (torch.nn.utils.rnn.pad_sequence(x[start : start + 64], batch_first=True) for x in (q, d))
            lengths = torch.tensor([len(x) for x in d[start : start + 64]])
            s = torch.bmm(a, b.mT)
            padding = torch.arange(b.shape[1]) >= lengths.unsqueeze(1)
            scores.append(s.masked_fill_(padding.unsqueeze(1), -torch.inf).amax(-1).sum(-1))
        return torch.cat(scores)

    def run(q: list[Tensor], d: list[Tensor]) -> Tensor:
        return torch.stack(ours.compute_maxsim_score_batched(q, d))

    name = "compute_maxsim_score_batched 1×32 vs 256×60…300"
    yield Call(name, stand_in, run, ([query] * len(documents), documents))


def lists(make: Make) -> Iterator[Call]:
    for name, n, shortest, longest in (("1×32 vs 1000×180", 1000, 180, 180), ("1×32 vs 10×1030", 10, 1030, 1030)):
        q, documents = make.dense(1, 32, 128), make.ragged(n, shortest, longest)
        packed, q_offsets = torch.cat(documents), torch.tensor([0, q.shape[1]])
        offsets = torch.tensor([0, *(len(x) for x in documents)]).cumsum(0)

        def varlen(
            _: Any, q: Tensor = q, packed: Tensor = packed, a: Tensor = q_offsets, b: Tensor = offsets
        ) -> Tensor:
            return latemax.maxsim_varlen(q[0], packed, a, b)

        def of_list(x: list[Tensor], q: Tensor = q) -> Tensor:
            return latemax.maxsim(q, x)

        yield Call(f"maxsim {name}: packed tokens, and a list", varlen, of_list, (documents,))


# host -> its calls and its distribution; ours are compared with themselves in the last
HOSTS: dict[str, tuple[Callable[[Make], Iterator[Call]], str]] = {
    "colpali_engine": (colpali_engine, "colpali-engine"),
    "transformers": (transformers, "transformers"),
    "sentence_transformers": (sentence_transformers, "sentence-transformers"),
    "pylate": (pylate, "pylate"),
    "mteb": (mteb, "mteb"),
    "qdrant_client": (qdrant_client, "qdrant-client"),
    "lancedb": (lancedb, "lancedb"),
    "vllm": (vllm, "stand-in for vLLM"),
    "lists": (lists, "latemax"),
}


def row(host: str, call: Call, rounds: int) -> dict[str, Any]:
    if call.train:
        leaves = [x.requires_grad_() for x in call.inputs]

        def timed(function: Callable[..., Any]) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)
    else:

        def timed(function: Callable[..., Any]) -> Callable[[], Any]:
            return lambda: function(*call.inputs)

    scores, truth = (call.scores(function(*call.inputs)) for function in (call.ours, call.host))
    error = harness.check(f"{host}: {call.name}", scores.detach(), truth.detach(), call.tolerance)
    runs = {"host": timed(call.host), "ours": timed(call.ours)}
    harness.interleaved(runs, 1)  # the first calls allocate
    seconds = harness.medians(runs, rounds)
    return dict(
        host=host, call=call.name, train=call.train, host_ms=1e3 * seconds["host"], ours_ms=1e3 * seconds["ours"],
        ratio=seconds["host"] / seconds["ours"], error=error,
    )  # fmt: skip


def measure_one(host: str, tiny: bool, avx2: bool = False) -> dict[str, Any]:
    """Rows of one host, in this process."""
    if avx2:
        internals.limit_native("avx2")
    calls, distribution = HOSTS[host]
    sys.path.append(str(harness.ROOT / "tests"))
    importlib.import_module("torchvision_shim").install()
    rows = [row(host, call, 1 if tiny else ROUNDS) for call in calls(Make(tiny))]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return dict(rows=rows, version=f"{distribution} {version}".strip())


def measure(hosts: list[str], folder: pathlib.Path, tiny: bool = False, avx2: bool = False) -> dict[str, Any]:
    rows, versions, options = [], {}, ["--tiny"] * tiny + ["--avx2"] * avx2
    for host in hosts:
        own = [str(folder / host), str(folder / "libs"), str(harness.ROOT / ".vision-libs")]
        path = os.pathsep.join([*own, str(harness.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with tempfile.TemporaryDirectory() as scratch:
            found = pathlib.Path(scratch) / "rows.json"
            command = [sys.executable, "-m", "benchmarks.suites.hosts", "--child", "--host", host, "--json", str(found)]
            environment = {**os.environ, **(AVX2 if avx2 else {}), "PYTHONPATH": path}
            subprocess.run([*command, *options], env=environment, check=True)
            part = json.loads(found.read_text())
        rows += part["rows"]
        versions[host] = part["version"]
    machine = harness.machine()
    return dict(machine=machine | dict(capability="AVX2") if avx2 else machine, versions=versions, rows=rows)


def table(result: dict) -> str:
    """Milliseconds of every call by the host and by latemax.compat."""
    machine, lines, runs = result["machine"], [], result.get("runs", 1)
    of_runs = f", of the calmest of {runs} runs" if runs > 1 else ""
    for row in result["rows"]:
        what = row["call"] + (", forward and backward" if row["train"] else "")
        cells = [f"{row[key]:.3g}" for key in ("host_ms", "ours_ms")]
        lines.append([result["versions"][row["host"]], what, *cells, f"{row['ratio']:.1f}×"])
    return markdown(["host", "call", "host, ms", "latemax, ms", "ratio"], lines) + (
        f"\nUnit tokens of dim 128, float32 unless it says otherwise; scores are compared first; median of {ROUNDS} or "
        f"more interleaved rounds{of_runs}. {machine['cpu']} ({machine['capability']}), {machine['threads']} threads, "
        f"torch {machine['torch']}, commit {machine['commit']}, {machine['date']}.\n"
    )


def table_by_host(result: dict) -> str:
    """The range of every host's calls."""
    machine, lines = result["machine"], []
    for host in dict.fromkeys(row["host"] for row in result["rows"]):
        ratios = [row["ratio"] for row in result["rows"] if row["host"] == host]
        if host not in ("lists", "vllm"):
            low, high = f"{min(ratios):.1f}×", f"{max(ratios):.1f}×"
            lines.append([result["versions"][host], len(ratios), low if low == high else f"{low} to {high}"])
    return markdown(["library", "calls", "its time, of latemax"], lines) + (
        f"\nAll calls: [hosts](hosts.md). {machine['cpu']} ({machine['capability']}), {machine['threads']} threads, "
        f"commit {machine['commit']}, {machine['date']}.\n"
    )


def reason(result: dict) -> str:
    """A line of the README: what the hosts gain."""
    rows = [row for row in result["rows"] if row["host"] in result["versions"] and row["host"] not in ("lists", "vllm")]
    ratios = sorted(row["ratio"] for row in rows)
    return (
        f"- **One line inside your library**: {len(rows)} calls of colpali-engine, transformers, "
        f"sentence-transformers, PyLate, mteb, qdrant-client and LanceDB run {ratios[0]:.1f}× to {ratios[-1]:.1f}× as "
        f"fast, {ratios[len(ratios) // 2]:.1f}× in the median ({result['machine']['capability']}).\n"
    )


TABLES = {
    "hosts": Table("hosts-avx512", table),
    "hosts-amd": Table("hosts-avx512-amd", table),
    "hosts-avx2": Table("hosts-avx2", table),
    "hosts-short": Table("hosts-avx512", table_by_host),
    "reason-hosts": Table("hosts-avx512", reason),
}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--host", action="append", choices=HOSTS, help="only this one; may be repeated")
    parser.add_argument("--hosts", type=pathlib.Path, default=harness.ROOT / ".hosts", help="folder of the libraries")
    parser.add_argument("--avx2", action="store_true", help="keep latemax and the hosts from using AVX-512")
    parser.add_argument("--merge", type=pathlib.Path, nargs="+", metavar="FILE", help="results to join, of one machine")
    parser.add_argument("--child", action="store_true", help="measure one host in this process")
    options = parser.parse_args()
    if options.child:
        harness.write(options.json, measure_one(options.host[0], options.tiny, options.avx2))
        return
    if options.merge:
        results = [json.loads(path.read_text()) for path in options.merge]
        harness.finish(calmest(results, [*HOSTS]), table, options.json)
        return
    harness.finish(measure(options.host or [*HOSTS], options.hosts, options.tiny, options.avx2), table, options.json)


if __name__ == "__main__":
    main()
