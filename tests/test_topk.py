"""`topk` equals brute force on every kind of corpus, in one order: score falling, index rising, NaN last."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latemax import PatchStore, StoreWriter, TopK, maxsim, topk
from latemax.search import corpus as corpora
from latemax.search import stream
from latemax.search.merge import best, merge
from latemax.store import Packed

DIM = 16
SMALL = 20_000


def documents(n=50, seed=0, dtype=torch.float32, uniform=None):
    generator = torch.Generator().manual_seed(seed)
    lengths = [uniform if uniform else int(x) for x in torch.randint(0, 30, (n,), generator=generator)]
    return [torch.randn(length, DIM, generator=generator).to(dtype) for length in lengths]


def queries(n_q=3, l_q=5, dtype=torch.float32):
    return torch.randn(n_q, l_q, DIM, generator=torch.Generator().manual_seed(9)).to(dtype)


def brute(scores, k):
    """By Python's sort, on the order as documented: NaN last, then score falling, then index rising."""
    rows = []
    for row in scores.tolist():
        order = sorted(range(len(row)), key=lambda i, row=row: (math.isnan(row[i]), -row[i], i))
        order = [i for i in order if not math.isnan(row[i])] + [i for i in order if math.isnan(row[i])]
        rows.append(order[:k])
    indices = torch.tensor(rows, dtype=torch.int64).view(len(rows), k)
    return TopK(scores.gather(1, indices), indices)


def assert_same(found, expected):
    torch.testing.assert_close(found.scores, expected.scores, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.indices, expected.indices) and found.indices.dtype == torch.int64


