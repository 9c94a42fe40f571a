"""Two stages: candidates from anywhere, exact scores, and the first stage's recall."""

import math

import pytest
import torch
import torch.nn.functional as F

import latemax
from latemax import MeanPool, PatchStore, StoreWriter, first_stage_recall, topk, two_stage
from latemax.store import Packed

DIM = 16


@pytest.fixture
def items():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, DIM, generator=generator) for n in [4, 0, 9, 1, 7, 30, 3, 12, 5, 6, 2, 8]]


@pytest.fixture
def q():
    return torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["list", "pair", "store", "jagged", "dense"])
def corpus(request, items, tmp_path):
    if request.param == "store":
        with StoreWriter(tmp_path, shard_bytes=600) as writer:
            for item in items:
                writer.add(item)
        return PatchStore(tmp_path)
    if request.param == "dense":
        return torch.randn(12, 6, DIM, generator=torch.Generator().manual_seed(2))
    return {
        "list": items,
        "pair": Packed.of(items),
        "jagged": torch.nested.nested_tensor(items, layout=torch.jagged),
    }[request.param]


def assert_same(found, expected):
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_with_every_candidate_it_is_the_exact_topk(corpus, q, masked):
    q_mask = torch.tensor([[1, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]) if masked else None
    first = MeanPool(corpus, engine="torch", memory=8000)
    assert first.engine == "torch" and first.vectors.shape == (12, DIM)
    found = two_stage(q, corpus, 12, first, q_mask, n_candidates=100)
    assert_same(found, topk(q, corpus, 12, q_mask))
    one = two_stage(q[0], corpus, 4, first, None if q_mask is None else q_mask[0])
    assert_same(one, type(one)(found.scores[0, :4], found.indices[0, :4]))


def test_pooling_is_the_mean_direction(items, q):
    first = MeanPool(items, engine="torch")
    expected = torch.stack([F.normalize(x.sum(0), dim=-1) for x in items])
    torch.testing.assert_close(first.vectors, expected)
    assert (first.vectors[1] == 0).all()
    scores = F.normalize(q.mean(1), dim=-1) @ expected.T
    assert torch.equal(first(q, None, 4), scores.topk(4).indices)


def test_masked_query_tokens_do_not_pool(items, q):
    first, mask = MeanPool(items, engine="torch"), torch.tensor([[1, 1, 0, 1, 1]] * 3)
    poisoned = q.clone()
    poisoned[:, 2] = math.nan
    assert torch.equal(first(poisoned, mask, 5), first(q[:, [0, 1, 3, 4]], None, 5))


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_faiss_finds_what_torch_finds(items, q, factory):
    pytest.importorskip("faiss", reason="faiss is not installed")
    first, plain = MeanPool(items, factory=factory), MeanPool(items, engine="torch")
    assert first.engine == "faiss"
    assert torch.equal(first(q, None, 5), plain(q, None, 5))
    assert_same(two_stage(q, items, 3, first, n_candidates=5), two_stage(q, items, 3, plain, n_candidates=5))


def test_any_search_is_a_first_stage(items, q):
    named = torch.tensor([[7, 2, -1, 2], [5, -1, -1, -1], [0, 1, 3, 0]], dtype=torch.int32)
    found = two_stage(q, items, 3, lambda q, q_mask, n: named, n_candidates=4)
    scores = latemax.maxsim(q, items)
    assert found.indices[0, 2] == -1 and sorted(found.indices[0, :2].tolist()) == [2, 7]
    assert found.indices[1].tolist() == [5, -1, -1] and (found.scores[1, 1:] == -math.inf).all()
    assert found.indices[2, 2] == 1, "an empty document scores -inf, before an empty slot"
    for row in range(3):
        for score, index in zip(found.scores[row], found.indices[row], strict=True):
            if index >= 0:
                torch.testing.assert_close(score, scores[row, index])
    zero = two_stage(q, items, 3, lambda q, q_mask, n: named, n_candidates=4, empty_score=1e6)
    assert zero.indices[1].tolist() == [5, -1, -1] and zero.scores[1].tolist()[1:] == [1e6, 1e6]


def test_recall_by_hand(items, q):
    exact = topk(q, items, 4).indices
    found = first_stage_recall(q, items, 4, lambda q, q_mask, n: exact[:, :3].contiguous(), n_candidates=3)
    assert found.per_query.tolist() == [0.75] * 3 and found.mean == 0.75
    other = torch.full((3, 3), -1)
    assert first_stage_recall(q, items, 4, lambda q, q_mask, n: other).mean == 0
    assert first_stage_recall(q, items, 4, MeanPool(items, engine="torch")).mean == 1


@pytest.mark.parametrize(
    ("came", "error", "words"),
    [
        (torch.zeros(3, 2), TypeError, "int32 or int64 tensor of candidates, got torch.float32"),
        ([[1]], TypeError, "got list"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"\[n_q, n\] with n_q 3, got shape \[2, 2\]"),
        (torch.tensor([[1], [2], [12]]), ValueError, r"must lie in -1\.\.11, got 1 to 12"),
        (torch.tensor([[1], [2], [-2]]), ValueError, r"must lie in -1\.\.11, got -2 to 2"),
    ],
)
def test_wrong_candidates_are_refused(came, error, words, items, q):
    with pytest.raises(error, match=words):
        two_stage(q, items, 1, lambda q, q_mask, n: came)


def test_arguments_are_checked(items, q, monkeypatch):
    first = MeanPool(items, engine="torch")
    with pytest.raises(ValueError, match="k must be at most n_candidates and the number of documents, 5; got 6"):
        two_stage(q, items, 6, first, n_candidates=5)
    with pytest.raises(ValueError, match="n_candidates must be an int >= 1, got 0"):
        two_stage(q, items, 6, first, n_candidates=0)
    with pytest.raises(ValueError, match="q and corpus must have the same dim"):
        two_stage(q[..., :4], items, 1, first)
    with pytest.raises(ValueError, match="engine must be one of auto, faiss, torch; got 'annoy'"):
        MeanPool(items, engine="annoy")
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="engine='faiss' needs faiss: pip install faiss-cpu"):
        MeanPool(items, engine="faiss")
    with pytest.raises(ValueError, match="factory needs engine='faiss'"):
        MeanPool(items, factory="HNSW8")
    assert MeanPool(items).engine == "torch"
