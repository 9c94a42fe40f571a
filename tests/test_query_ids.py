"""``rerank(query_ids=)``: row r of the candidates is scored as if its query were row r of q."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import TRITON_DEVICE
from torch.nn.utils.rnn import pad_sequence

import latemax
from latemax.arguments import check
from latemax.ops.backends import native

needs_native = pytest.mark.skipif(not native.status()[0], reason=native.status()[1])
# query 3 is named by no row, query 1 is empty in ragged forms
IDS = torch.tensor([2, 0, 0, 1, 2, 4, 2])
CANDIDATES = torch.tensor([[0, 2], [3, -1], [1, 1], [2, 0], [-1, -1], [0, 3], [3, 2]])
LENGTHS = {"q": [5, 0, 33, 7, 1], "d": [9, 0, 130, 4]}
FORMS = ["dense", "list", "jagged", "pair"]
# the interpreter is slow, and the backends share the forms
CASES = [*itertools.product(FORMS, ["auto", "reference"]), ("dense", "triton"), ("pair", "triton")]


def items(side: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(ord(side))
    return [torch.randn(n, 24, generator=generator).to(dtype) for n in LENGTHS[side]]


def corpus(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    d = items("d", dtype)
    return torch.cat(d), torch.tensor([0, *LENGTHS["d"]]).cumsum(0)


def queries(form: str, dtype: torch.dtype = torch.float32, masked: bool = False):
    """(q and its mask in this form, what each query is as a list and its masks)."""
    q = items("q", dtype)
    if form == "dense":
        # no zeros: normalised, their gradients are 1e12 times larger
        q = list(pad_sequence(q, batch_first=True, padding_value=0.5))
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(len(x), generator=generator) < 0.6 for x in q] if masked else [None] * len(q)
    if form == "dense":
        return torch.stack(q), torch.stack(masks) if masked else None, q, masks
    if form == "pair":
        offsets = torch.tensor([0, *LENGTHS["q"]]).cumsum(0)
        return (torch.cat(q), offsets), torch.cat(masks) if masked else None, q, masks
    whole = torch.nested.nested_tensor(q, layout=torch.jagged) if form == "jagged" else q
    return whole, masks if masked else None, q, masks


def moved(x, backend: str):
    """x where the backend runs: Triton's kernels on a GPU if there is one."""
    if isinstance(x, (list, tuple)):
        return type(x)(moved(item, backend) for item in x)
    return x.to(TRITON_DEVICE) if backend == "triton" and x is not None else x


def same(ours, theirs) -> None:
    for x, y in zip(ours, theirs, strict=True):
        x = x.cpu()
        assert x.shape == y.shape and x.dtype == y.dtype
        torch.testing.assert_close(x, y, equal_nan=True)


