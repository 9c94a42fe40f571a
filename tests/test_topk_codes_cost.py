"""`topk` of a store with codes reads few tokens, leaves codes that do not help, and keeps to its memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from coded import DIM, DTYPES, assert_same, clustered, compare, queries, store_of

from latemax import StoreWriter, topk
from latemax.search import bounded
from latemax.search import corpus as corpora


@pytest.fixture(autouse=True)
def small_gaps(monkeypatch):
    """These corpora are smaller than the shortest gap."""
    monkeypatch.setattr(bounded, "GAP_WORK", 0)


@pytest.fixture
def seen(monkeypatch):
    """The blocks of codes that a search takes, as (first document, the one after the last)."""
    found, real = [], bounded.Search._block
    monkeypatch.setattr(bounded.Search, "_block", lambda self, a, b, x: found.append((a, b)) or real(self, a, b, x))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_most_documents_are_not_read(dtype, tmp_path):
    items = clustered()
    store = store_of(tmp_path, items, dtype)
    found, _ = compare(queries(items, 1).to(dtype), store, 3)
    assert found.stats["rescored"] < 60
    tokens, size = store.n_tokens, DIM * dtype.itemsize
    assert tokens * (DIM + 8) <= found.stats["bytes"] < tokens * (DIM + 8) + 0.3 * tokens * size


def alike(n=1000):
    """One direction: every document scores about the same, and bounds of an 8-bit query show it."""
    generator = torch.Generator().manual_seed(0)
    return [torch.ones(4, DIM) + 1e-4 * torch.randn(4, DIM, generator=generator) for _ in range(n)]


def test_loose_bounds_leave_codes_for_the_plain_scan(tmp_path, seen):
    found, _ = compare(torch.ones(1, 2, DIM), store_of(tmp_path, alike(2000)), 5)
    # samples of 20 documents after gaps of 300 and 600
    assert seen == [(0, 20), (320, 340), (940, 960)]
    assert found.stats["rescored"] >= 1900 and sum(b - a for a, b in seen) <= 0.05 * 2000


def test_a_small_corpus_is_sampled_once(tmp_path, monkeypatch, seen):
    """A sample takes longer than the tokens of a short gap."""
    monkeypatch.setattr(bounded, "GAP_WORK", 1 << 33)
    compare(torch.ones(1, 2, DIM), store_of(tmp_path, alike()), 5)
    assert seen == [(0, 20)]


def graded(n=1000):
    """Documents of which any 20 in a row score 0, 0.05, … 0.95 of a query that is 1 and zeros."""
    items = torch.zeros(n, 1, DIM)
    items[:, 0, 0] = (torch.arange(n) * 7 % 20) / 20
    return list(items)


@pytest.mark.parametrize(("coarse", "fine", "asked"), [(0.16, 0.1, [True, False]), (0.4, 0.1, [True])])
def test_bounds_of_the_float_query_only_where_they_may_pay(coarse, fine, asked, tmp_path, monkeypatch, seen):
    """Bounds this far from a score: 25 % of a block survive both, too many. A fourth of 0.4 is no better."""
    kinds = []

    def bounds(q, tokens, offsets, *_, coarse, **__):
        kinds.append(coarse)
        scores = tokens.dequantize()[:, 0].unsqueeze(0)
        return scores - width[coarse], scores + width[coarse]

    width = {True: coarse, False: fine}
    monkeypatch.setattr(bounded, "bound_corpus", bounds)
    q = torch.zeros(1, 1, DIM)
    q[..., 0] = 1
    monkeypatch.setattr(bounded, "GAP_WORK", 1 << 33)
    found, _ = compare(q, store_of(tmp_path, graded()), 5)
    assert kinds == asked and seen == [(0, 20)] and found.stats["rescored"] >= 980


def test_what_the_risen_floor_leaves_out_is_not_bounded_again(tmp_path, monkeypatch):
    """Documents of rising score: most of those that waited are far below the best."""
    items = torch.zeros(600, 1, DIM)
    items[:, 0, 0] = torch.arange(600) / 10
    q, kinds, waited = torch.zeros(1, 1, DIM), [], []
    q[..., 0] = 1
    real, score = bounded.bound_corpus, bounded.Search._score_waiting

    def bounds(q, tokens, offsets, *rest, coarse, **options):
        kinds.append((coarse, len(offsets) - 1))
        return real(q, tokens, offsets, *rest, coarse=coarse, **options)

    def count(self):
        waited.append(sum(len(numbers) for numbers, *_ in self.waiting))
        score(self)

    monkeypatch.setattr(bounded, "bound_corpus", bounds)
    monkeypatch.setattr(bounded.Search, "_score_waiting", count)
    # no block is left, though all of it survives
    monkeypatch.setattr(bounded, "LOOSE", 1.0)
    compare(q, store_of(tmp_path, list(items)), 5)
    assert sum(n for coarse, n in kinds if not coarse) < 0.2 * sum(waited)


def test_parts_of_a_search_share_their_buffers(tmp_path, monkeypatch):
    """Pages are touched once: two buffers of tokens and two of codes, however many stretches are read."""
    store, made, real = store_of(tmp_path, alike()), [], corpora.Stored.empty
    monkeypatch.setattr(corpora.Stored, "empty", lambda self, rows: made.append(rows) or real(self, rows))
    q = torch.ones(1, 2, DIM)
    compare(q, store, 5)
    # of the search without codes, and of an empty document that checks the arguments
    assert sum(rows > 0 for rows in made) <= 4 + 2


def test_where_an_8_bit_query_is_no_faster_its_bounds_are_computed_once(tmp_path, monkeypatch):
    items = clustered(400, spread=4.0)
    q, store, seen = queries(items), store_of(tmp_path, items), []
    real = bounded.bound_corpus

    def float_query(*args, coarse, **options):
        seen.append(coarse)
        return real(*args, coarse=False, **options)

    monkeypatch.setattr(bounded, "bound_corpus", float_query)
    compare(q, store)
    assert seen.count(False) == 1 and seen.count(True) > 2


def test_small_memory_and_large_k_are_scored_without_codes(tmp_path):
    items = clustered(100)
    store = store_of(tmp_path, items)
    q = queries(items)
    assert topk(q, store, 31).stats is None
    assert topk(q, store, 5, memory=5_000).stats is None
    assert_same(topk(q, store, 5, memory=5_000), topk(q, store, 5))


def test_a_document_that_waits_is_scored_within_the_memory(tmp_path, monkeypatch):
    items = clustered(600)
    q, store = queries(items, 30), store_of(tmp_path, items)
    calls = []
    real = bounded.Search._score
    monkeypatch.setattr(
        bounded.Search,
        "_score",
        lambda self, numbers, seen: calls.append(len(numbers)) or real(self, numbers, seen=seen),
    )
    compare(q, store, 2, memory=160_000)
    assert len(calls) > 1


def test_memory_is_bounded(tmp_path):
    """30 MB of tokens and 16 MB of codes searched with 8 MB: the resident set grows by less than 16 MB."""
    with StoreWriter(tmp_path, codes="int8", shard_bytes=1 << 24) as writer:
        for _ in range(300):
            block = torch.randn(1, 128) + torch.randn(400, 128) / 4
            writer.add(block.half())
    code = f"""
import torch, latemax
def resident(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))
torch.set_num_threads(1)
store = latemax.PatchStore({str(tmp_path)!r})
q = store[150][:4]
latemax.topk(q, store, 1, within=list(range(100)), memory=8 << 20)
before = resident("VmRSS")
found = latemax.topk(q, store, 3, memory=8 << 20)
assert found.indices[0] == 150 and 0 < found.stats["rescored"] < 100, (found, found.stats)
print(resident("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 << 20
