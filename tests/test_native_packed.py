"""The native CPU kernel on ragged sides, in every combination with dense ones, against lists."""

import math

import numpy
import pytest
import torch
from common import run_backward, run_forward

from latemax import reference
from latemax.ops.backends import native

pytestmark = pytest.mark.skipif(not native.status()[0], reason=native.status()[1])
LEVELS = list(enumerate(native.levels()))
NO_ARGMAX = torch.empty(0, dtype=torch.int32)
Q_LENGTHS, D_LENGTHS = (3, 0, 33, 1), (5, 0, 130, 1, 40)
# what q is, what d is
FORMS = [
    (q, d)
    for q in ("dense", "ragged")
    for d in ("dense", "own", "ragged", "candidates")
    if q == "ragged" or d in ("ragged", "candidates")
]


def forward(q, d, q_mask, d_mask, q_offsets, d_offsets, candidates, scores, argmax, *, level=-1, **options):
    where = dict(q_offsets=q_offsets, d_offsets=d_offsets, candidates=candidates)
    run_forward(
        native, q, d, scores, argmax, q_mask=q_mask, d_mask=d_mask, launch=level % len(LEVELS), **where, **options
    )  # fmt: skip


def backward(g, q, d, argmax, q_offsets, d_offsets, candidates, *, level=-1, **options):
    where = dict(q_offsets=q_offsets, d_offsets=d_offsets, candidates=candidates)
    return run_backward(native, g, q, d, argmax, launch=level % len(LEVELS), **where, **options)


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