def kinds(items, folder):
    with StoreWriter(folder, shard_bytes=5000) as writer:
        for item in items:
            writer.add(item)
    packed = Packed.of(items)
    return {
        "list": items,
        "tuple of many": tuple(items),
        "pair": (packed.tokens, packed.offsets.int()),
        "packed": packed,
        "jagged": torch.nested.nested_tensor(items, layout=torch.jagged),
        "store": PatchStore(folder),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", [SMALL, 1 << 30], ids=["chunks", "whole"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "cosine"])
def test_every_corpus_equals_brute_force(dtype, memory, normalize, tmp_path):
    items, q = documents(dtype=dtype), queries(dtype=dtype)
    expected = brute(maxsim(q, items, normalize=normalize), 12)
    for kind, corpus in kinds(items, tmp_path).items():
        found = topk(q, corpus, 12, memory=memory, normalize=normalize)
        assert found.scores.dtype == torch.float32, kind
        assert_same(found, expected)
        one = topk(q[1], corpus, 12, memory=memory, normalize=normalize)
        assert one.scores.shape == one.indices.shape == (12,)
        assert_same(one, TopK(expected.scores[1], expected.indices[1]))


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("layout", ["dense", "transposed", "expanded"])
def test_dense_corpora(masked, layout):
    d = torch.randn(40, 7, DIM, generator=torch.Generator().manual_seed(3))
    if layout == "transposed":
        d = d.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        d = d[:1].expand(40, -1, -1)
    keep = torch.rand(40, 7, generator=torch.Generator().manual_seed(4)) < 0.5 if masked else None
    q, q_mask = queries(), torch.tensor([[1, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    expected = brute(maxsim(q, d, q_mask, keep), 15)
    assert_same(topk(q, d, 15, q_mask, d_mask=keep, memory=SMALL), expected)


def test_ragged_queries():
    items = documents()
    q = [queries()[0], queries()[1, :2], queries()[2, :4]]
    q_mask = [torch.tensor([True, False, True, True, True]), None, torch.ones(4)]
    assert_same(topk(q, items, 9, q_mask, memory=SMALL), brute(maxsim(q, items, q_mask), 9))
    jagged = torch.nested.nested_tensor(q, layout=torch.jagged)
    assert_same(topk(jagged, items, 9), brute(maxsim(q, items), 9))


def test_ties_go_to_the_lowest_index_across_chunks():
    items = documents(uniform=6)
    for i in range(2, 50, 3):
        items[i] = items[2]
    q = queries()
    for memory in (SMALL, 1 << 30):
        found = topk(q, items, 50, memory=memory)
        assert_same(found, brute(maxsim(q, items), 50))
        of_two = [row[torch.isin(row, torch.arange(2, 50, 3))] for row in found.indices]
        assert all(torch.equal(row, torch.arange(2, 50, 3)) for row in of_two)


def test_nan_ranks_last_and_minus_infinity_before_it():
    items = documents(uniform=4)
    items[5], items[0][1, 2], items[49][0, 0] = items[5][:0], math.nan, math.nan
    found = topk(queries(), items, 50, memory=SMALL)
    assert_same(found, brute(maxsim(queries(), items), 50))
    assert (found.indices[:, -3:] == torch.tensor([5, 0, 49])).all()
    assert (found.scores[:, -3] == -math.inf).all() and found.scores[:, -2:].isnan().all()


def test_zeros_of_both_signs_are_one_score():
    kept = best(torch.tensor([[-0.0, 0.0, -0.0, 1.0]]), torch.arange(4)[None], 4)
    assert kept.indices.tolist() == [[3, 0, 1, 2]]


def test_empty_score_decides_where_empty_documents_rank():
    items = [torch.full((2, DIM), -1.0), torch.empty(0, DIM), torch.full((2, DIM), 1.0)]
    q = torch.ones(1, 1, DIM)
    assert topk(q, items, 3).indices.tolist() == [[2, 0, 1]]
    assert topk(q, items, 3, empty_score=0.0).indices.tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_merging_equals_sorting_everything(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 3, (4, 60), generator=generator).float()
    scores[torch.rand(4, 60, generator=generator) < 0.1] = math.nan
    scores[torch.rand(4, 60, generator=generator) < 0.1] = -math.inf
    k = int(torch.randint(1, 61, (), generator=generator))
    kept = TopK(scores[:, :0], torch.empty(4, 0, dtype=torch.int64))
    start = 0
    while start < 60:
        step = int(torch.randint(1, 25, (), generator=generator))
        kept = merge(kept, scores[:, start : start + step], torch.arange(start, min(60, start + step)), k)
        start += step
    expected = brute(scores, k)
    assert torch.equal(kept.indices, expected.indices)
    torch.testing.assert_close(kept.scores, expected.scores, equal_nan=True, rtol=0, atol=0)


def test_float64_stays_float64():
    items = [x.double() for x in documents()]
    found = topk(queries().double(), items, 5)
    assert found.scores.dtype == torch.float64
    assert_same(found, brute(maxsim(queries().double(), items), 5))


def test_no_gradient_is_recorded():
    q = queries().requires_grad_()
    assert not topk(q, documents(), 3).scores.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(k=51), ValueError, "k must be at most the number of documents, 50; got 51"),
        (dict(k=0), ValueError, "k must be an int >= 1, got 0"),
        (dict(k=2.0), ValueError, r"k must be an int >= 1, got 2\.0"),
        (dict(memory=True), ValueError, "memory must be an int >= 1, got True"),
        (dict(memory=2000), ValueError, r"memory must hold the 5 best of 3 queries, 1440 bytes|the largest document"),
        (dict(memory=100), ValueError, "memory must hold the 5 best of 3 queries, 1440 bytes; got 100"),
        (dict(corpus=[]), ValueError, "corpus must hold at least one document"),
        (dict(corpus=5), TypeError, r"corpus must be a tensor \[n_d, l_d, dim\], a list .* got int"),
        (dict(corpus=torch.zeros(4, DIM)), ValueError, r"corpus must be \[n_d, l_d, dim\], a list"),
        (
            dict(corpus=[torch.zeros(2, DIM), torch.zeros(2, 3)]),
            ValueError,
            r"one dim; corpus\[0\] has 16, corpus",
        ),
        (dict(corpus=torch.zeros(9, 4, 3)), ValueError, "q and corpus must have the same dim; got 16 and 3"),
        (dict(corpus=(torch.zeros(4, DIM), torch.tensor([0, 5]))), ValueError, "offsets must run from 0 to 4"),
        (dict(d_mask=torch.ones(50, 3)), ValueError, "d_mask goes with a dense corpus"),
        (dict(q=[]), ValueError, "q must hold at least one query"),
        (dict(q=torch.zeros(DIM)), ValueError, r"q must be \[l_q, dim\] or \[n_q, l_q, dim\]"),
        (dict(backend="gpu"), ValueError, "backend must be one of"),
        (dict(normalize=1), TypeError, "normalize must be a Python bool"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = dict(q=queries(), corpus=documents(), k=5) | change
    with pytest.raises(error, match=words):
        topk(**arguments)


def test_a_document_too_large_for_the_memory_is_named():
    items = documents(uniform=2)
    items[7] = torch.zeros(2000, DIM)
    with pytest.raises(ValueError, match="memory must hold the largest document: document 7 has 2000 tokens and needs"):
        topk(queries(), items, 5, memory=SMALL)


def test_chunks_fill_the_memory_and_cover_every_document_once():
    corpus = corpora.of(documents())
    runs = corpora.runs(corpus, 5000, 64, 8)
    assert [a for a, _ in runs] == [0, *[b for _, b in runs[:-1]]] and runs[-1][1] == 50
    for a, b in runs:
        cost = 64 * int(corpus.offsets[b] - corpus.offsets[a]) + 8 * (b - a)
        more = 64 * int(corpus.offsets[min(b + 1, 50)] - corpus.offsets[a]) + 8 * (b + 1 - a)
        assert cost <= 5000 and (b == 50 or more > 5000)


def test_two_buffers_take_turns_while_reading_ahead(tmp_path):
    items = documents(uniform=4)
    corpus = corpora.of(kinds(items, tmp_path)["store"])
    runs, seen = [(i, i + 10) for i in range(0, 50, 10)], []
    for (a, b), tokens in stream.chunks(corpus, runs, torch.device("cpu")):
        assert torch.equal(tokens, torch.cat(items[a:b]))
        seen.append(tokens.data_ptr())
    assert len(set(seen)) == 2 and seen[0] == seen[2] == seen[4] and seen[1] == seen[3]


def test_a_read_that_fails_reaches_the_caller(tmp_path):
    store = kinds(documents(), tmp_path)["store"]
    for file in tmp_path.glob("*.safetensors"):
        with open(file, "r+b") as opened:
            opened.truncate(200)
    with pytest.raises(ValueError, match="was truncated while it was open"):
        topk(queries(), store, 5, memory=SMALL)


def test_progress_is_drawn_on_a_terminal_alone(capsys, monkeypatch):
    topk(queries(), documents(), 5, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    topk(queries(), documents(), 5, memory=SMALL, progress=True)
    drawn = capsys.readouterr().err
    assert drawn.endswith("50/50\n") and drawn.count("searching") > 1


def test_memory_is_bounded(tmp_path):
    """A store of 120 MB searched with 16 MB: the resident set grows by less than 32 MB, mapped pages included."""
    pytest.importorskip("safetensors", reason="stores are written with safetensors")
    with StoreWriter(tmp_path, shard_bytes=1 << 24) as writer:
        block = torch.randn(500, 128).half()
        for _ in range(940):
            writer.add(block)
    code = f"""
import torch, latemax
def resident(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))
torch.set_num_threads(1)
store, q = latemax.PatchStore({str(tmp_path)!r}), torch.randn(4, 128).half()
latemax.topk(q, (torch.zeros(500, 128).half(), torch.tensor([0, 500])), 1)
before = resident("VmRSS")
found = latemax.topk(q, store, 3, memory=16 << 20)
assert found.indices.tolist() == [0, 1, 2]
print(resident("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("memory", [SMALL, 1 << 30], ids=["chunks", "whole"])
def test_a_corpus_on_the_host_is_streamed_to_the_gpu(memory, tmp_path):
    items, q = documents(400), queries().cuda()
    whole = brute(maxsim(q, [x.cuda() for x in items]).cpu(), 12)
    for corpus in kinds(items, tmp_path).values():
        for _ in range(3):
            found = topk(q, corpus, 12, memory=memory)
            assert found.scores.is_cuda
            assert_same(TopK(found.scores.cpu(), found.indices.cpu()), whole)
