"""`topk` and `two_stage` over a part of the corpus, and which patch each maximum is."""

import math
import pickle

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree

from latemax import MeanPool, PatchStore, StoreWriter, TopK, first_stage_recall, maxsim, reference, topk, two_stage
from latemax.store import Packed

DIM = 16
CHOSEN = [3, 4, 5, 9, 17, 20, 31]


def documents(n=40):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(int(x), DIM, generator=generator) for x in torch.randint(0, 12, (n,), generator=generator)]


def queries():
    return torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["list", "pair", "store", "jagged", "dense", "masked"])
def corpus(request, tmp_path):
    """(corpus, the documents as a list, options)."""
    items = documents()
    if request.param == "store":
        with StoreWriter(tmp_path, shard_bytes=2000) as writer:
            for i, item in enumerate(items):
                writer.add(item, f"page-{i}")
        return PatchStore(tmp_path), items, {}
    if request.param in ("dense", "masked"):
        d = torch.randn(40, 6, DIM, generator=torch.Generator().manual_seed(2))
        if request.param == "dense":
            return d, list(d), {}
        keep = torch.rand(40, 6, generator=torch.Generator().manual_seed(3)) < 0.6
        return d, d, {"d_mask": keep}
    made = {"list": items, "pair": Packed.of(items), "jagged": torch.nested.nested_tensor(items, layout=torch.jagged)}
    return made[request.param], items, {}


def expected(q, items, options, k, chosen):
    scores, argmax = reference.maxsim(q, items, None, options.get("d_mask"), return_argmax=True)
    order = scores[:, chosen].sort(dim=1, descending=True, stable=True).indices[:, :k]
    indices = torch.tensor(chosen)[order]
    return scores.gather(1, indices), indices, argmax.gather(1, indices.unsqueeze(-1).expand(-1, -1, q.shape[1]))


@pytest.mark.parametrize("memory", [12_000, 1 << 30], ids=["chunks", "whole"])
@pytest.mark.parametrize("form", ["all", "tensor", "array", "mask", "mask array"])
def test_topk_within_and_its_argmax(corpus, form, memory):
    corpus, items, options = corpus
    q, chosen = queries(), list(range(40)) if form == "all" else CHOSEN
    mask = torch.zeros(40, dtype=torch.bool)
    mask[chosen] = True
    within = {
        "all": None,
        "tensor": torch.tensor([*reversed(chosen), chosen[0]]),
        "array": np.array(chosen),
        "mask": mask,
        "mask array": mask.numpy(),
    }[form]
    found = topk(q, corpus, 6, within=within, return_argmax=True, memory=memory, **options)
    scores, indices, argmax = expected(q, items, options, 6, chosen)
    torch.testing.assert_close(found.scores, scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.indices, indices) and found.indices.dtype == torch.int64
    assert torch.equal(found.argmax, argmax) and found.argmax.dtype == torch.int32
    plain = topk(q, corpus, 6, within=within, memory=memory, **options)
    assert plain.argmax is None and plain.stats is None and torch.equal(plain.scores, found.scores)
    one = topk(q[1], corpus, 6, within=within, return_argmax=True, memory=memory, **options)
    assert torch.equal(one.indices, indices[1]) and torch.equal(one.argmax, argmax[1])


def test_two_stage_within_and_its_argmax(corpus):
    corpus, _, options = corpus
    if options:
        pytest.skip("two_stage takes no mask of documents")
    q = queries()
    q_mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    pool = MeanPool(corpus, engine="torch")
    for first in (pool, lambda q, q_mask, n: torch.arange(n).expand(len(q), -1)):
        found = two_stage(q, corpus, 5, first, q_mask, within=torch.tensor(CHOSEN), return_argmax=True)
        whole = topk(q, corpus, 5, q_mask, within=torch.tensor(CHOSEN), return_argmax=True)
        assert torch.equal(found.indices, whole.indices) and torch.equal(found.argmax, whole.argmax)
        torch.testing.assert_close(found.scores, whole.scores, rtol=1e-6, atol=1e-6)
        one = two_stage(q[0], corpus, 5, first, q_mask[0], within=torch.tensor(CHOSEN), return_argmax=True)
        assert torch.equal(one.argmax, whole.argmax[0])
        assert two_stage(q, corpus, 5, first, q_mask).argmax is None
    assert (whole.argmax[:2][q_mask[:2].bool().logical_not().unsqueeze(1).expand(-1, 5, -1)] == -1).all()
    few = two_stage(q, corpus, 4, lambda q, q_mask, n: torch.tensor([[5, 0, 3]] * 3), within=torch.tensor(CHOSEN),
                    return_argmax=True)  # fmt: skip
    assert sorted(few.indices[0].tolist()) == [-1, -1, 3, 5] and (few.argmax[few.indices < 0] == -1).all()
    recall = first_stage_recall(q, corpus, 3, pool, within=torch.tensor(CHOSEN), n_candidates=40)
    assert recall.mean == 1.0


