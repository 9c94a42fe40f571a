"""A store says which model made its tokens, and a query of another model or space is refused with both names."""

from __future__ import annotations

import pytest
import torch

from latemax import MeanPool, PatchStore, PatchTokens, StoreWriter, TextTokens, topk, two_stage

MODEL = {"model_id": "acme/clip", "space": "text"}


def queries(model_id="acme/clip", space="text") -> TextTokens:
    torch.manual_seed(1)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    out = TextTokens(torch.randn(2, 3, 8), mask, [["a", "dog"], ["the", "cat", "s"]], torch.zeros(2, 3).long())
    out.model_id, out.space = model_id, space
    return out


@pytest.fixture
def store(tmp_path, request):
    torch.manual_seed(0)
    with StoreWriter(tmp_path / "store", dtype=torch.float32, meta=getattr(request, "param", MODEL)) as writer:
        for i in range(4):
            writer.add(torch.randn(5 + i, 8), f"page-{i}")
    return PatchStore(tmp_path / "store")


def test_encoded_queries_are_searched_with_their_mask(store):
    assert (store.model_id, store.space) == ("acme/clip", "text")
    q = queries()
    plain = topk(q.tokens, store, 3, q.mask)
    for found in (topk(q, store, 3), two_stage(q, store, 3, MeanPool(store))):
        torch.testing.assert_close(found.scores, plain.scores)
        assert torch.equal(found.indices, plain.indices)
    image = PatchTokens(q.tokens, q.mask, (1, 3))
    image.model_id, image.space = q.model_id, q.space
    assert torch.equal(topk(image, store, 3).indices, plain.indices)
    with pytest.raises(ValueError, match="q_mask must be None with encoded tokens"):
        topk(q, store, 3, q.mask)


@pytest.mark.parametrize(
    ("model_id", "space", "named"),
    [
        ("acme/siglip", "text", "the space 'text' of the model 'acme/siglip'"),
        ("acme/clip", "patches", "the space 'patches' of the model 'acme/clip'"),
    ],
)
def test_another_space_is_refused(store, model_id, space, named):
    q = queries(model_id, space)
    message = rf"store: the space 'text' of the model 'acme/clip'; got {named}: encode it with the store's model"
    for search in (lambda: topk(q, store, 3), lambda: two_stage(q, store, 3, MeanPool(store))):
        with pytest.raises(ValueError, match=message):
            search()


@pytest.mark.parametrize("store", [{}, {"space": "text"}, {"model_id": "acme/clip"}], indirect=True)
def test_what_nobody_said_is_not_checked(store):
    topk(queries(), store, 3)
    topk(queries(None, None), store, 3)
    assert topk(queries("acme/clip", "text"), [store[i] for i in range(4)], 3).indices.shape == (2, 3)
