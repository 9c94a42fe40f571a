"""First stages: what they refuse, with an error that names it."""

import math

import pytest
import torch
from staged import DIM, KIND, LEMUR, MAKE, pages, stored

from latemax import Lemur, MeanPool, Muvera, PatchStore, RowPool, StoreWriter


@pytest.fixture(params=MAKE)
def make(request):
    made = MAKE[request.param]
    made.kind = KIND[request.param]
    return made


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_a_token_that_is_not_finite_is_named(make, wrong, tmp_path):
    """Where it came first or last it would be by chance; the number of a token within its chunk would not help."""
    items = pages()
    items[90][2, 5] = wrong
    for corpus in (items, stored(tmp_path / "all", items)):
        with pytest.raises(ValueError, match="token 2 of document 90 holds NaN or infinity"):
            make(corpus, memory=20_000)
    good = pages()
    first = make(stored(tmp_path / "good", good))
    with StoreWriter(tmp_path / "good") as writer:
        writer.remove("page-3")
        writer.add(items[90], "wrong")
    with pytest.raises(ValueError, match="token 2 of document 119 holds"):
        first.update(PatchStore(tmp_path / "good"))
    assert len(first) == 120


def test_large_finite_tokens_are_taken(make):
    items = [x.float() * 1e38 for x in pages()]
    if make.kind is Lemur:
        pytest.skip("their scores are not finite")
    assert len(make(items)) == 120


def test_lemur_learns_from_documents_with_tokens():
    with pytest.raises(ValueError, match="corpus must hold a token to learn from, got 5 documents without one"):
        Lemur([torch.empty(0, DIM)] * 5, engine="torch", **LEMUR)
    items = [torch.empty(0, DIM)] * 500 + [x.float() for x in pages(20)]
    assert Lemur(items, engine="torch", **(LEMUR | dict(documents=5))).vectors[500:507].norm(dim=-1).min() > 0


@pytest.mark.parametrize("queries", [torch.zeros(0, DIM), torch.zeros(3, DIM + 1), torch.zeros(3, 1, DIM)])
def test_lemur_refuses_queries_it_cannot_learn_from(queries):
    with pytest.raises(ValueError, match="queries must be"):
        Lemur(pages(), queries=queries, **LEMUR)


def test_lemur_refuses_queries_that_are_not_finite():
    queries = torch.randn(30, DIM)
    queries[4, 2] = math.inf
    with pytest.raises(ValueError, match="queries must be finite"):
        Lemur(pages(), queries=queries, engine="torch", **LEMUR)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda c: Muvera(c, bits=11), "bits must be an int from 0 to 10, got 11"),
        (lambda c: Muvera(c, projection=25), "projection must be at most dim, 24; got 25"),
        (lambda c: Muvera(c, repetitions=0), "repetitions must be"),
        (lambda c: Lemur(c, width=64, solve=63), "solve must be at least width, 64; got 63"),
        (lambda c: Lemur(c, epochs=0), "epochs must be"),
        (lambda c: MeanPool(c, engine="best"), "engine must be one of"),
        (lambda c: RowPool(c, memory=0), "memory must be"),
        (lambda c: MeanPool(c).first(torch.zeros(2, 3, DIM + 1), None, 1), "q must have the dim of the corpus, 24"),
        (lambda c: MeanPool(c).first(torch.zeros(2, 3, DIM), None, 0), "n must be"),
        (lambda c: MeanPool(c).first(torch.zeros(2, DIM), None, 1), "q must be"),
        (
            lambda c: MeanPool(c).first(torch.zeros(2, 3, DIM), torch.ones(2, 4), 1),
            "q_mask must have the leading shape",
        ),
        (lambda c: MeanPool(c).first(torch.zeros(2, 3, DIM), None, 1, torch.tensor([-1])), "indices from 0 to 11"),
    ],
)
def test_wrong_arguments(build, words):
    with pytest.raises(ValueError, match=words):
        build(pages(12))