def padded(argmax: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(argmax, (0, 33 - argmax.shape[-1]), value=-1)


@pytest.mark.parametrize(("form", "backend"), CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_a_row_scores_as_its_query(form, masked, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    for dtype in (torch.bfloat16,) if backend == "triton" else (torch.float32, torch.bfloat16, torch.float64):
        q, q_mask, each, masks = queries(form, dtype, masked)
        q, q_mask, tokens, offsets, candidates, ids = moved((q, q_mask, *corpus(dtype), CANDIDATES, IDS), backend)
        options = dict(normalize=masked, empty_score=-9.0, return_argmax=True)
        scores, argmax = latemax.rerank(
            q, tokens, offsets, candidates, q_mask, query_ids=ids, backend=backend, **options
        )
        numbered = IDS.tolist()
        expected = latemax.rerank(
            [each[i] for i in numbered], *corpus(dtype), CANDIDATES, [masks[i] for i in numbered], **options
        )
        same((scores, argmax), (expected[0], padded(expected[1])))
        options["return_argmax"] = False
        same([latemax.rerank(q, tokens, offsets, candidates, q_mask, query_ids=ids.int(), **options)], expected[:1])


def test_pairs_and_lists_of_documents():
    q, d = items("q"), items("d")
    documents = torch.tensor([3, 0, 2, 2, -1, 0, 3])
    options = dict(query_ids=IDS.numpy(), return_argmax=True)
    ours = latemax.rerank([x.numpy() for x in q], d, None, documents.unsqueeze(1).numpy(), **options)
    whole, argmax = latemax.maxsim(q, d, return_argmax=True)
    expected = whole[IDS, documents].masked_fill(documents < 0, -torch.inf)
    expected[3] = 0  # an empty query
    same(ours, (expected.unsqueeze(1), argmax[IDS, documents].masked_fill((documents < 0)[:, None], -1).unsqueeze(1)))
    one = latemax.rerank(q[2], d, None, documents.unsqueeze(1), query_ids=torch.zeros(7, dtype=torch.int64))
    torch.testing.assert_close(one, whole[2, documents].masked_fill(documents < 0, -torch.inf).unsqueeze(1))


@pytest.mark.parametrize("form", FORMS)
def test_concatenated_queries_need_no_numbers(form):
    q, q_mask, each, masks = queries(form, masked=True)
    options = dict(empty_score=-9.0, return_argmax=True)
    ours = latemax.rerank(q, *corpus(), CANDIDATES[:5], q_mask, **options)
    scores, argmax = latemax.rerank(each, *corpus(), CANDIDATES[:5], masks, **options)
    same(ours, (scores, padded(argmax)))


@pytest.mark.parametrize(("form", "backend"), CASES)
def test_gradients(form, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    options = dict(normalize=True, empty_score=0.0)
    weights = torch.linspace(-1, 2, CANDIDATES.numel()).view_as(CANDIDATES)

    def leaves(x):
        return list(x) if form == "list" else [x[0] if form == "pair" else x]

    results = []
    for numbered in (True, False):
        where = backend if numbered else "auto"
        q, tokens, offsets, candidates, ids = moved((queries(form)[0], *corpus(), CANDIDATES, IDS), where)
        wanted = [tokens.requires_grad_(), *(x.requires_grad_() for x in leaves(q))]
        if numbered:
            scores = latemax.rerank(q, tokens, offsets, candidates, query_ids=ids, backend=backend, **options)
        else:
            each = q if form == "list" else q[0].split(LENGTHS["q"]) if form == "pair" else q.unbind()
            scores = latemax.rerank([each[i] for i in IDS], tokens, offsets, CANDIDATES, **options)
        grads = torch.autograd.grad((scores.cpu() * weights).sum(), wanted, allow_unused=True)
        results.append([None if x is None else (x.values() if x.is_nested else x).cpu() for x in grads])
    for ours, theirs in zip(*results, strict=True):
        # a query that nothing depends on: no gradient, or zeros
        none = torch.zeros_like(ours if theirs is None else theirs) if ours is None or theirs is None else None
        torch.testing.assert_close(none if ours is None else ours, none if theirs is None else theirs)


def test_half_precision_gradients_of_many_rows_are_added_in_float32():
    q = torch.ones(1, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.ones(1, 8, dtype=torch.bfloat16)
    rows = torch.zeros(1000, dtype=torch.int64)
    latemax.rerank(q, tokens, torch.tensor([0, 1]), rows.unsqueeze(1), query_ids=rows).sum().backward()
    assert torch.equal(q.grad, torch.full_like(q, 1000))  # one by one bfloat16 stops at 256


@needs_native
def test_the_native_kernel_reads_queries_in_place():
    q, tokens, rows = torch.randn(3, 32, 128), torch.randn(8, 128), torch.zeros(2000, dtype=torch.int64)
    forms = (q, list(q), (q.view(96, 128), torch.arange(4) * 32))
    with torch.profiler.profile(profile_memory=True) as profile:
        for form in forms:
            latemax.rerank(form, tokens, torch.tensor([0, 8]), rows.unsqueeze(1), query_ids=rows + 1)
    # gathered, the queries would be 32 MB
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= 2000 * 8


def test_an_unknown_query(monkeypatch):
    q, _, _, _ = queries("dense")
    with pytest.raises(ValueError, match="query_ids must be numbers of queries, 0 to 4; got 5"):
        latemax.rerank(q, *corpus(), CANDIDATES, query_ids=IDS + 1)
    with pytest.raises(ValueError, match="query_ids must be numbers of queries, 0 to 4; got -1"):
        latemax.rerank(q, *corpus(), CANDIDATES, query_ids=IDS - 1)
    # as where values cannot be read
    monkeypatch.setattr(check, "readable", lambda _: False)
    if native.status()[0]:
        with pytest.raises(ValueError, match=r"query_ids must be below 5 queries; got 5 at \[5\]"):
            latemax.rerank(q, *corpus(), CANDIDATES, query_ids=IDS + 1)
    pytest.importorskip("triton")
    bad = IDS.clone()
    bad[1], bad[4] = 5, -1
    for form in ("dense", "pair"):
        arguments = moved((queries(form)[0], *corpus(), CANDIDATES), "triton")
        options = dict(query_ids=moved(bad, "triton"), return_argmax=True, empty_score=-9.0, backend="triton")
        scores, argmax = (x.cpu() for x in latemax.rerank(*arguments, **options))
        assert torch.equal(scores.isnan().any(1), bad != IDS) and bool(scores[bad != IDS].isnan().all())
        assert bool((argmax[bad != IDS] == -1).all())


def test_other_arguments_are_refused_by_name():
    q, _, _, _ = queries("dense")
    wrong = {
        r"candidates must be \[n, k\] with the n of query_ids, 6; got shape \[7, 2\]": (CANDIDATES, IDS[:6]),
        r"candidates must be \[n, k\], got shape \[7\]": (CANDIDATES[:, 0], IDS),
        r"query_ids must be \[n\], got shape \[7, 1\]": (CANDIDATES, IDS[:, None]),
    }
    for message, (candidates, ids) in wrong.items():
        with pytest.raises(ValueError, match=message):
            latemax.rerank(q, *corpus(), candidates, query_ids=ids)
    with pytest.raises(TypeError, match=r"query_ids must be int32 or int64, got torch\.float32"):
        latemax.rerank(q, *corpus(), CANDIDATES, query_ids=IDS.float())
    with pytest.raises(TypeError, match=r"query_ids must be a torch\.Tensor or a numpy array, got list"):
        latemax.rerank(q, *corpus(), CANDIDATES, query_ids=IDS.tolist())
    with pytest.raises(ValueError, match="query_ids must be empty where q holds no query"):
        latemax.rerank([], *corpus(), CANDIDATES, query_ids=IDS)
    (tokens, offsets), *_ = queries("pair")
    with pytest.raises(ValueError, match=r"q\[1\] must end within the 46 tokens of q\[0\]; got 47"):
        latemax.rerank((tokens, offsets + (offsets > 45)), *corpus(), CANDIDATES, query_ids=IDS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_to_score(form, backend):
    q, *_ = queries(form)
    options = dict(return_argmax=True, backend=backend)
    length = 33
    scores, argmax = latemax.rerank(q, *corpus(), CANDIDATES[:0], query_ids=IDS[:0], **options)
    assert scores.shape == (0, 2) and argmax.shape == (0, 2, length)
    scores, argmax = latemax.rerank(q, *corpus(), CANDIDATES[:, :0], query_ids=IDS, **options)
    assert scores.shape == (7, 0) and argmax.shape == (7, 0, length)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_queries_without_a_token(backend):
    empty = torch.zeros(0, 24)
    for q in ([empty, empty], (empty, torch.zeros(3, dtype=torch.int64))):
        scores, argmax = latemax.rerank(
            q, *corpus(), CANDIDATES, query_ids=IDS % 2, empty_score=-9.0, return_argmax=True, backend=backend
        )
        assert torch.equal(scores, torch.zeros(7, 2)) and argmax.shape == (7, 2, 0)


def test_compilation_and_transforms():
    tokens, offsets = corpus()
    score = torch.compile(latemax.rerank, fullgraph=True, backend="aot_eager")
    for form in ("dense", "list"):
        q, q_mask, _, _ = queries(form, masked=True)
        leaf = (q if form == "dense" else q[2]).requires_grad_()
        options = dict(query_ids=IDS, empty_score=0.0)
        ours, theirs = (f(q, tokens, offsets, CANDIDATES, q_mask, **options) for f in (score, latemax.rerank))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaf) for x in (ours, theirs)))
    many = torch.stack([queries("dense")[0], queries("dense")[0].flip(0)])

    def one(q):
        return latemax.rerank(q, tokens, offsets, CANDIDATES, query_ids=IDS)

    torch.testing.assert_close(torch.func.vmap(one)(many), torch.stack([one(q) for q in many]))