class Case:
    """One problem in both forms: tensors for the kernel, and for the oracle a list of documents for each query."""

    def __init__(self, q_form, d_form, *, dim=24, dtype=torch.float32, masked=False, seed=0, scale=1.0):
        self.generator = torch.Generator().manual_seed(seed)
        self.cu_q = self.cu_d = self.candidates = None
        self.dim, self.dtype = dim, dtype
        if q_form == "dense":
            self.q, self.q_mask = self.tokens((3, 7), masked)
            queries = list(zip(self.q, self.masks(self.q, self.q_mask), strict=True))
        else:
            self.cu_q = cu(Q_LENGTHS)
            # two tokens after the last query, which belong to none
            self.q, self.q_mask = self.tokens((sum(Q_LENGTHS) + 2,), masked)
            self.q[-2:] = math.nan
            queries = self.cut(self.q, self.q_mask, self.cu_q)
        n_q = len(queries)
        if d_form in ("dense", "own"):
            leading = (n_q, 4, 31) if d_form == "own" else (4, 31)
            self.d, self.d_mask = self.tokens(leading, masked)
            masks = self.masks(self.d, self.d_mask)
            if d_form == "own":
                sets = [list(zip(*pair, strict=True)) for pair in zip(self.d, masks, strict=True)]
            else:
                sets = [list(zip(self.d, masks, strict=True))] * n_q
        else:
            self.cu_d = cu(D_LENGTHS)
            self.d, self.d_mask = self.tokens((sum(D_LENGTHS) + 3,), masked)
            self.d[-3:] = math.nan
            documents = self.cut(self.d, self.d_mask, self.cu_d)
            sets = [documents] * n_q
            if d_form == "candidates":
                self.candidates = torch.randint(-1, len(documents), (n_q, 6), generator=self.generator)
                self.candidates[:, 0] = 2  # one that all queries name
                self.candidates[0, 1] = -1
                nothing = (self.d[:0], self.masks(self.d, self.d_mask)[:0])
                sets = [[documents[c] if c >= 0 else nothing for c in row] for row in self.candidates.tolist()]
        self.pairs = [[(query, document) for document in row] for query, row in zip(queries, sets, strict=True)]
        self.shape = n_q, len(self.pairs[0])

    def tokens(self, leading, masked):
        x = torch.randn(*leading, self.dim, generator=self.generator).to(self.dtype)
        mask = torch.rand(*leading, generator=self.generator) < 0.6 if masked else None
        if masked:
            x[~mask] = math.nan
        return x, mask

    @staticmethod
    def masks(x, mask):
        return torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask

    def cut(self, x, mask, offsets):
        bounds = list(zip(offsets.tolist(), offsets.tolist()[1:], strict=False))
        return [(x[a:b], self.masks(x, mask)[a:b]) for a, b in bounds]

    def argmax_of(self, argmax, a, c):
        if self.cu_q is None:
            return argmax[a, c]
        return argmax[c, self.cu_q[a] : self.cu_q[a + 1]]

    def argmax(self):
        n_q, n_c = self.shape
        shape = (n_q, n_c, self.q.shape[1]) if self.cu_q is None else (n_c, len(self.q))
        return torch.full(shape, -99, dtype=torch.int32)

    def forward(self, argmax=NO_ARGMAX, **options):
        scores = torch.full(self.shape, math.nan)
        options = dict(dict(normalize=False, empty_score=-3.0), **options)
        forward(
            self.q, self.d, self.q_mask, self.d_mask, self.cu_q, self.cu_d, self.candidates, scores, argmax, **options
        )
        return scores

    def backward(self, g, argmax, **options):
        options = dict(dict(normalize=False, needs_q=True, needs_d=True), **options)
        return backward(g, self.q, self.d, argmax, self.cu_q, self.cu_d, self.candidates, **options)

    def oracle(self, g, normalize):
        """float64 scores and gradients by autograd, every pair by itself."""
        q = self.q.double().requires_grad_()
        d = self.d.double().requires_grad_()
        scores = torch.empty(self.shape, dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for a, row in enumerate(self.pairs):
            for c, ((x, x_mask), (y, y_mask)) in enumerate(row):
                # views of the storage of q and d: the same places of the leaves
                x, y = (
                    leaf.as_strided(part.shape, part.stride(), part.storage_offset()) for leaf, part in ((q, x), (d, y))
                )
                if not len(x):
                    scores[a, c] = 0
                    continue
                mask = y_mask.unsqueeze(0) if len(y) else None
                score = reference.maxsim(
                    x.unsqueeze(0), y.unsqueeze(0), x_mask.unsqueeze(0), mask, normalize=normalize, empty_score=-3.0
                )[0, 0]
                scores[a, c] = score.detach()
                total = total + score * g[a, c]
        total.backward() if total.requires_grad else None
        return scores, *(torch.zeros_like(x) if x.grad is None else x.grad for x in (q, d))


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_every_combination(form, normalize, masked, dtype, level):
    case = Case(*form, masked=masked, dtype=dtype)
    options = dict(normalize=normalize, level=level[0])
    argmax = case.argmax()
    scores = case.forward(argmax, **options)
    assert torch.equal(case.forward(**options), scores)
    g = torch.randn(case.shape, generator=case.generator)
    truth, *gradients = case.oracle(g, normalize)
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=1e-4)
    for a, row in enumerate(case.pairs):
        for c, ((_, x_mask), (_, y_mask)) in enumerate(row):
            won = case.argmax_of(argmax, a, c).long()
            assert torch.equal(won < 0, ~x_mask | ~y_mask.any())
            assert y_mask[won[won >= 0]].all()
    if case.cu_q is not None:
        assert (argmax[:, -2:] == -1).all()
    for ours, theirs in zip(case.backward(g, argmax, **options), gradients, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous()
        close = dict(rtol=1e-2, atol=1e-2) if dtype != torch.float32 else dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.double(), theirs, **close)
        assert (ours[(theirs == 0).all(-1)] == 0).all()


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_strided_gradients_and_gradients_of_one_side(form):
    case = Case(*form, masked=True)
    argmax = case.argmax()
    case.forward(argmax)
    n_q, n_c = case.shape
    g = torch.randn(n_c, n_q, generator=case.generator).T
    both = case.backward(g, argmax)
    for x, y in zip(both, case.backward(g.contiguous(), argmax), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(both[0], case.backward(g, argmax, needs_d=False)[0])
    assert torch.equal(both[1], case.backward(g, argmax, needs_q=False)[1])
    assert case.backward(g, argmax, needs_q=False, needs_d=False) == (None, None)
    one = torch.ones(()).expand(case.shape)
    for x, y in zip(case.backward(one, argmax), case.backward(one.contiguous(), argmax), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
def test_the_bits_of_dense_scores(normalize, dtype):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, 20, 64, generator=generator).to(dtype)
    d = torch.randn(9, 50, 64, generator=generator).to(dtype)
    scores, argmax = torch.empty(3, 9), torch.empty(3, 9, 20, dtype=torch.int32)
    options = dict(normalize=normalize, empty_score=0.0)
    forward(q, d, None, None, None, None, None, scores, argmax, **options)
    cu_q, cu_d = cu([20] * 3), cu([50] * 9)
    candidates = torch.arange(9).expand(3, -1).contiguous()
    flat_q, flat_d = q.flatten(0, 1), d.flatten(0, 1)
    g = torch.randn(3, 9, generator=generator)
    sides = dict(normalize=normalize, needs_q=True, needs_d=True)
    grads = backward(g, q, d, argmax, None, None, None, **sides)
    for args in (
        (q, flat_d, None, cu_d, None), (flat_q, d, cu_q, None, None), (flat_q, flat_d, cu_q, cu_d, None),
        (q, flat_d, None, cu_d, candidates), (flat_q, flat_d, cu_q, cu_d, candidates),
    ):  # fmt: skip
        a, b, *rest = args
        packed = torch.empty(3, 9)
        won = torch.empty((3, 9, 20) if a.dim() == 3 else (9, 60), dtype=torch.int32)
        forward(a, b, None, None, *rest, packed, won, **options)
        assert torch.equal(packed, scores)
        assert torch.equal(won if a.dim() == 3 else won.view(9, 3, 20).transpose(0, 1), argmax)
        for x, y in zip(backward(g, a, b, won, *rest, **sides), grads, strict=True):
            assert torch.equal(x.view_as(y), y)


def test_threads_change_no_bit():
    before, runs = torch.get_num_threads(), []
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 400, (40,), generator=generator).tolist()
    q, d = torch.randn(90, 64, generator=generator), torch.randn(sum(lengths), 64, generator=generator)
    candidates = torch.randint(-1, 40, (3, 30), generator=generator)
    g = torch.randn(3, 30, generator=generator)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            scores, argmax = torch.empty(3, 30), torch.empty(30, 90, dtype=torch.int32)
            where = cu([50, 0, 40]), cu(lengths), candidates
            forward(q, d, None, None, *where, scores, argmax, normalize=False, empty_score=0.0)
            grads = backward(g, q, d, argmax, *where, normalize=True, needs_q=True, needs_d=True)
            runs.append((scores, argmax, *grads))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for x, y in zip(runs[0], other, strict=True):
            assert torch.equal(x, y)


