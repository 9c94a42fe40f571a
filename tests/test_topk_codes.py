"""`topk` of a store with codes is that of the tokens, bit for bit, and reads less of them."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latemax import PatchStore, StoreWriter, maxsim, quantize, topk
from latemax.search import bounded
from latemax.search import corpus as corpora
from latemax.search.margin import margin_of
from latemax.search.tokens import concatenated
from latemax.store import Packed

DIM = 16
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def clustered(n=500, seed=0, spread=0.3, tokens=12):
    """Documents around directions of their own, as images are: bounds tell most of them apart."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens, (n,), generator=generator).tolist()
    found = []
    for length in lengths:
        direction = torch.randn(DIM, generator=generator)
        found.append(direction + spread * torch.randn(length, DIM, generator=generator))
    return found


def queries(items, n_q=3, l_q=5, seed=9):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, len(items), (n_q,), generator=generator).tolist()
    return torch.stack([items[i].float()[0] + 0.3 * torch.randn(l_q, DIM, generator=generator) for i in chosen])


def store_of(folder, items, dtype=torch.float32, **options):
    with StoreWriter(folder, dtype=dtype, **{"codes": "int8", "shard_bytes": 20_000} | options) as writer:
        for item in items:
            writer.add(item.to(dtype))
    return PatchStore(folder)


def assert_same(found, expected):
    assert torch.equal(found.indices, expected.indices)
    assert found.scores.dtype == expected.scores.dtype
    bits = torch.int64 if found.scores.dtype == torch.float64 else torch.int32
    assert torch.equal(found.scores.view(bits), expected.scores.view(bits))
    assert (found.argmax is None) == (expected.argmax is None)
    assert found.argmax is None or torch.equal(found.argmax, expected.argmax)


def compare(q, store, k=5, **options):
    """(with codes, without), which must be the same."""
    found, expected = topk(q, store, k, **options), topk(q, store, k, codes="off", **options)
    assert expected.stats is None and found.stats is not None
    assert_same(found, expected)
    return found, expected


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def stored(request, tmp_path_factory):
    items = clustered()
    return items, store_of(tmp_path_factory.mktemp("store"), items, request.param)


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "cosine"])
def test_the_answer_is_that_of_the_tokens(stored, normalize):
    items, store = stored
    q = queries(items).to(store.dtype)
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    weights = torch.tensor([[1.0, 2.0, -0.5, 0.0, 1.0]]).expand(3, -1)
    lists = [q[0], q[1, :2], q[2, :4]]
    options = dict(normalize=normalize)
    for k in (1, 5, 20):
        found, _ = compare(q, store, k, **options)
        assert found.stats["documents"] == 500
    assert found.stats["rescored"] < 250
    compare(q[0], store, return_argmax=True, **options)
    compare(q, store, q_mask=mask, return_argmax=True, **options)
    compare(q, store, q_weights=weights, **options)
    compare(q, store, q_mask=mask, reduce="mean", **options)
    compare(lists, store, return_argmax=True, **options)
    compare(lists, store, q_mask=[None, torch.tensor([True, False]), None], **options)
    compare(torch.nested.nested_tensor(lists, layout=torch.jagged), store, **options)
    compare(q, store, within=torch.arange(3, 500, 2), return_argmax=True, **options)
    compare(q, store, memory=60_000, **options)
    compare(q, store, within=torch.arange(3, 500, 2), memory=60_000, **options)


def test_most_documents_are_not_read(stored):
    items, store = stored
    found, _ = compare(queries(items, 1).to(store.dtype), store, 3)
    assert found.stats["rescored"] < 60
    tokens, size = store.n_tokens, DIM * store.dtype.itemsize
    assert tokens * (DIM + 8) <= found.stats["bytes"] < tokens * (DIM + 8) + 0.3 * tokens * size


def test_float64_queries(stored):
    items, store = stored
    q = queries(items).double()
    found, expected = topk(q, store, 5), topk(q, store, 5, codes="off")
    assert found.stats is not None and found.scores.dtype == torch.float64
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_matmul(precision, stored):
    items, store = stored
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        compare(queries(items), store)
    finally:
        torch.set_float32_matmul_precision(before)