def test_mean_pool_chooses_within(corpus):
    corpus, items, options = corpus
    if options:
        pytest.skip("pooling takes no mask of documents")
    pool = MeanPool(corpus, engine="torch")
    q = queries()
    found = pool.first(q, None, 10, within=torch.tensor(CHOSEN))
    every = pool(q, None, 40)
    for row, all_of_it in zip(found.tolist(), every.tolist(), strict=True):
        # documents without a token tie
        assert sorted(row) == [-1] * 3 + CHOSEN and row[7:] == [-1] * 3
        assert [i for i in row[:7] if len(items[i])] == [i for i in all_of_it if i in CHOSEN and len(items[i])]


def test_ragged_queries_have_argmax(corpus):
    corpus, _, options = corpus
    q = [queries()[0], queries()[1, :2], queries()[2, :4]]
    found = topk(q, corpus, 4, return_argmax=True, **options)
    assert found.argmax.shape == (3, 4, 5)
    for i, query in enumerate(q):
        alone = topk(query, corpus, 4, return_argmax=True, **options)
        assert torch.equal(found.argmax[i, :, : len(query)], alone.argmax)
        assert (found.argmax[i, :, len(query) :] == -1).all()


@pytest.mark.parametrize("ids", [["page-3", "page-9", "page-3"], ("page-9", "page-3")], ids=["list", "tuple"])
def test_ids(ids, tmp_path):
    with StoreWriter(tmp_path) as writer:
        for i, item in enumerate(documents()):
            writer.add(item, f"page-{i}")
    store = PatchStore(tmp_path)
    assert sorted(topk(queries()[0], store, 2, within=ids).indices.tolist()) == [3, 9]
    with pytest.raises(ValueError, match="within names id 'page-99', which"):
        topk(queries(), store, 1, within=["page-1", "page-99"])
    with pytest.raises(ValueError, match="k must be at most the number of documents in within, 2; got 3"):
        topk(queries(), store, 3, within=ids)
    with pytest.raises(TypeError, match="id must be an int or a string, got float"):
        topk(queries(), store, 1, within=[1.0])


def test_a_list_of_ints_is_ids(tmp_path):
    with StoreWriter(tmp_path) as writer:
        for i, item in enumerate(documents()):
            writer.add(item, 100 + i)
    store = PatchStore(tmp_path)
    assert sorted(topk(queries()[0], store, 2, within=[103, np.int64(105)]).indices.tolist()) == [3, 5]
    with pytest.raises(ValueError, match="within names id 3, which"):
        topk(queries(), store, 1, within=[3])


def test_only_what_is_named_is_read(tmp_path, monkeypatch):
    from latemax.store.shards import Shard

    items, read = documents(), []
    with StoreWriter(tmp_path, shard_bytes=2000) as writer:
        for i, item in enumerate(items):
            writer.add(item, i)
    real = Shard.read
    monkeypatch.setattr(Shard, "read", lambda self, *at: read.append(len(at[-1])) or real(self, *at))
    topk(queries(), PatchStore(tmp_path), 2, within=CHOSEN)
    assert sum(read) == sum(len(items[i]) for i in CHOSEN)


