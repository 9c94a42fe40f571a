"""The CUDA kernels' own sources in the emulator, over random problems, GPUs and orders of threads and copies;
and over ragged tokens.

LATEMAX_EMULATED_EXAMPLES sets the number of problems of each test and kernel; more than the default draws new ones.
"""

import math
import os

import pytest
import torch
from common import exact, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_emulated import SEEDS, assert_right, device, emulator, forward  # noqa: F401

from latemax.ops import tiles
from latemax.ops.backends import cuda

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())
EXAMPLES = int(os.environ.get("LATEMAX_EMULATED_EXAMPLES", "0"))
many = settings(
    max_examples=EXAMPLES or 60, deadline=None, derandomize=not EXAMPLES, database=None, report_multiple_bugs=False
)


@st.composite
def gpus(draw, capability):
    """Seed of the order, multiprocessors, shared memory of a block, and the dims that fit. The least memory of any GPU
    leaves rings of two stages."""
    shared = draw(st.integers(101376, tiles.SHARED_MEMORY[capability]))
    return draw(st.integers(0, 999)), draw(st.integers(1, 5)), shared, _most_dims(capability, shared)


def _most_dims(capability, shared):
    before = tiles.SHARED_MEMORY[capability]
    tiles.SHARED_MEMORY[capability] = shared
    try:
        return cuda.most_dims(capability)
    finally:
        tiles.SHARED_MEMORY[capability] = before


def lengths(*usual):
    """Lengths at and next to the boundaries of the kernels' tiles, and any other."""
    return st.one_of(st.sampled_from(usual), st.integers(1, max(usual)))


