"""`topk` of a corpus in memory with its codes, and of a corpus of codes alone."""

import pytest
import torch
from coded import DIM, assert_same, clustered, queries

from latemax import PatchStore, StoreWriter, maxsim, quantize, topk
from latemax.search import bounded
from latemax.search import corpus as corpora
from latemax.search.tokens import concatenated
from latemax.store import Packed


@pytest.fixture(autouse=True)
def small_gaps(monkeypatch):
    """These corpora are smaller than the shortest gap."""
    monkeypatch.setattr(bounded, "GAP_WORK", 0)


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