def test_ties_go_to_the_lowest_number_within_the_document():
    d = torch.ones(12, 8)
    scores, argmax = torch.empty(1, 3), torch.full((3, 4), -99, dtype=torch.int32)
    forward(
        torch.ones(4, 8), d, None, None, cu([4]), cu([7, 0, 5]), None, scores, argmax, normalize=False, empty_score=-1.0
    )
    assert scores.tolist() == [[32, -1, 32]]
    assert argmax.tolist() == [[0] * 4, [-1] * 4, [0] * 4]


def test_nan_affects_only_its_pair():
    case = Case("ragged", "ragged")
    clean = case.forward()
    case.d[7, 3] = math.nan
    scores = case.forward()
    assert scores[[0, 2, 3], 2].isnan().all() and scores[1, 2] == 0
    others = [0, 1, 3, 4]
    assert torch.equal(scores[:, others], clean[:, others])


@pytest.mark.parametrize(
    "name, values",
    [
        ("cu_seqlens_q must start at 0; got 1", dict(cu_q=[1, 3, 3, 36, 37])),
        ("cu_seqlens_q must start at 0; got -1", dict(cu_q=[-1, 3, 3, 36, 37])),
        (r"cu_seqlens_q must never fall .*; got 2 after 3 at \[2\]", dict(cu_q=[0, 3, 2, 36, 37])),
        (r"cu_seqlens_q .* end within the 39 tokens; got 40 after 36 at \[4\]", dict(cu_q=[0, 3, 3, 36, 40])),
        ("cu_seqlens_d must start at 0; got 2", dict(cu_d=[2, 5, 5, 135, 136, 176])),
        (r"cu_seqlens_d .* within the 179 tokens; got 180 after 136 at \[5\]", dict(cu_d=[0, 5, 5, 135, 136, 180])),
        (r"cu_seqlens_d .* got -9223372036854775808 after 0 at \[1\]", dict(cu_d=[0, -(2**63), 5, 135, 136, 176])),
        (r"candidates must be -1 or below 5 documents; got 5 at \[1, 0\]", dict(candidates=[[0], [5], [0], [1]])),
        (r"candidates must be -1 or below 5 documents; got -2 at \[3, 0\]", dict(candidates=[[0], [4], [0], [-2]])),
    ],
)  # fmt: skip
def test_offsets_and_candidates_out_of_range_are_refused_before_anything_is_written(name, values):
    case = Case("ragged", "candidates")
    for attribute, value in values.items():
        setattr(case, attribute, torch.tensor(value))
    n_c = case.candidates.shape[1]
    case.shape = 4, n_c
    scores, argmax = torch.full(case.shape, 7.0), torch.full((n_c, 39), -99, dtype=torch.int32)
    where = case.cu_q, case.cu_d, case.candidates
    with pytest.raises(ValueError, match=name):
        forward(case.q, case.d, None, None, *where, scores, argmax, normalize=False, empty_score=-math.inf)
    assert (scores == 7).all() and (argmax == -99).all()
    with pytest.raises(ValueError, match=name):
        backward(scores, case.q, case.d, argmax.fill_(-1), *where, normalize=False, needs_q=True, needs_d=True)


