"""Lists on the CPU are scored where their items are: as ragged tokens bit for bit, and without concatenating them."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from common import TRITON_DEVICE, run_program
from torch._subclasses.fake_tensor import FakeTensorMode

import latemax
from latemax import reference
from latemax.ops import operator
from latemax.ops.backends import native

needs_native = pytest.mark.skipif(not native.status()[0], reason=native.status()[1])
LENGTHS = {"q": [3, 0, 32, 1], "d": [5, 0, 130, 1, 40, 0]}


def items(side: str, dtype: torch.dtype = torch.float32, dim: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(side) + ord(side))
    return [torch.randn(n, dim, generator=generator).to(dtype) for n in LENGTHS[side]]


def keep(side: str) -> list[torch.Tensor | None]:
    """Holes, an item without a valid token, an item without a mask, and masks of int and float."""
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(n, generator=generator) < 0.6 for n in LENGTHS[side]]
    masks[0] = masks[0].int()
    masks[2] = masks[2].float()
    return [*masks[:3], torch.zeros(1, dtype=torch.bool) if side == "d" else None, *masks[4:]]


def offsets(x: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([*itertools.accumulate((len(item) for item in x), initial=0)])


def joined(masks: list[torch.Tensor | None] | None, x: list[torch.Tensor]) -> torch.Tensor | None:
    if masks is None:
        return None
    return torch.cat(
        [torch.ones(len(item)) if mask is None else mask.float() for mask, item in zip(masks, x, strict=True)]
    )


def ragged(q, d, q_mask=None, d_mask=None, **options):
    """(scores, argmax [n_q, n_d, longest]) of the concatenated tokens."""
    scores, argmax = latemax.maxsim_varlen(
        torch.cat(q), torch.cat(d), offsets(q), offsets(d), joined(q_mask, q), joined(d_mask, d),
        return_argmax=True, **options,
    )  # fmt: skip
    padded = torch.full((len(q), len(d), max(map(len, q))), -1, dtype=torch.int32)
    for a, (first, end) in enumerate(itertools.pairwise(offsets(q).tolist())):
        padded[a, :, : end - first] = argmax[first:end].T
    return scores, padded


def same(ours, theirs) -> None:
    """The same bits; in float64, which torch's matmul computes, the same but for rounding."""
    tolerance = 1e-12 if ours[0].dtype == torch.float64 else 0
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
def test_a_list_scores_as_its_concatenated_tokens(dtype, masked, normalize):
    q, d = items("q", dtype), items("d", dtype)
    masks = (keep("q"), keep("d")) if masked else (None, None)
    options = dict(normalize=normalize, empty_score=-9.0)
    expected = ragged(q, d, *masks, **options)
    same(latemax.maxsim(q, d, *masks, return_argmax=True, **options), expected)
    assert torch.equal(latemax.maxsim(tuple(q), tuple(d), *masks, **options), expected[0])
    diagonal = [x[torch.arange(4), torch.arange(4)] for x in expected]
    pair_masks = masks[0], masks[1][:4] if masked else None
    same(latemax.maxsim_pairs(q, d[:4], *pair_masks, return_argmax=True, **options), diagonal)
    # one side a list, the other dense
    one = latemax.maxsim(q[2], d, None, masks[1], return_argmax=True, **options)
    same(one, [x[0] for x in ragged([q[2]], d, None, masks[1], **options)])
    dense = torch.stack([d[2], d[2].flip(0)])
    same(
        latemax.maxsim(q, dense, masks[0], return_argmax=True, **options),
        ragged(q, list(dense), masks[0], **options),
    )
    own = dense.expand(4, -1, -1, -1)
    same(
        latemax.maxsim(q, own, masks[0], return_argmax=True, **options),
        ragged(q, list(dense), masks[0], **options),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rerank_of_a_list(dtype):
    q, d, q_mask = items("q", dtype), items("d", dtype), keep("q")
    candidates = torch.tensor([[2, -1, 0], [4, 4, 1], [5, 2, 3], [0, -1, -1]])
    options = dict(return_argmax=True, normalize=True, empty_score=-9.0)
    expected = latemax.rerank(q, torch.cat(d), offsets(d), candidates, q_mask, **options)
    same(latemax.rerank(q, d, None, candidates, q_mask, **options), expected)
    nested = torch.nested.nested_tensor(d, layout=torch.jagged)
    same(latemax.rerank(q, nested, None, candidates, q_mask, **options), expected)
    one = latemax.rerank(q[2], d, None, candidates[2], **options)
    same(one, latemax.rerank(q[2], torch.cat(d), offsets(d), candidates[2], **options))
    d[2].requires_grad_()
    expected = torch.autograd.grad(latemax.rerank(q, torch.cat(d), offsets(d), candidates, empty_score=0.0).sum(), d[2])
    ours = torch.autograd.grad(latemax.rerank(q, d, None, candidates, empty_score=0.0).sum(), d[2])
    assert torch.equal(ours[0], expected[0])


def test_rerank_says_what_is_wrong_with_a_list():
    q, d, candidates = items("q"), items("d"), torch.zeros(4, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="offsets must be None where tokens are a list or a nested tensor"):
        latemax.rerank(q, d, offsets(d), candidates)
    with pytest.raises(TypeError, match=r"offsets must be a torch\.Tensor or a numpy array, got NoneType"):
        latemax.rerank(q, torch.cat(d), None, candidates)
    with pytest.raises(ValueError, match="candidates must be numbers of documents, 0 to 5"):
        latemax.rerank(q, d, None, candidates + 6)
    with pytest.raises(ValueError, match=r"tokens\[1\] has torch.float16"):
        latemax.rerank(q, [d[0], d[1].half()], None, candidates)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_forward_concatenates_nothing(dtype, monkeypatch):
    q, d, q_mask, d_mask = items("q", dtype), items("d", dtype), keep("q"), keep("d")
    corpus, corpus_offsets = torch.cat(d), offsets(d)
    candidates = torch.tensor([[0, 2]]).expand(4, 2)

    def refuse(*_):
        raise AssertionError("a list was concatenated")

    monkeypatch.setattr(torch, "cat", refuse)
    latemax.maxsim(q, d, q_mask, d_mask, return_argmax=True)
    latemax.maxsim(q[0], d)
    latemax.maxsim(q, d[2])
    latemax.maxsim_pairs(q, d[:4])
    latemax.rerank(q, corpus, corpus_offsets, candidates, q_mask)
    latemax.rerank(q, d, None, candidates, q_mask)
    latemax.maxsim([torch.nn.Parameter(x, requires_grad=False) for x in q], d)
    with torch.no_grad():
        latemax.maxsim([x.clone().requires_grad_() for x in q], d)
    with torch.inference_mode():
        latemax.maxsim(items("q", dtype), d)


@needs_native
def test_no_memory_grows_with_the_tokens():
    """The profiler sees the allocations of torch; those of the kernel are per thread, of a fixed size."""
    q, d = [torch.randn(8, 128)], [torch.randn(300, 128) for _ in range(20)]
    mask = [torch.ones(300, dtype=torch.bool)] * 20
    with torch.profiler.profile(profile_memory=True) as profile:
        latemax.maxsim(q, d, None, mask)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # the item table, 24 bytes an item; the mask would be 6,000 bytes and the tokens 3 MB
    assert largest < 3000


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_the_process_grows_by_no_document():
    """Also what the kernel allocates. The documents are 52 MB."""
    assert int(run_program("list_memory")) < 2 << 20


def unusual() -> dict[str, list[torch.Tensor]]:
    """Documents whose rows are not simply one after the other."""
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(5))
    wide = torch.randn(40, 50, generator=torch.Generator().manual_seed(6))
    pair = torch.complex(x, x.flip(0))
    return {
        "every second row": [x[::2], x[1::2]],
        "columns of a wider tensor": [wide[:, 3:27], wide[5:9, 20:44]],
        "transposed": [x.T.contiguous().T, x[:30]],
        "every second column": [wide[:, ::2][:, :24], x],
        "one row expanded": [x[:1].expand(9, -1), x[0].expand(3, -1)],
        "one row": [x[:1], x[3:4], x[::39][1:]],
        "overlapping": [x[:30], x[10:]],
        "the same item twice": [x, x],
        "negated lazily": [x, pair.conj().imag],
        "expanded columns": [x[:, :1].expand(-1, 24), x],
        "nothing": [x[:0], x[5:5]],
    }