def test_ties_nan_infinity_and_empty_documents(tmp_path):
    items = clustered(400)
    q = queries(items, 2)
    best = topk(q, items, 1).indices[:, 0].tolist()
    for i in range(7, 400, 11):
        items[i] = items[best[0]].clone()  # ties at the top, many more than k
    for i in range(3, 400, 50):
        items[i] = items[i][:0]
    items[20][0, 3], items[350][-1, 0], items[351][0, 0] = math.nan, -math.inf, math.inf
    store = store_of(tmp_path, items)
    for options in ({}, dict(empty_score=0.0), dict(empty_score=math.inf), dict(empty_score=-1e30)):
        for k in (1, 5, 30, 60):
            compare(q, store, k, **options)
            compare(q, store, k, normalize=True, **options)
    assert compare(q, store, 5)[1].indices[0].tolist() == compare(q, store, 5)[0].indices[0].tolist()
    # the query that is not finite is scored without codes
    bad = q.clone()
    bad[1, 2, 3] = math.nan
    assert topk(bad, store, 5).stats is None
    assert_same(topk(bad, store, 5), topk(bad, store, 5, codes="off"))


def test_a_document_with_nan_never_raises_the_floor(tmp_path):
    """Its finite tokens have lower bounds, but it ranks last: what is better than it must not be left out."""
    items = clustered(300)
    q = queries(items, 1, 3)
    for i in range(0, 40):
        items[i] = torch.cat([q[0] * 2, torch.full((1, DIM), math.nan)])
    store = store_of(tmp_path, items)
    found, _ = compare(q, store, 5)
    assert (found.indices >= 40).all() and found.scores.isfinite().all()
    # a token of the query that is 0 hides the error of a token in a product
    zero = torch.zeros(1, 1, DIM)
    compare(zero, store, 5)


def test_queries_without_a_valid_token_and_zeros(tmp_path):
    items = clustered(300)
    q = queries(items)
    store = store_of(tmp_path, items)
    mask = torch.ones(3, 5)
    mask[1] = 0
    found, _ = compare(q, store, 5, q_mask=mask)
    assert found.indices[1].tolist() == [0, 1, 2, 3, 4]
    compare(torch.zeros_like(q), store, 5)