@pytest.mark.parametrize(
    "q_lengths, d_lengths, k",
    [
        ([], [3], None), ([2], [], None), ([0, 0], [0], None), ([], [], 2), ([0], [4], 0), ([3], [], 2),
        ([0, 2], [0, 0], 1),
    ],
    ids=str,
)  # fmt: skip
def test_empty_sides(q_lengths, d_lengths, k):
    q, d = torch.randn(sum(q_lengths), 8), torch.randn(sum(d_lengths), 8)
    n_c = len(d_lengths) if k is None else k
    candidates = None if k is None else torch.full((len(q_lengths), k), -1)
    scores = torch.full((len(q_lengths), n_c), math.nan)
    argmax = torch.full((n_c, len(q)), -99, dtype=torch.int32)
    where = cu(q_lengths), cu(d_lengths), candidates
    forward(q, d, None, None, *where, scores, argmax, normalize=True, empty_score=-3.0)
    for a, length in enumerate(q_lengths):
        if not length:
            assert (scores[a] == 0).all()
        elif not len(d):
            assert (scores[a] == -3).all() and (argmax == -1).all()
    options = dict(normalize=True, needs_q=True, needs_d=True)
    for x, y in zip(backward(torch.ones_like(scores), q, d, argmax, *where, **options), (q, d), strict=True):
        assert x.shape == y.shape and not x.isnan().any()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_corpus_mapped_from_a_read_only_file(tmp_path):
    documents = torch.randn(60, 16)
    documents.numpy().tofile(tmp_path / "tokens")
    mapped = torch.from_numpy(numpy.memmap(tmp_path / "tokens", numpy.float32, "r", shape=(60, 16)))
    q, scores, expected = torch.randn(2, 5, 16), torch.empty(2, 3), torch.empty(2, 3)
    where = None, cu([10, 20, 30]), None
    for d, out in ((mapped, scores), (documents, expected)):
        forward(q, d, None, None, *where, out, NO_ARGMAX, normalize=False, empty_score=0.0)
    assert torch.equal(scores, expected)
