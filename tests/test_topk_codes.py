"""`topk` of a store with codes is that of the tokens, bit for bit, and reads less of them."""

import math

import pytest
import torch
from coded import DIM, DTYPES, assert_same, clustered, compare, queries, store_of

from latemax import maxsim, topk
from latemax.search import bounded
from latemax.search.margin import margin_of


@pytest.fixture(autouse=True)
def small_gaps(monkeypatch):
    """These corpora are smaller than the shortest gap."""
    monkeypatch.setattr(bounded, "GAP_WORK", 0)


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


def test_documents_without_a_token_and_other_backends(tmp_path):
    store = store_of(tmp_path / "empty", [torch.empty(0, DIM)] * 50)
    compare(torch.ones(2, 3, DIM), store, 4)
    items = clustered(300)
    store = store_of(tmp_path / "some", items)
    q = queries(items)
    found, expected = (topk(q, store, 5, backend="reference", codes=codes) for codes in ("auto", "off"))
    assert found.stats is not None and torch.equal(found.indices, expected.indices)
    assert topk(q[:0], store, 5).indices.shape == (0, 5)


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


def test_arguments_are_checked_before_codes_are_read(stored):
    items, store = stored
    q = queries(items).to(store.dtype)
    for options in (dict(q_mask=torch.ones(3, 4)), dict(q_weights=torch.ones(2, 5)), dict(q_mask=[None])):
        with pytest.raises((ValueError, TypeError)) as expected:
            topk(q, store, 5, codes="off", **options)
        with pytest.raises(expected.type) as found:
            topk(q, store, 5, **options)
        assert str(found.value) == str(expected.value)
