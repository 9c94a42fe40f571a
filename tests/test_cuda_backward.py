"""The gradient's CUDA kernels, their own sources in the emulator: against float64, bit for bit the same in every order of
threads.

LATEMAX_EMULATED_EXAMPLES sets the number of random problems; more than the default draws new ones.
"""

import math
import os

import pytest
import torch
from common import assert_exact, problem, run_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_emulated import emulator

from latemax.ops import tiles
from latemax.ops.backends import cuda, gather, reference
from latemax.ops.problem import Batch, Needs, Side

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())
EXAMPLES = int(os.environ.get("LATEMAX_EMULATED_EXAMPLES", "0"))


@pytest.fixture(scope="module")
def device():
    """Sets the emulated GPU and the order of its threads."""
    module, configure = emulator.built()
    replaced = pytest.MonkeyPatch()
    replaced.setattr(cuda, "_cuda", module)
    replaced.setattr(cuda, "_stream", lambda device: 0)
    yield lambda seed, multiprocessors=3, shared=tiles.SHARED_MEMORY[90]: configure(seed, 90, multiprocessors, shared)
    replaced.undo()


def run(g, q, d, argmax, **options):
    grads = run_backward(cuda, g, q, d, argmax, needs_q=True, needs_d=True, launch=cuda.Launch(), **options)
    assert all(grad.is_contiguous() and grad.dtype == x.dtype for grad, x in zip(grads, (q, d), strict=True))
    return grads


def assert_right(g, q, d, argmax, **options):
    """Within the tolerance rule of float64; exactly 0 for a token that is no argmax."""
    normalize = options.get("normalize", False)
    b = Batch(Side(q), Side(d, None, options.get("d_offsets")), options.get("candidates"), normalize)
    wide = b._replace(q=Side(q.double()), d=b.d._replace(tokens=d.double()))
    ours = run(g, q, d, argmax, **options)
    truth = gather.ragged(wide, argmax, g.double(), Needs(True, True))
    plain = gather.ragged(b, argmax, g, Needs(True, True))
    for a, t, p in zip(ours, truth, plain, strict=True):
        assert_exact(a, t, p)
        assert (a[(t == 0).all(-1)] == 0).all()
    return ours


def random_argmax(shape, l_d, kind, seed=0):
    """int32 argmax: anywhere, all on one token, on few tokens, or with masked query tokens."""
    generator = torch.Generator().manual_seed(seed)
    argmax = torch.randint(0, max(1, l_d), shape, generator=generator, dtype=torch.int32)
    if kind == "one":
        argmax.fill_(l_d - 1)
    if kind == "few":
        argmax = torch.where(torch.rand(shape, generator=generator) < 0.7, l_d // 2, argmax).to(torch.int32)
    if kind == "masked":
        argmax[torch.rand(shape, generator=generator) < 0.4] = -1
    return argmax if l_d else torch.full(shape, -1, dtype=torch.int32)


def gradient(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


KINDS = ("anywhere", "one", "few", "masked")
# (n_q, n_d, l_q, l_d, dim): each number of elements in a lane, parts of a document, splits of grad_q
SHAPES = [(1, 1, 1, 1, 8), (3, 2, 20, 40, 128), (2, 40, 7, 9, 64), (4, 1, 33, 600, 136), (2, 2, 70, 50, 320), (1, 3, 9, 30, 704)]


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(device, shape, own, normalize):
    n_q, n_d, l_q, l_d, dim = shape
    for seed, kind in enumerate(KINDS):
        q, d = problem(shape, own=own, dtype=(torch.bfloat16, torch.float16)[seed % 2], seed=seed)
        argmax, g = random_argmax((n_q, n_d, l_q), l_d, kind), gradient(n_q, n_d)
        device(1 + seed)
        ours = assert_right(g, q, d, argmax, normalize=normalize)
        device(0)
        for a, b in zip(run(g, q, d, argmax, normalize=normalize), ours, strict=True):
            assert torch.equal(a, b)