def keeps(draw, shape, seed):
    if not draw(st.booleans()):
        return None
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0.0, 0.3, 0.9]))


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@many
@given(data=st.data())
def test_random_tensors(device, data):  # noqa: F811
    seed, multiprocessors, shared, most = data.draw(gpus(device.capability))
    dim = 8 * data.draw(st.one_of(st.integers(1, 16), st.integers(1, most // 8)))
    # fewer tokens of many dims: the emulator multiplies one element after the other
    l_q, l_d = data.draw(lengths(8, 32, 64, 65, 128, 129, 200, 300)), data.draw(lengths(1, 48, 64, 65, 128, 300, 500))
    n_q, n_d, own = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4)), data.draw(st.booleans())
    while n_q > 1 and n_q * l_q > 500:
        n_q -= 1
    while n_d > 1 and n_q * l_q * n_d * l_d * dim > 2e7:
        n_d -= 1
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    q, d = problem((n_q, n_d, l_q, l_d, dim), own=own, dtype=dtype, seed=seed)
    q_mask, d_mask = keeps(data.draw, q.shape[:-1], seed), keeps(data.draw, d.shape[:-1], seed + 1)
    for x, keep in ((q, q_mask), (d, d_mask)):
        if keep is not None:
            x[~keep] = math.nan
    device(seed, multiprocessors, shared, data.draw(st.sampled_from([0, 4000])))
    assert_right(q, d, q_mask, d_mask, normalize=data.draw(st.booleans()), empty_score=-2.0)


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@many
@given(data=st.data())
def test_random_ragged_and_rerank(device, data):  # noqa: F811
    seed, multiprocessors, shared, most = data.draw(gpus(device.capability))
    dim = 8 * data.draw(st.one_of(st.integers(1, 16), st.integers(1, most // 8)))
    l_d = [data.draw(st.integers(0, 200)) for _ in range(data.draw(st.integers(1, 4)))]
    l_q = [data.draw(st.integers(1, 150)) for _ in range(data.draw(st.integers(1, 3)))]
    d = problem((1, 1, 1, sum(l_d), dim), dtype=torch.bfloat16, seed=seed)[1][0]
    q = problem((1, 1, sum(l_q), 1, dim), dtype=torch.bfloat16, seed=seed)[0][0]
    q_mask, d_mask = keeps(data.draw, q.shape[:-1], seed), keeps(data.draw, d.shape[:-1], seed + 1)
    normalize = data.draw(st.booleans())
    candidates = None
    if data.draw(st.booleans()):
        candidates = torch.tensor([[data.draw(st.integers(-1, len(l_d) - 1)) for _ in range(3)] for _ in l_q])
    offsets, q_offsets = torch.tensor([0, *l_d]).cumsum(0), torch.tensor([0, *l_q]).cumsum(0)
    n_c = len(l_d) if candidates is None else 3
    scores, argmax = torch.full((len(l_q), n_c), math.nan), torch.full((n_c, len(q)), -9, dtype=torch.int32)
    device(seed, multiprocessors, shared, data.draw(st.sampled_from([0, 4000])))
    forward(
        q, d, scores, argmax, q_mask=q_mask, d_mask=d_mask, q_offsets=q_offsets, d_offsets=offsets,
        candidates=candidates, normalize=normalize, empty_score=-2.0,
    )  # fmt: skip
    for i in range(len(l_q)):
        rows = slice(q_offsets[i], q_offsets[i + 1])
        for c in range(n_c):
            n = c if candidates is None else int(candidates[i, c])
            tokens = slice(0, 0) if n < 0 else slice(offsets[n], offsets[n + 1])
            kept = [None if x is None else x[part][None] for x, part in ((q_mask, rows), (d_mask, tokens))]
            truth, where = exact(
                q[rows][None], d[tokens][None], *kept, normalize=normalize, empty_score=-2.0, return_argmax=True
            )
            torch.testing.assert_close(scores[i, c].double(), truth[0, 0], rtol=1e-5, atol=1e-4)
            assert torch.equal(argmax[c, rows], where[0, 0])


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
def test_ragged_documents_and_queries(device, normalize):  # noqa: F811
    generator = torch.Generator().manual_seed(0)
    lengths, dim = (5, 0, 130, 1, 64, 200), 48
    documents = [torch.randn(n, dim, generator=generator).bfloat16() for n in lengths]
    queries = [torch.randn(n, dim, generator=generator).bfloat16() for n in (7, 150, 1, 33)]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q_offsets = torch.tensor([0, *map(len, queries)]).cumsum(0)
    tokens, flat = torch.cat(documents), torch.cat(queries)
    keep = [torch.rand(len(x), generator=generator) < 0.8 for x in documents]
    q_keep = [torch.rand(len(x), generator=generator) < 0.8 for x in queries]
    candidates = torch.tensor([[4, -1, 0], [2, 1, 2], [5, 5, -1], [3, 2, 99]])

    def truth(q, d, q_mask, d_mask):
        q, d = (x.double().unsqueeze(0) for x in (q, d))
        return exact(q, d, q_mask[None], d_mask[None], normalize=normalize, return_argmax=True)

    for seed in SEEDS:
        device(seed)
        for picked in (None, candidates):
            n_c = 3 if picked is not None else len(documents)
            scores = torch.full((4, n_c), math.nan)
            argmax = torch.full((n_c, len(flat)), -99, dtype=torch.int32)
            forward(
                flat, tokens, scores, argmax, q_mask=torch.cat(q_keep), d_mask=torch.cat(keep), q_offsets=q_offsets,
                d_offsets=offsets, candidates=picked, normalize=normalize, empty_score=-7.0,
            )  # fmt: skip
            for i, query in enumerate(queries):
                best = argmax[:, q_offsets[i] : q_offsets[i + 1]]
                for c in range(n_c):
                    n = c if picked is None else int(picked[i, c])
                    if n >= len(documents):
                        assert scores[i, c].isnan() and (best[c] == -1).all()
                        continue
                    if n < 0 or not keep[n].any():
                        assert scores[i, c] == (-7.0 if q_keep[i].any() else 0) and (best[c] == -1).all()
                        continue
                    score, where = truth(query, documents[n], q_keep[i], keep[n])
                    torch.testing.assert_close(scores[i, c].double(), score[0, 0], rtol=1e-5, atol=1e-4)
                    assert torch.equal(best[c], where[0, 0])


@pytest.mark.parametrize("picked", [False, True], ids=["all", "candidates"])
def test_more_ragged_documents_than_a_warp_has_lanes(device, picked):  # noqa: F811
    lengths = torch.randint(0, 9, (75,), generator=torch.Generator().manual_seed(0))
    q, d = problem((2, 1, 5, int(lengths.sum()), 16), dtype=torch.bfloat16)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    candidates = torch.stack([torch.arange(75).flip(0), torch.arange(75).roll(9)]) if picked else None
    scores, none = torch.full((2, 75), math.nan), torch.empty(0, dtype=torch.int32)
    device(1, 1)
    forward(q, d[0], scores, none, d_offsets=offsets, candidates=candidates, empty_score=-1.0)
    for c in range(75):
        for i in range(2):
            n = c if candidates is None else int(candidates[i, c])
            one = d[:, offsets[n] : offsets[n + 1]]
            truth = exact(q[i : i + 1], one)[0, 0] if one.shape[1] else torch.tensor(-1.0).double()
            torch.testing.assert_close(scores[i, c].double(), truth, rtol=1e-5, atol=1e-4)


def test_invalid_offsets_stay_inside_the_tokens(device):  # noqa: F811
    q, d = torch.ones(1, 5, 32).bfloat16(), torch.ones(40, 32).bfloat16()
    scores, argmax = torch.full((1, 3), math.nan), torch.empty(0, dtype=torch.int32)
    invalid = torch.tensor([0, 30, 20, 10**9])
    keep = torch.ones(40, dtype=torch.bool)
    for d_mask in (None, keep):
        forward(q, d, scores, argmax, d_mask=d_mask, d_offsets=invalid, normalize=True, empty_score=-1.0)
        torch.testing.assert_close(scores, torch.tensor([[5.0, -1.0, 5.0]]))