@pytest.mark.parametrize(
    ("within", "error", "words"),
    [
        (["a"], ValueError, "this corpus has none"),
        ([], ValueError, "this corpus has none"),
        (torch.tensor([0, 40]), ValueError, "indices from 0 to 39, got 40"),
        (torch.tensor([-1]), ValueError, "indices from 0 to 39, got -1"),
        (torch.tensor([[1]]), ValueError, r"indices \[n\], got shape \[1, 1\]"),
        (torch.ones(39, dtype=torch.bool), ValueError, r"a mask \[n_d\] of 40 documents, got shape \[39\]"),
        (torch.tensor([1.0]), TypeError, r"int64 indices, a bool mask, or a list or tuple of ids; got torch\.float32"),
        (np.array([1], dtype=np.uint8), TypeError, "got uint8"),
        ("page-1", TypeError, "got str"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "documents in within, 0; got 1"),
    ],
)
def test_what_is_no_part_is_refused(within, error, words):
    for search in (lambda: topk(queries(), documents(), 1, within=within),
                   lambda: two_stage(queries(), documents(), 1, MeanPool(documents()), within=within)):  # fmt: skip
        with pytest.raises(error, match=words):
            search()


def test_a_document_too_large_is_named_by_the_corpus(tmp_path):
    items = documents()
    items[17] = torch.zeros(2000, DIM)
    with pytest.raises(ValueError, match="document 17 has 2000 tokens"):
        topk(queries(), items, 1, within=torch.tensor(CHOSEN), memory=20_000)


def test_topk_is_a_named_tuple():
    found = topk(queries(), documents(), 2, return_argmax=True)
    scores, indices = found
    assert (
        len(found) == 2 and found[0] is scores and found.indices is indices and found._fields == ("scores", "indices")
    )
    assert found.argmax is not None and found.stats is None and TopK(scores, indices).argmax is None
    assert torch.equal(pickle.loads(pickle.dumps(found)).argmax, found.argmax)
    changed = found._replace(scores=scores + 1)
    assert isinstance(changed, TopK) and changed.argmax is found.argmax and torch.equal(changed.scores, scores + 1)
    assert len(pytree.tree_leaves(found)) == 2
    assert isinstance(pytree.tree_map(lambda x: x, found), TopK)
    row = found.row(1)
    assert torch.equal(row.scores, scores[1]) and torch.equal(row.argmax, found.argmax[1])


def test_argmax_of_what_is_not_finite():
    items = documents()
    items[5], items[6] = items[5][:0], torch.full((2, DIM), math.nan)
    found = topk(queries(), items, 40, return_argmax=True)
    assert (found.argmax[found.indices == 5] == -1).all() and found.scores[:, -1].isnan().all()
    scores, argmax = maxsim(queries(), items, return_argmax=True)
    at = found.indices.unsqueeze(-1).expand(-1, -1, 5)
    assert torch.equal(found.argmax[:, :39], argmax.gather(1, at)[:, :39]) and scores.shape == (3, 40)


def test_the_map_of_what_was_found(tmp_path):
    from latemax.analysis import grounding_map

    with StoreWriter(tmp_path) as writer:
        for i, item in enumerate(documents()):
            writer.add(item, i, grid=(len(item), 1) if 0 < len(item) != 7 else None)
    store, q = PatchStore(tmp_path), queries()
    ids = [i for i in range(40) if store.grid(i)]
    found = topk(q, store, 3, within=torch.tensor(ids), return_argmax=True)
    for row in range(3):
        maps = grounding_map(q[row], found.row(row), store)
        assert [x.grid for x in maps] == [store.grid(i) for i in found.indices[row].tolist()]
        torch.testing.assert_close(torch.stack([x.score for x in maps]), found.scores[row])
        torch.testing.assert_close(torch.stack([x.map.sum() for x in maps]), found.scores[row])
        assert torch.equal(torch.stack([x.argmax for x in maps]), found.argmax[row])
    with pytest.raises(ValueError, match="must be the ranking of one query"):
        grounding_map(q[0], found, store)
    with pytest.raises(TypeError, match="must be the PatchStore that d was found in, got tuple"):
        grounding_map(q[0], found.row(0), (1, 1))
    bare = [i for i in range(40) if len(documents()[i]) == 7]
    with pytest.raises(ValueError, match=f"document {bare[0]} must be stored with a grid"):
        grounding_map(q[0], topk(q[0], store, 1, within=torch.tensor(bare[:1])), store)