def test_scores_closer_than_the_kernel_rounds(tmp_path):
    """Equal real scores of permuted tokens, which the kernel rounds apart; and scores beyond the range of float32."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(6, DIM, generator=generator)
    items = [base[torch.randperm(6, generator=generator)] * (1 + 1e-7 * (i % 5)) for i in range(300)]
    q = torch.randn(2, 4, DIM, generator=generator)
    compare(q, store_of(tmp_path / "near", items), 7)
    huge = [x * 10.0 ** float(e) for x, e in zip(clustered(300), torch.randint(-38, 38, (300,)), strict=True)]
    huge = [x.clamp(-3e38, 3e38) for x in huge]
    store = store_of(tmp_path / "huge", huge)
    for size in (1e-30, 1.0, 1e10, 1e37):
        found, expected = topk(q * size, store, 7), topk(q * size, store, 7, codes="off")
        assert_same(found, expected)
        assert_same(topk(q * size, store, 7, normalize=True), topk(q * size, store, 7, normalize=True, codes="off"))


def test_a_sum_that_overflows_on_the_way(tmp_path):
    """Its real score is 0 and its computed one infinity, which leads the list."""
    items = [torch.full((1, DIM), 1e36 * (2 if i % 40 == 0 else 1 - i / 1000)) for i in range(600)]
    items[550] = torch.tensor([8e37] * (DIM // 2) + [-8e37] * (DIM // 2)).unsqueeze(0)
    found, _ = compare(torch.ones(1, 2, DIM), store_of(tmp_path, items), 3)
    assert found.indices[0].tolist() == [550, 0, 40] and found.scores[0, 0] == math.inf


@pytest.mark.parametrize("seed", range(3))
def test_random_corpora(seed, tmp_path):
    """Loose and tight stretches, any k, within, weights of any sign."""
    generator = torch.Generator().manual_seed(seed)
    items = clustered(250, seed) + [x * 2 for x in clustered(250, seed + 50, 3.0)]
    items += clustered(200, seed + 99, 0.05)
    dtype = DTYPES[seed % 3]
    store = store_of(tmp_path, items, dtype)
    for n_q, k in ((1, 1), (2, 9), (7, 40), (1, 170)):
        q = queries(items, n_q, 1 + seed, seed)
        within = torch.randperm(700, generator=generator)[:600] if seed % 2 else None
        weights = torch.randn(n_q, 1 + seed, generator=generator)
        compare(q, store, k, within=within, q_weights=weights, memory=80_000 + n_q * k * 100)


def test_loose_bounds_leave_codes_for_the_plain_scan(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    # one direction: every document scores about the same
    items = [torch.ones(4, DIM) + 1e-4 * torch.randn(4, DIM, generator=generator) for _ in range(1000)]
    q, store = torch.ones(1, 2, DIM), store_of(tmp_path, items)
    seen = []
    real = bounded.Search._block
    monkeypatch.setattr(bounded.Search, "_block", lambda self, a, b, x: seen.append((a, b)) or real(self, a, b, x))
    found, _ = compare(q, store, 5)
    # samples of 20 documents after gaps of 100, 200, 400
    assert seen == [(0, 20), (120, 140), (340, 360), (760, 780)]
    assert found.stats["rescored"] >= 900 and sum(b - a for a, b in seen) <= 0.1 * 1000


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


def test_documents_without_a_token_and_other_backends(tmp_path):
    store = store_of(tmp_path / "empty", [torch.empty(0, DIM)] * 50)
    compare(torch.ones(2, 3, DIM), store, 4)
    items = clustered(300)
    store = store_of(tmp_path / "some", items)
    q = queries(items)
    found, expected = (topk(q, store, 5, backend="reference", codes=codes) for codes in ("auto", "off"))
    assert found.stats is not None and torch.equal(found.indices, expected.indices)
    assert topk(q[:0], store, 5).indices.shape == (0, 5)


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


def test_the_margin_covers_what_kernels_round():
    """Against float64, on every dtype and with cancellation: the margin is not exceeded, and is no more than needed."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for normalize in (False, True):
            for dim in (3, 64, 1030):
                q = torch.randn(3, 5, dim, generator=generator).to(dtype)
                d = torch.randn(40, 6, dim, generator=generator).to(dtype)
                d[:20, :, ::2] = -d[:20, :, : (dim + 1) // 2].repeat_interleave(1, -1)[..., : d[:20, :, ::2].shape[-1]]
                margin = margin_of(q, None, None, d_dtype=dtype, normalize=normalize, reduce="sum")
                apart = maxsim(q, d, normalize=normalize).double() - maxsim(q.double(), d.double(), normalize=normalize)
                norms = d.double().norm(dim=-1).amax(-1)
                assert margin.usable and (apart.abs() <= margin.of(norms)).all()
                assert (margin.of(norms) < 1e-2 * 5 * (norms.new_ones(()) if normalize else norms * 100)).all()


@pytest.mark.parametrize("form", ["list", "pair", "dense"])
def test_a_corpus_in_memory_brings_its_codes(form):
    items = clustered(400)
    if form == "dense":
        items = [x[:1].repeat(3, 1) for x in items]
    flat, offsets = Packed.of(items)
    corpus = {"list": items, "pair": (flat, offsets), "dense": torch.stack(items) if form == "dense" else None}[form]
    codes = {
        "list": [quantize(x) for x in items],
        "pair": (quantize(flat), offsets),
        "dense": quantize(torch.stack(items)) if form == "dense" else None,
    }[form]
    q = queries(items)
    for options in ({}, dict(within=torch.arange(0, 400, 2)), dict(normalize=True, return_argmax=True)):
        found, expected = topk(q, corpus, 5, codes=codes, **options), topk(q, corpus, 5, **options)
        assert found.stats["rescored"] < 200 and expected.stats is None
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("codes", "error", "words"),
    [
        ("on", ValueError, "codes must be 'auto', 'off' or QuantizedTokens, got 'on'"),
        (5, TypeError, "QuantizedTokens of kind 'int8', got int"),
        (quantize(torch.zeros(1, 2, DIM), "binary"), TypeError, "of kind 'int8', got binary"),
        (quantize(torch.zeros(1, 2, 3)), ValueError, "the dim and the lengths of corpus; got dim 3 and 16"),
        (quantize(torch.zeros(1, 3, DIM)), ValueError, "1 documents of 3 tokens and 1 of 2"),
    ],
)
def test_codes_are_checked(codes, error, words):
    with pytest.raises(error, match=words):
        topk(torch.zeros(1, DIM), [torch.zeros(2, DIM)], 1, codes=codes)