@pytest.mark.parametrize("name", unusual())
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
def test_items_of_any_stride(name, normalize):
    d = unusual()[name]
    q = items("q")
    same(
        latemax.maxsim(q, d, normalize=normalize, return_argmax=True),
        ragged(q, [x.clone() for x in d], normalize=normalize),
    )
    queries = items("d")
    same(
        latemax.maxsim(d, queries, normalize=normalize, return_argmax=True),
        ragged([x.clone() for x in d], queries, normalize=normalize),
    )


def test_one_dim_and_masks_of_any_stride():
    wide = torch.rand(4, 300) < 0.5
    q, d = items("q", dim=1), [x[:, :1] for x in items("d")]
    mask = [wide[0, ::2][:n] for n in LENGTHS["d"]]
    mask[0] = torch.tensor([True]).expand(5)
    same(latemax.maxsim(q, d, None, mask, return_argmax=True), ragged(q, d, None, mask))


@pytest.mark.parametrize("needs", ["q", "d", "one document", "both"])
def test_gradients_are_those_of_the_concatenated_tokens(needs, monkeypatch):
    q, d = items("q"), items("d")
    wanted = {"q": q, "d": d, "one document": d[2:3], "both": q + d}[needs]
    for x in wanted:
        x.requires_grad_()
    masks = keep("q"), keep("d")
    cat, calls = torch.cat, []
    expected = torch.autograd.grad(ragged(q, d, *masks, empty_score=0.0)[0].square().sum(), wanted)
    monkeypatch.setattr(torch, "cat", lambda *args: calls.append(args) or cat(*args))
    scores = latemax.maxsim(q, d, *masks, empty_score=0.0)
    assert len(calls) == 4  # tokens and mask of each side, once
    ours = torch.autograd.grad(scores.square().sum(), wanted)
    assert len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_dense_side_may_need_a_gradient():
    q, d = torch.randn(2, 5, 24, requires_grad=True), items("d")
    (ours,) = torch.autograd.grad(latemax.maxsim(q, d, empty_score=0.0).sum(), q)
    (expected,) = torch.autograd.grad(reference.maxsim(q, d, empty_score=0.0).sum(), q)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_backends_take_the_same_lists(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    q, d, masks = items("q"), items("d"), (keep("q"), keep("d"))
    truth, best = ragged(q, d, *masks, empty_score=-9.0)
    if backend == "triton":
        q, d, *masks = ([None if x is None else x.to(TRITON_DEVICE) for x in side] for side in (q, d, *masks))
    scores, argmax = latemax.maxsim(q, d, *masks, empty_score=-9.0, return_argmax=True, backend=backend)
    torch.testing.assert_close(scores.cpu(), truth)
    assert torch.equal(argmax.cpu(), best)


@pytest.mark.parametrize("dim", [24, 130])
def test_triton_reads_documents_where_they_are(dim, monkeypatch):
    """From the addresses of its table: rows with gaps, masks with holes, candidates, norms, dims of several tiles."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(8)
    wide = torch.randn(60, dim + 5, generator=generator)
    documents = [wide[:9, :dim], wide[:0, :dim], wide[::2, 3 : dim + 3], wide[5:6, :dim].expand(4, -1)]
    masks = [torch.rand(len(x), generator=generator) < 0.7 for x in documents]
    masks[2] = None
    q = torch.randn(2, 5, dim, generator=generator)
    candidates = torch.tensor([[2, -1, 0], [3, 1, 2]])
    options = dict(normalize=dim > 100, empty_score=-9.0, return_argmax=True)
    expected = latemax.maxsim(q, documents, None, masks, **options)
    chosen = latemax.rerank(q, documents, None, candidates, **options)
    q, candidates = q.to(TRITON_DEVICE), candidates.to(TRITON_DEVICE)
    if q.is_cuda:
        documents = [x.to(TRITON_DEVICE) for x in documents]
        masks = [None if x is None else x.to(TRITON_DEVICE) for x in masks]
    monkeypatch.setattr(torch, "cat", None if TRITON_DEVICE == "cpu" else torch.cat)
    for ours, theirs in (
        (latemax.maxsim(q, documents, None, masks, backend="triton", **options), expected),
        (latemax.rerank(q, documents, None, candidates, backend="triton", **options), chosen),
    ):
        torch.testing.assert_close(ours[0].cpu(), theirs[0])
        assert torch.equal(ours[1].cpu(), theirs[1])


def test_transforms_and_compilation_see_tensors():
    q, d = items("q"), items("d")
    truth = latemax.maxsim(q, d)
    compiled = torch.compile(latemax.maxsim, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, d), truth)
    queries = torch.randn(3, 2, 5, 24)
    mapped = torch.func.vmap(lambda x: latemax.maxsim(x, d))(queries)
    torch.testing.assert_close(mapped, torch.stack([latemax.maxsim(x, d) for x in queries]))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: latemax.maxsim(x, d), (queries[0],), (queries[0],))


def test_every_rule_names_the_item():
    q, d = items("q"), items("d")
    wrong = {
        r"all tensors of d must have one dtype; d\[0\] has torch.float32, d\[2\] has torch.float16": d[2].half(),
        r"all tensors of d must have one dim; d\[0\] is \[5, 24\], d\[2\] is \[130, 23\]": d[2][:, 1:],
        r"d\[2\] must be \[l_i, dim\], got shape \[24\]": d[2][0],
        r"d\[2\] must be \[l_i, dim\], got shape \[1, 130, 24\]": d[2][None],
        r"all tensors of d must have one device": d[2].to("meta"),
    }
    for message, item in wrong.items():
        with pytest.raises(ValueError, match=message):
            latemax.maxsim(q, [*d[:2], item, *d[3:]])
    wrong = {
        r"d\[2\] must be float16, bfloat16, float32 or float64, got torch.int32": d[2].int(),
        r"d\[2\] must be a dense tensor or a jagged nested tensor, got layout torch.sparse_coo": d[2].to_sparse(),
        r"d\[2\] must be a torch.Tensor, a numpy array or a list of them, got NoneType": None,
    }
    for message, item in wrong.items():
        with pytest.raises(TypeError, match=message):
            latemax.maxsim(q, [*d[:2], item, *d[3:]])
    with pytest.raises(ValueError, match=r"same dim"):
        latemax.maxsim(q, [x[:, :7] for x in d])
    with pytest.raises(ValueError, match=r"dim \(last axis of q and d\) must be at least 1"):
        latemax.maxsim([x[:, :0] for x in q], [x[:, :0] for x in d])
    with pytest.raises(ValueError, match=r"d_mask must be a list of 6 masks for a list of 6; got a list of 5"):
        latemax.maxsim(q, d, None, keep("d")[:5])
    freed = d[2].clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        latemax.maxsim(q, [freed, d[0]])


def test_a_graph_capture_refuses_lists(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        q, d = torch.empty(2, 5, 24, device="cuda"), [torch.empty(7, 24, device="cuda")]
        with pytest.raises(RuntimeError, match="d is a list, which a CUDA graph cannot capture: its lengths"):
            latemax.maxsim(q, d)
    assert latemax.maxsim(torch.ones(2, 5, 24), [torch.ones(7, 24)]).tolist() == [[120.0], [120.0]]


@needs_native
def test_the_item_table_is_the_same_without_torchs_c_interface(monkeypatch):
    """Torch before the C interface: addresses are asked for in Python."""
    q, d, masks = items("q"), items("d"), (keep("q"), keep("d"))
    expected = latemax.maxsim(q, d, *masks, return_argmax=True)
    seen = []
    real = operator.maxsim
    monkeypatch.setattr(operator, "maxsim", lambda b, *rest: seen.append(b) or real(b, *rest))
    latemax.maxsim(q, d, *masks)
    monkeypatch.setattr(native, "_exchange", None)
    same(latemax.maxsim(q, d, *masks, return_argmax=True), expected)
    for ours, theirs in zip(seen[1][:2], seen[0][:2], strict=True):
        lengths = ours.offsets.diff()
        assert torch.equal(ours.offsets, theirs.offsets)
        assert torch.equal(ours.separate.table[lengths > 0, ::2], theirs.separate.table[lengths > 0, ::2])
