"""Ragged input: maxsim_varlen, rerank and every mixture of lists and dense tensors, compared pair by pair."""

import math

import pytest
import torch
from common import BACKENDS, assert_exact

import latemax
from latemax import reference

Q_LENGTHS, D_LENGTHS = [3, 1, 0, 40, 17], [5, 130, 0, 1, 64, 33]


def flat(lengths, dim=16, seed=0, dtype=torch.float32, device="cpu", spare=0):
    """Concatenated tokens and their offsets; ``spare`` rows of NaN after the last item belong to no item."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(sum(lengths), dim, generator=generator).to(dtype)
    tokens = torch.cat([tokens, torch.full((spare, dim), torch.nan, dtype=dtype)])
    return tokens.to(device), torch.tensor([0, *lengths]).cumsum(0).to(device)


def items(tokens, cu):
    return [tokens[a:b] for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]


def oracle(q, d, cu_q, cu_d, q_mask=None, d_mask=None, **options):
    """(scores [n_q, n_d], argmax [t_q, n_d]) in float64, one pair at a time."""
    scores = torch.empty(len(cu_q) - 1, len(cu_d) - 1, dtype=torch.float64, device=q.device)
    argmax = torch.full((len(q), len(cu_d) - 1), -1, dtype=torch.int32, device=q.device)
    for a, (i, j) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)):
        for b, (k, m) in enumerate(zip(cu_d[:-1].tolist(), cu_d[1:].tolist(), strict=True)):
            scores[a, b], argmax[i:j, b] = reference.maxsim(
                q[i:j].double(), d[k:m].double(),
                None if q_mask is None else q_mask[i:j], None if d_mask is None else d_mask[k:m],
                return_argmax=True, **options,
            )  # fmt: skip
    return scores, argmax


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("where", BACKENDS)
def test_varlen(where, masked, normalize):
    backend, device = where
    q, cu_q = flat(Q_LENGTHS, device=device, spare=2)
    d, cu_d = flat(D_LENGTHS, seed=1, device=device, spare=3)
    q_mask = d_mask = None
    if masked:
        generator = torch.Generator().manual_seed(2)
        q_mask = (torch.rand(len(q), generator=generator) < 0.6).to(device)
        d_mask = (torch.rand(len(d), generator=generator) < 0.6).to(device)
        q_mask[3], d_mask[135] = False, False  # an item of one token each
        q[~q_mask], d[~d_mask] = torch.nan, torch.inf
    options = dict(normalize=normalize, empty_score=-7.0)
    scores, argmax = latemax.maxsim_varlen(
        q, d, cu_q.int(), cu_d, q_mask, d_mask, return_argmax=True, backend=backend, **options
    )
    truth, best = oracle(q, d, cu_q, cu_d, q_mask, d_mask, **options)
    assert scores.shape == (5, 6) and scores.dtype == torch.float32
    assert_exact(scores, truth, truth.float())
    assert argmax.shape == (len(q), 6) and torch.equal(argmax, best)
    assert torch.equal(
        latemax.maxsim_varlen(q, d, cu_q, cu_d, q_mask, d_mask, backend=backend, **options), scores
    ) or torch.allclose(scores, truth.float(), atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("where", BACKENDS)
def test_varlen_gradients(where, normalize):
    backend, device = where
    q, cu_q = flat(Q_LENGTHS, device=device, spare=2)
    d, cu_d = flat(D_LENGTHS, seed=1, device=device, spare=3)
    g = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).to(device)
    q.requires_grad_(), d.requires_grad_()
    scores = latemax.maxsim_varlen(q, d, cu_q, cu_d, normalize=normalize, empty_score=0.0, backend=backend)
    ours = torch.autograd.grad(scores, (q, d), g)
    a, b = q.detach().double().requires_grad_(), d.detach().double().requires_grad_()
    pairs = [
        reference.maxsim(x, y, normalize=normalize, empty_score=0.0) for x in items(a, cu_q) for y in items(b, cu_d)
    ]
    truth = torch.autograd.grad((torch.stack(pairs).view(5, 6) * g).sum(), (a, b))
    for x, y in zip(ours, truth, strict=True):
        y = y.nan_to_num()  # rows of no item
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
    assert (ours[0][-2:] == 0).all() and (ours[1][-3:] == 0).all()
    only = latemax.maxsim_varlen(q, d.detach(), cu_q, cu_d, normalize=normalize, empty_score=0.0, backend=backend)
    assert torch.equal(torch.autograd.grad(only, q, g)[0], ours[0])


@pytest.mark.parametrize("where", BACKENDS)
def test_every_mixture_of_lists_and_dense_tensors(where):
    backend, device = where
    q, cu_q = flat([3, 40, 17], device=device)
    d, cu_d = flat([5, 130, 64], seed=1, device=device)
    generator = torch.Generator().manual_seed(4)
    dense_q = torch.randn(3, 7, 16, generator=generator).to(device)
    dense_d = torch.randn(4, 21, 16, generator=generator).to(device)
    own = torch.randn(3, 2, 21, 16, generator=generator).to(device)
    own_mask = torch.rand(3, 2, 21, generator=generator).to(device) < 0.5
    lists = [
        (items(q, cu_q), dense_d, None, lambda a, b: dense_d[b]),
        (dense_q, items(d, cu_d), None, lambda a, b: items(d, cu_d)[b]),
        (items(q, cu_q), own, own_mask, lambda a, b: own[a, b][own_mask[a, b]]),
    ]
    for queries, documents, d_mask, pick in lists:
        queries = [x.clone().requires_grad_() for x in queries] if isinstance(queries, list) else queries.clone()
        scores, argmax = latemax.maxsim(queries, documents, None, d_mask, return_argmax=True, backend=backend)
        n_c = scores.shape[1]
        truth = torch.stack([
            torch.stack([reference.maxsim(x.detach().double(), pick(a, b).double()) for b in range(n_c)])
            for a, x in enumerate(queries)
        ])  # fmt: skip
        torch.testing.assert_close(scores.detach().double(), truth, rtol=1e-5, atol=1e-4)
        assert argmax.shape == (3, n_c, 40 if isinstance(queries, list) else 7)
        if isinstance(queries, list):
            assert (argmax[0, :, 3:] == -1).all() and (argmax[0, :, :3] >= 0).all()
            grads = torch.autograd.grad(scores.sum(), queries)
            plain = [x.detach().double().requires_grad_() for x in queries]
            total = sum(reference.maxsim(x, pick(a, b).double()) for a, x in enumerate(plain) for b in range(n_c))
            for x, y in zip(grads, torch.autograd.grad(total, plain), strict=True):
                torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
    pairs, argmax = latemax.maxsim_pairs(dense_q, items(d, cu_d), return_argmax=True, backend=backend)
    torch.testing.assert_close(
        pairs, torch.stack([reference.maxsim(x, y) for x, y in zip(dense_q, items(d, cu_d), strict=True)])
    )
    assert argmax.shape == (3, 7)


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("dim", [16, 300])
@pytest.mark.parametrize("where", BACKENDS)
def test_rerank(where, dim, normalize):
    backend, device = where
    d, offsets = flat(D_LENGTHS, dim, seed=1, device=device)
    q = torch.randn(3, 9, dim, generator=torch.Generator().manual_seed(5)).to(device)
    q_mask = torch.ones(3, 9, dtype=torch.bool, device=device)
    q_mask[1, 4:] = False
    candidates = torch.tensor([[1, 0, -1, 1], [2, 5, 4, 3], [5, 5, 0, -1]], device=device)
    options = dict(normalize=normalize, empty_score=-3.0)
    q.requires_grad_(), d.requires_grad_()
    scores, argmax = latemax.rerank(q, d, offsets, candidates, q_mask, return_argmax=True, backend=backend, **options)
    documents = [*items(d, offsets), d[:0]]
    a, b = q.detach().double().requires_grad_(), d.detach().double().requires_grad_()
    doubles = [*items(b, offsets), b[:0]]
    rows = [
        reference.maxsim(x, [doubles[n] for n in numbers], keep, return_argmax=True, **options)
        for x, keep, numbers in zip(a, q_mask, candidates.tolist(), strict=True)
    ]
    truth = torch.stack([score for score, _ in rows])
    assert len(documents) == 7
    torch.testing.assert_close(scores.detach().double(), truth.detach(), rtol=1e-5, atol=1e-4)
    assert torch.equal(argmax, torch.stack([best for _, best in rows]))
    g = torch.randn(3, 4, generator=torch.Generator().manual_seed(6)).to(device)
    ours = torch.autograd.grad(scores, (q, d), g)
    for x, y in zip(ours, torch.autograd.grad((truth * g).sum(), (a, b)), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-4)
    one = latemax.rerank(q[1], d, offsets, candidates[1].int(), q_mask[1], backend=backend, **options)
    torch.testing.assert_close(one, scores[1])
    ragged = latemax.rerank([q[0], q[1, :4], q[2]], d, offsets, candidates, backend=backend, **options)
    torch.testing.assert_close(ragged, scores)


@pytest.mark.parametrize("where", BACKENDS)
def test_scores_do_not_depend_on_the_layout(where):
    """The same documents dense, ragged and as candidates; one query of a ragged call bit for bit."""
    backend, device = where
    q, d = torch.randn(2, 12, 64, device=device), torch.randn(4, 70, 64, device=device)
    dense = latemax.maxsim(q, d, backend=backend)
    cu_q, cu_d = torch.arange(3, device=device) * 12, torch.arange(5, device=device) * 70
    numbers = torch.tensor([[3, 0], [2, 2]], device=device)
    packed = latemax.maxsim(q, list(d), backend=backend)
    varlen = latemax.maxsim_varlen(q.flatten(0, 1), d.flatten(0, 1), cu_q, cu_d, backend=backend)
    named = latemax.rerank(q, d.flatten(0, 1), cu_d, numbers, backend=backend)
    for scores, expected in ((packed, dense), (varlen, dense), (named, dense.gather(1, numbers))):
        torch.testing.assert_close(scores, expected)
    single = latemax.maxsim_varlen(q[1], d.flatten(0, 1), cu_q[:2], cu_d, backend=backend)
    if backend == "triton":
        assert torch.equal(single[0], varlen[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("where", BACKENDS)
def test_dtypes(where, dtype):
    backend, device = where
    q, cu_q = flat([9, 30], 64, dtype=dtype, device=device)
    d, cu_d = flat([40, 3, 90], 64, seed=1, dtype=dtype, device=device)
    scores = latemax.maxsim_varlen(q, d, cu_q, cu_d, backend=backend)
    truth, _ = oracle(q, d, cu_q, cu_d)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scores.double(), truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("where", BACKENDS)
def test_empty_inputs(where):
    backend, device = where
    none = torch.zeros(1, dtype=torch.int64, device=device)
    tokens = torch.zeros(0, 16, device=device)
    d, cu_d = flat([5, 3], device=device)
    assert latemax.maxsim_varlen(tokens, d, none, cu_d, backend=backend).shape == (0, 2)
    assert latemax.maxsim_varlen(d, tokens, cu_d, none, backend=backend).shape == (2, 0)
    empty = latemax.maxsim_varlen(d, tokens, cu_d, none.repeat(2), backend=backend)
    assert empty.tolist() == [[-math.inf], [-math.inf]]
    assert latemax.maxsim_varlen(tokens, d, none.repeat(3), cu_d, backend=backend).tolist() == [[0, 0], [0, 0]]
    slots = torch.zeros(2, 0, dtype=torch.int64, device=device)
    assert latemax.rerank(torch.ones(2, 4, 16, device=device), d, cu_d, slots, backend=backend).shape == (2, 0)
    only = torch.full((1, 2), -1, device=device)
    scores = latemax.rerank(torch.ones(1, 4, 16, device=device), tokens, none, only, empty_score=1.5, backend=backend)
    assert scores.tolist() == [[1.5, 1.5]]


@pytest.mark.parametrize("where", BACKENDS)
def test_ties_and_nan(where):
    backend, device = where
    d, cu_d = torch.zeros(400, 16, device=device), torch.tensor([0, 5, 305, 400], device=device)
    d[[5 + 7, 5 + 130, 5 + 299]] = 1.0
    d[305:] = 1.0
    d[2] = torch.nan
    scores, argmax = latemax.maxsim_varlen(
        torch.ones(20, 16, device=device), d, torch.tensor([0, 20], device=device), cu_d, return_argmax=True,
        backend=backend,
    )  # fmt: skip
    assert scores[0, 0].isnan() and scores[0, 1:].tolist() == [320.0, 320.0]
    assert argmax[:, 1].unique().tolist() == [7] and argmax[:, 2].unique().tolist() == [0]


Q, D = torch.ones(4, 8), torch.ones(9, 8)
CU_Q, CU_D = torch.tensor([0, 1, 4]), torch.tensor([0, 4, 9])
VARLEN = {
    "q 3-D": (dict(q=Q[None]), ValueError, r"q must be \[t_q, dim\], got shape \[1, 4, 8\]"),
    "other dim": (dict(d=D[:, :4]), ValueError, r"q and d must have the same dim"),
    "float": (dict(cu_q=CU_Q.float()), TypeError, r"cu_seqlens_q must be int32 or int64, got torch\.float32"),
    "list": (dict(cu_d=[0, 9]), TypeError, r"cu_seqlens_d must be a torch\.Tensor or a numpy array, got list"),
    "2-D": (dict(cu_d=CU_D[None]), ValueError, r"cu_seqlens_d must be \[n_d \+ 1\], got shape \[1, 3\]"),
    "none": (dict(cu_d=CU_D[:0]), ValueError, r"cu_seqlens_d must be .* at least one element; got shape \[0\]"),
    "not from 0": (dict(cu_q=CU_Q + 1), ValueError, r"cu_seqlens_q must start at 0, got 1"),
    "falls": (dict(cu_d=torch.tensor([0, 6, 4])), ValueError, r"cu_seqlens_d must never fall; got 6, 4 at 1"),
    "too long": (dict(cu_d=CU_D + torch.tensor([0, 0, 1])), ValueError, r"end within the 9 tokens of d; got 10"),
    "mask": (dict(d_mask=torch.ones(3)), ValueError, r"d_mask must have the leading shape of d, \[9\]; got"),
    "device": (dict(cu_q=CU_Q.to("meta")), ValueError, r"cu_seqlens_q must be on the device .*; got meta"),
}  # fmt: skip
RERANK = {
    "tokens 3-D": (dict(tokens=D[None]), ValueError, r"tokens must be \[t_d, dim\], got shape \[1, 9, 8\]"),
    "integers": (dict(tokens=D.int()), TypeError, r"tokens must be float16, bfloat16, float32 or float64"),
    "unsorted": (dict(offsets=torch.tensor([0, 6, 4])), ValueError, r"offsets must never fall; got 6, 4 at 1"),
    "after the end": (dict(candidates=torch.tensor([[0, 2]])), ValueError, r"0 to 1, or -1 for an empty slot; got 2"),
    "below -1": (dict(candidates=torch.tensor([[-2, 0]])), ValueError, r"or -1 for an empty slot; got -2"),
    "bool": (dict(candidates=torch.ones(1, 2) > 0), TypeError, r"candidates must be int32 or int64, got torch\.bool"),
    "1-D": (dict(candidates=torch.tensor([0, 1])), ValueError, r"candidates must be \[n_q, k\], got shape \[2\]"),
    "other n_q": (dict(candidates=torch.zeros(2, 1).int()), ValueError, r"the n_q of q, 1; got shape \[2, 1\]"),
    "other dim": (dict(q=Q[None, :, :3]), ValueError, r"q and tokens must have the same dim"),
    "backend": (dict(backend="x"), ValueError, r"backend must be one of"),
}


@pytest.mark.parametrize("case", VARLEN, ids=lambda name: name.replace(" ", "-"))
def test_varlen_refuses(case):
    changed, error, text = VARLEN[case]
    args = dict(q=Q, d=D, cu_q=CU_Q, cu_d=CU_D, q_mask=None, d_mask=None) | changed
    with pytest.raises(error, match=text):
        latemax.maxsim_varlen(*args.values())


@pytest.mark.parametrize("case", RERANK, ids=lambda name: name.replace(" ", "-"))
def test_rerank_refuses(case):
    changed, error, text = RERANK[case]
    args = dict(q=Q[None], tokens=D, offsets=CU_D, candidates=torch.tensor([[0, 1]])) | changed
    with pytest.raises(error, match=text):
        latemax.rerank(**args)


def test_compile_and_opcheck():
    q, cu_q = flat([3, 9])
    d, cu_d = flat([5, 30, 8], seed=1)
    torch._dynamo.reset()
    compiled = torch.compile(latemax.maxsim_varlen, fullgraph=True)
    torch.testing.assert_close(compiled(q, d, cu_q, cu_d), latemax.maxsim_varlen(q, d, cu_q, cu_d))
    candidates = torch.tensor([[0, 2], [1, -1]])
    named = torch.compile(latemax.rerank, fullgraph=True)
    three = torch.randn(2, 4, 16)
    torch.testing.assert_close(named(three, d, cu_d, candidates), latemax.rerank(three, d, cu_d, candidates))
    nested = torch.nested.nested_tensor([d[:5], d[5:35]], layout=torch.jagged)
    torch.testing.assert_close(
        torch.compile(latemax.maxsim, fullgraph=True)(three, nested), latemax.maxsim(three, nested)
    )
    q.requires_grad_(), d.requires_grad_()
    for packing in ((cu_q, cu_d, None), (cu_q, cu_d, candidates)):
        torch.library.opcheck(torch.ops.latemax.maxsim, (q, d, None, None, True, -1.0, True, "auto", *packing))


def test_a_memory_mapped_corpus(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    corpus = rng.standard_normal((300, 32)).astype(np.float16)
    corpus.tofile(tmp_path / "tokens")
    mapped = torch.from_numpy(np.memmap(tmp_path / "tokens", np.float16, "c", shape=(300, 32)))
    offsets = torch.tensor([0, 100, 130, 300])
    q = torch.randn(5, 32)
    scores = latemax.rerank(q, mapped, offsets, torch.tensor([2, 0]))
    torch.testing.assert_close(scores, reference.maxsim(q, [mapped[130:], mapped[:100]]), rtol=1e-5, atol=1e-4)
