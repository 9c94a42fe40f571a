"""The CUDA kernels' own sources in the emulator, over random problems, GPUs and orders of threads and copies.

LATEMAX_EMULATED_EXAMPLES sets the number of problems of each test and kernel; more than the default draws new ones.
"""

import math
import os

import pytest
import torch
from common import exact, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_emulated import assert_right, device, emulator, forward  # noqa: F401

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
