"""Weighted sums and means of the maxima: every form and backend against the float64 oracle, pair by pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from common import BACKENDS, CUDA_DEVICE, exact, masks, problem
from torch import Tensor

import latemax
from latemax import reference
from latemax.ops.backends import cuda, native

EMPTY = -3.0


class Form(NamedTuple):
    """One way to call. Queries and documents are runs of rows of flat tokens, from which ``call`` makes its own."""

    q_lengths: list[int]
    d_lengths: list[int]
    pairs: list[list[tuple[int, int]]]  # the query and the document of each score; document -1 is empty
    call: Callable[..., Tensor]  # q, d, w, q_mask, d_mask, flat


def all_pairs(n_q: int, n_d: int) -> list[list[tuple[int, int]]]:
    return [[(a, c) for c in range(n_d)] for a in range(n_q)]


def cut(x: Tensor | None, lengths: list[int]) -> Any:
    return None if x is None else list(x.split(lengths))


def offsets(lengths: list[int], like: Tensor) -> Tensor:
    return torch.tensor([*itertools.accumulate(lengths, initial=0)], device=like.device)


def dense(n_q: int, l_q: int, n_d: int, l_d: int) -> Form:
    def call(q, d, w, q_mask, d_mask, **options):
        w = None if w is None else w.view(n_q, l_q)
        q_mask, d_mask = q_mask.view(n_q, l_q), d_mask.view(n_d, l_d)
        return latemax.maxsim(
            q.view(n_q, l_q, -1), d.view(n_d, l_d, -1), q_mask, d_mask, q_weights=w, **options
        )  # fmt: skip

    return Form([l_q] * n_q, [l_d] * n_d, all_pairs(n_q, n_d), call)


def own() -> Form:
    def call(q, d, w, q_mask, d_mask, **options):
        w = None if w is None else w.view(3, 5)
        return latemax.maxsim(
            q.view(3, 5, -1), d.view(3, 2, 9, -1), q_mask.view(3, 5), d_mask.view(3, 2, 9), q_weights=w, **options
        )

    return Form([5] * 3, [9] * 6, [[(a, 2 * a), (a, 2 * a + 1)] for a in range(3)], call)


def pairs() -> Form:
    def call(q, d, w, q_mask, d_mask, **options):
        w = None if w is None else w.view(3, 5)
        return latemax.maxsim_pairs(
            q.view(3, 5, -1), d.view(3, 9, -1), q_mask.view(3, 5), d_mask.view(3, 9), q_weights=w, **options
        ).unsqueeze(1)

    return Form([5] * 3, [9] * 3, [[(a, a)] for a in range(3)], call)


Q_LENGTHS, D_LENGTHS = [5, 0, 17], [7, 0, 33, 1]


def lists() -> Form:
    def call(q, d, w, q_mask, d_mask, **options):
        sides = (cut(q, Q_LENGTHS), cut(d, D_LENGTHS), cut(q_mask, Q_LENGTHS), cut(d_mask, D_LENGTHS))
        return latemax.maxsim(*sides, q_weights=cut(w, Q_LENGTHS), **options)

    return Form(Q_LENGTHS, D_LENGTHS, all_pairs(3, 4), call)


def varlen() -> Form:
    def call(q, d, w, q_mask, d_mask, **options):
        places = offsets(Q_LENGTHS, q), offsets(D_LENGTHS, d)
        return latemax.maxsim_varlen(q, d, *places, q_mask, d_mask, q_weights=w, **options)

    return Form(Q_LENGTHS, D_LENGTHS, all_pairs(3, 4), call)


def candidates() -> Form:
    numbers = [[2, -1], [0, 1], [3, 2]]

    def call(q, d, w, q_mask, d_mask, **options):
        named = torch.tensor(numbers, device=q.device)
        return latemax.rerank(
            cut(q, Q_LENGTHS), d, offsets(D_LENGTHS, d), named, cut(q_mask, Q_LENGTHS),
            q_weights=cut(w, Q_LENGTHS), **options,
        )  # fmt: skip

    return Form(Q_LENGTHS, D_LENGTHS, [[(a, c) for c in row] for a, row in enumerate(numbers)], call)


def numbered() -> Form:
    queries, numbers = [2, 0, 2, 1], [[2], [0], [3], [2]]

    def call(q, d, w, q_mask, d_mask, **options):
        named, ids = (torch.tensor(x, device=q.device) for x in (numbers, queries))
        where = (d, offsets(D_LENGTHS, d), named, q_mask)
        return latemax.rerank((q, offsets(Q_LENGTHS, q)), *where, query_ids=ids, q_weights=w, **options)

    return Form(Q_LENGTHS, D_LENGTHS, [[(a, c) for c in row] for a, row in zip(queries, numbers, strict=True)], call)


# rerank takes no mask of documents
WITHOUT_D_MASK = ("candidates", "numbered")
FORMS = {
    "dense": dense(3, 5, 4, 9), "long-query": dense(1, 140, 2, 20), "own": own(), "pairs": pairs(), "lists": lists(),
    "varlen": varlen(), "candidates": candidates(), "numbered": numbered(),
}  # fmt: skip


class Tokens(NamedTuple):
    q: Tensor
    d: Tensor
    w: Tensor
    q_mask: Tensor
    d_mask: Tensor


def tokens(form: Form, device: str, masked_documents: bool) -> Tokens:
    """Holes in the masks, where everything is NaN; a query and a document without a valid token; a weight of 0."""
    generator = torch.Generator().manual_seed(0)
    t_q, t_d = sum(form.q_lengths), sum(form.d_lengths)
    q, d = torch.randn(t_q, 16, generator=generator), torch.randn(t_d, 16, generator=generator)
    w = torch.randn(t_q, generator=generator)
    q_mask, d_mask = torch.rand(t_q, generator=generator) < 0.7, torch.rand(t_d, generator=generator) < 0.7
    w[1], q_mask[1] = 0, True
    q_mask[-3:-1] = False
    if len(form.q_lengths) > 1 and form.q_lengths[-1] == 5:
        q_mask[-5:] = False
    d_mask[-form.d_lengths[-1] :] = False
    if not masked_documents:
        d_mask[:] = True
    q[~q_mask], w[~q_mask], d[~d_mask] = math.nan, math.nan, math.nan
    dtype = torch.bfloat16 if device == CUDA_DEVICE else torch.float32
    return Tokens(q.to(device, dtype), d.to(device, dtype), w.to(device), q_mask.to(device), d_mask.to(device))


def oracle(form: Form, x: Tokens, w: Tensor | None, **options: Any) -> Tensor:
    side = {}
    for name, lengths in (("q", form.q_lengths), ("d", form.d_lengths), ("q_mask", form.q_lengths)):
        side[name] = cut(getattr(x, name), lengths)
    weights, d_masks = cut(w, form.q_lengths), cut(x.d_mask, form.d_lengths)

    def score(a: int, c: int) -> Tensor:
        document, d_mask = (side["d"][c], d_masks[c]) if c >= 0 else (x.d[:0], x.d_mask[:0])
        if not len(side["q"][a]):
            return x.q.new_zeros((), dtype=torch.float64)
        return reference.maxsim(
            side["q"][a], document, side["q_mask"][a], d_mask, q_weights=None if weights is None else weights[a],
            empty_score=EMPTY, **options,
        )  # fmt: skip

    return torch.stack([torch.stack([score(a, c) for a, c in row]) for row in form.pairs])


@pytest.mark.parametrize(
    ("weighted", "options"),
    [
        pytest.param(True, dict(), id="weights"),
        pytest.param(True, dict(reduce="mean", normalize=True), id="weights-mean-normalize"),
        pytest.param(False, dict(reduce="mean"), id="mean"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", BACKENDS)
def test_scores_and_gradients(where, form, weighted, options):
    backend, device = where
    masked_documents, form = form not in WITHOUT_D_MASK, FORMS[form]
    x = tokens(form, device, masked_documents)
    g = torch.randn(len(form.pairs), len(form.pairs[0]), generator=torch.Generator().manual_seed(1)).to(device)

    def run(score: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [(y if dtype is None else y.to(dtype)).detach().requires_grad_() for y in x[: 3 if weighted else 2]]
        q, d, w = (*leaves, None)[:3]
        scores = score(x._replace(q=q, d=d), w)
        return [scores.detach(), *torch.autograd.grad((scores * g).sum(), leaves)]

    d_mask = x.d_mask if masked_documents else None

    def call(y: Tokens, w: Tensor | None) -> Tensor:
        return form.call(
            y.q, y.d, w, q_mask=y.q_mask, d_mask=d_mask, empty_score=EMPTY, backend=backend,
            **options,
        )  # fmt: skip

    ours, truth = run(call, None), run(lambda y, w: oracle(form, y, w, **options), torch.float64)
    close = dict(rtol=1e-2, atol=1e-2) if x.q.dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, **close)
    masked = [~x.q_mask, ~x.d_mask, ~x.q_mask]
    for grad, rows in zip(ours[1:], masked, strict=False):
        assert (grad[rows] == 0).all()
    # without argmax Triton may run another tile
    with torch.no_grad():
        torch.testing.assert_close(call(x, x.w if weighted else None), ours[0])


@pytest.mark.parametrize("where", BACKENDS)
def test_infinities_and_nan(where):
    """0 · inf is NaN. What is masked has no influence, whatever it and its weight hold."""
    backend, device = where
    q, d = torch.ones(1, 3, 8, device=device), torch.ones(2, 4, 8, device=device)
    d[1, 2, 0] = math.inf
    if device == CUDA_DEVICE:
        q, d = q.bfloat16(), d.bfloat16()

    def scores(weights: list[float], mask: list[int] | None = None) -> list[float]:
        w, keep = (
            torch.tensor([weights], device=device).float(),
            None if mask is None else torch.tensor([mask], device=device),
        )
        return latemax.maxsim(q, d, keep, q_weights=w, backend=backend)[0].tolist()

    assert scores([1, 2, 0]) == pytest.approx([24, math.nan], nan_ok=True)
    assert scores([-1, -1, -1]) == [-24, -math.inf]
    assert scores([-1, 2, math.nan], [1, 1, 0]) == pytest.approx([8, math.nan], nan_ok=True)
    assert scores([1, 2, math.inf], [1, 1, 0]) == [24, math.inf]
    assert scores([0, 0, 0], [0, 1, 0]) == pytest.approx([0, math.nan], nan_ok=True)


@pytest.mark.parametrize("where", BACKENDS)
def test_empty_scores_are_neither_weighted_nor_divided(where):
    backend, device = where
    q, d = problem((3, 4, 5, 9, 16), device=device)
    q_mask, d_mask = masks(q, d)
    d_mask[1], q_mask[2] = False, False
    w = torch.full((3, 5), math.inf, device=device).requires_grad_()
    for reduce in ("sum", "mean"):
        scores = latemax.maxsim(
            q, d[1:2], q_mask, d_mask[1:2], q_weights=w, reduce=reduce, empty_score=-7.0, backend=backend
        )
        assert scores[:, 0].tolist() == [-7, -7, 0]
        assert torch.autograd.grad(scores.sum(), w)[0].tolist() == torch.zeros(3, 5).tolist()


@pytest.mark.parametrize("where", BACKENDS)
def test_weights_of_one_are_no_weights_and_a_mean_is_a_divided_sum(where):
    backend, device = where
    q, d = problem((3, 4, 7, 9, 16), device=device)
    q_mask, d_mask = masks(q, d)
    plain = latemax.maxsim(q, d, q_mask, d_mask, backend=backend)
    ones = torch.ones(3, 7, device=device)
    assert torch.equal(latemax.maxsim(q, d, q_mask, d_mask, q_weights=ones, backend=backend), plain)
    # other than by 1 / n, a division of integers is exact
    q, d = torch.ones(1, 3, 8, device=device, dtype=q.dtype), torch.ones(1, 3, 8, device=device, dtype=d.dtype)
    w = torch.tensor([[1.0, 2.0, 2.0]], device=device)
    mean = latemax.maxsim(q, d, q_weights=w, reduce="mean", backend=backend)
    assert mean.item() == torch.tensor(40 / 3).item()


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_gradcheck(backend):
    generator = torch.Generator().manual_seed(0)
    q, d, w = (torch.randn(*shape, generator=generator).double() for shape in ((2, 3, 4), (2, 5, 4), (2, 3)))
    if backend == "triton":
        q, d, w = (x.to(BACKENDS[2].values[0][1]) for x in (q, d, w))
    leaves = [x.requires_grad_() for x in (q, d, w)]
    for options in (dict(), dict(reduce="mean", normalize=True)):
        assert torch.autograd.gradcheck(
            lambda q, d, w, options=options: latemax.maxsim(q, d, q_weights=w, backend=backend, **options),
            leaves,
            fast_mode=backend == "triton",  # the interpreter takes 24 s for every element
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_are_cast_to_the_dtype_of_the_scores(dtype):
    q, d = problem((2, 3, 4, 9, 16))
    w = torch.randn(2, 4).to(dtype).requires_grad_()
    scores = latemax.maxsim(q, d, q_weights=w)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact(q, d, q_weights=w.detach()), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(scores.sum(), w)[0].dtype == dtype
    wide = latemax.maxsim(q.double(), d, q_weights=w)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, exact(q, d, q_weights=w), rtol=1e-12, atol=0)


def test_only_the_weights_need_a_gradient_and_it_repeats():
    q, d = problem((2, 3, 4, 9, 16))
    w = torch.randn(2, 4, requires_grad=True)
    grads = [torch.autograd.grad(latemax.maxsim(q, d, q_weights=w, reduce="mean").sum(), w)[0] for _ in range(2)]
    assert torch.equal(*grads)
    _, argmax = latemax.maxsim(q, d, return_argmax=True)
    best = torch.einsum("qic,kjc->qkij", q, d).gather(-1, argmax.long().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(grads[0], best.sum(1) / 4)


def test_compile_opcheck_vmap_and_second_derivatives():
    q, d = problem((2, 3, 4, 9, 16))
    q_mask, _ = masks(q, d)
    w = torch.randn(2, 4)

    def loss(q, d, w):
        return latemax.maxsim(q, d, q_mask, q_weights=w, reduce="mean").square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, d, w)]
    torch._dynamo.reset()
    grads = [torch.autograd.grad(run(*leaves), leaves) for run in (loss, torch.compile(loss, fullgraph=True))]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)
    arguments = (q_mask, None, True, -1.0, True, "auto", None, None, None)
    torch.library.opcheck(torch.ops.latemax.maxsim, (*leaves[:2], *arguments, leaves[2], True))
    batched = torch.vmap(lambda w: latemax.maxsim(q, d, q_weights=w))(torch.stack([w, 2 * w]))
    torch.testing.assert_close(batched[1], 2 * batched[0])
    (first,) = torch.autograd.grad(loss(*leaves), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_arrays_and_modules():
    q, d = problem((2, 3, 4, 9, 16))
    w = torch.randn(2, 4)
    expected = latemax.maxsim(q, d, q_weights=w, reduce="mean")
    assert torch.equal(latemax.maxsim(q.numpy(), d.numpy(), q_weights=w.numpy(), reduce="mean"), expected)
    assert torch.equal(latemax.MaxSim(reduce="mean")(q, d, q_weights=w), expected)
    assert latemax.maxsim(q[0], d, q_weights=w[0], reduce="mean").equal(expected[0])
    ragged = latemax.maxsim([*q], [*d], q_weights=[w[0].numpy(), w[1]], reduce="mean")
    torch.testing.assert_close(ragged, expected)


def test_searches_rank_by_the_reduced_scores():
    q, d = problem((3, 40, 5, 9, 16))
    q_mask, _ = masks(q, d)
    w = torch.randn(3, 5)
    options = dict(q_weights=w, reduce="mean")
    scores = latemax.maxsim(q, d, q_mask, **options)
    best = scores.topk(4)
    memory = 2 * 3 * 4 * 48 + 8000
    offsets = torch.arange(41) * 9
    for corpus in (d, (d.flatten(0, 1), offsets)):
        found = latemax.topk(q, corpus, 4, q_mask, memory=memory, **options)
        torch.testing.assert_close(found.scores, best.values)
        assert torch.equal(found.indices, best.indices)
    everything = torch.arange(40).expand(3, -1)
    found = latemax.two_stage(q, d, 4, lambda *_: everything, q_mask, **options)
    torch.testing.assert_close(found.scores, best.values)
    one = latemax.two_stage(q[0], d, 4, lambda *_: everything[:1], q_mask[0], q_weights=w[0], reduce="mean")
    assert torch.equal(one.indices, found.indices[0])
    assert torch.equal(latemax.topk([*q], d, 4, [*q_mask], q_weights=[*w], reduce="mean").indices, best.indices)


def test_the_cuda_kernels_refuse_with_a_reason(monkeypatch):
    from latemax.ops.backends.base import Status
    from latemax.ops.problem import Batch, Side, problem_of

    monkeypatch.setattr(cuda, "status", lambda: Status(True, ""))
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    q = torch.zeros(1, 4, 64, dtype=torch.bfloat16)
    plain = Batch(Side(q), Side(q))
    reason = "neither weights nor the mean"
    assert reason not in cuda.why_not(problem_of(plain, argmax=False), True)
    for b in (plain._replace(mean=True), plain._replace(q=Side(q, weights=torch.ones(1, 4)))):
        assert reason in cuda.why_not(problem_of(b, argmax=False), True)


@pytest.mark.skipif(not native.status()[0], reason=native.status()[1])
def test_threads_change_no_bit():
    """More threads than documents: their maxima are summed at the end."""
    q, d = problem((1, 1, 2000, 300, 64))
    w, before, found = torch.randn(1, 2000), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(latemax.maxsim(q, d, q_weights=w, reduce="mean"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0].double(), exact(q, d, q_weights=w, reduce="mean"), rtol=1e-5, atol=1e-5)