def test_arguments_are_checked_before_codes_are_read(stored):
    items, store = stored
    q = queries(items).to(store.dtype)
    for options in (dict(q_mask=torch.ones(3, 4)), dict(q_weights=torch.ones(2, 5)), dict(q_mask=[None])):
        with pytest.raises((ValueError, TypeError)) as expected:
            topk(q, store, 5, codes="off", **options)
        with pytest.raises(expected.type) as found:
            topk(q, store, 5, **options)
        assert str(found.value) == str(expected.value)


def test_codes_of_a_masked_corpus_are_refused():
    d = torch.ones(2, 3, DIM)
    with pytest.raises(ValueError, match="or a d_mask"):
        topk(torch.zeros(1, DIM), d, 1, d_mask=torch.ones(2, 3), codes=quantize(d))


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_a_corpus_of_codes(kind, tmp_path):
    items = clustered(60)
    q, codes = queries(items), [quantize(x, kind) for x in items]
    flat, offsets = Packed.of(items)
    forms = {
        "list": codes,
        "pair": (quantize(flat, kind), offsets),
        "dense": quantize(torch.stack([x[:1] for x in items]), kind),
    }
    if kind == "int8":
        with StoreWriter(tmp_path, dtype="int8", shard_bytes=500) as writer:
            for item in codes:
                writer.add(item)
        forms["store"] = PatchStore(tmp_path)
    for name, form in forms.items():
        scores = maxsim(q, form if name == "dense" else codes)
        expected = scores.topk(7)
        for memory in (20_000, 1 << 30):
            found = topk(q, form, 7, memory=memory, return_argmax=True)
            assert torch.equal(found.indices, expected.indices), name
            torch.testing.assert_close(found.scores, expected.values, rtol=1e-5, atol=1e-5)
    assert isinstance(corpora.of(codes).view(0, 2), type(codes[0]))


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_queries_of_codes_and_masked_documents_of_codes(kind):
    generator = torch.Generator().manual_seed(0)
    q, mask = quantize(torch.randn(3, 5, DIM, generator=generator), kind), torch.rand(40, 6, generator=generator) < 0.7
    d = quantize(torch.randn(40, 6, DIM, generator=generator), kind, mask=mask)
    expected = maxsim(q, d, None, mask).topk(4)
    found = topk(q, d, 4, d_mask=mask, return_argmax=True, memory=20_000)
    assert torch.equal(found.scores, expected.values) and torch.equal(found.indices, expected.indices)
    argmax = maxsim(q, d, None, mask, return_argmax=True)[1]
    assert torch.equal(found.argmax, argmax.gather(1, found.indices.unsqueeze(-1).expand(-1, -1, 5)))
    for other in (topk([q[i] for i in range(3)], d, 4, d_mask=mask), topk(q, d, 4, d_mask=mask.numpy())):
        assert_same(other, found._replace(argmax=None))
    one = topk(q[1], [d[i][mask[i]] for i in range(40)], 4, return_argmax=True)
    assert torch.equal(one.scores, found.scores[1]) and torch.equal(one.indices, found.indices[1])
    with pytest.raises(TypeError, match="q may be QuantizedTokens only where d is, and of its kind"):
        topk(q, d.dequantize(), 4, codes=quantize(d.dequantize()))
    with pytest.raises(ValueError, match=r"q must be \[l_q, dim\] or \[n_q, l_q, dim\]"):
        topk(q[None], d, 4)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_buffers_hold_codes(kind):
    """Those through which a corpus in memory goes to a GPU."""
    items = [quantize(torch.randn(length, DIM), kind) for length in (3, 0, 5)]
    tokens = concatenated(items)
    for corpus in (items, (tokens, torch.tensor([0, 3, 3, 8])), tokens[None].to("cpu")):
        found = corpora.of(corpus)
        buffer = found.empty(9)[: int(found.offsets[-1])]
        found.read(0, len(found), buffer)
        assert torch.equal(buffer.dequantize(), tokens.dequantize())


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
