"""The gradient's CUDA kernels, their own sources in the emulator: against float64, and bit for bit the same in every
order of threads.

LATEMAX_EMULATED_EXAMPLES sets the number of random problems; more than the default draws new ones.
"""

import math
import os
import subprocess

import pytest
import torch
from common import assert_exact, problem, run_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_emulated import emulator

import latemax
from latemax.ops import dispatch, tiles
from latemax.ops.backends import cuda, gather, triton
from latemax.ops.backends.base import Status
from latemax.ops.problem import Batch, Gradients, Needs, Plan, Side

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())
EXAMPLES = int(os.environ.get("LATEMAX_EMULATED_EXAMPLES", "0"))


@pytest.fixture(scope="module")
def device():
    """Sets the emulated GPU and the order of its threads."""
    module, configure = emulator.built()
    replaced = pytest.MonkeyPatch()
    replaced.setattr(cuda, "_cuda", module)
    replaced.setattr(cuda, "_stream", lambda device: 0)

    def seed(number, multiprocessors=3, shared=tiles.SHARED_MEMORY[90]):
        configure(number, 90, multiprocessors, shared, 0)

    yield seed
    replaced.undo()


GUARD = 512  # rows


def run(g, q, d, argmax, **options):
    """The gradients, in memory that held NaN, between rows that the kernels leave as they were."""
    buffers = []

    def guarded(x, **_):
        """``empty_like``"""
        rows = x.numel() // x.shape[-1]
        buffers.append((x.new_full((GUARD + rows + GUARD, x.shape[-1]), math.nan), rows))
        return buffers[-1][0][GUARD : GUARD + rows].view(x.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", guarded)
        grads = run_backward(cuda, g, q, d, argmax, needs_q=True, needs_d=True, launch=cuda.Launch(), **options)
    assert all(grad.is_contiguous() and grad.dtype == x.dtype for grad, x in zip(grads, (q, d), strict=True))
    for buffer, rows in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[GUARD + rows :].isnan().all()
    return grads


def assert_right(g, q, d, argmax, **options):
    """Within the tolerance rule of float64; exactly 0 for a token that is no argmax."""
    normalize = options.get("normalize", False)
    b = Batch(Side(q), Side(d, None, options.get("d_offsets")), options.get("candidates"), normalize)
    wide = b._replace(q=Side(q.double()), d=b.d._replace(tokens=d.double()))
    ours = run(g, q, d, argmax, **options)
    truth = gather.ragged(wide, argmax, g.double(), Needs(True, True))[:2]
    plain = gather.ragged(b, argmax, g, Needs(True, True))[:2]
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
SHAPES = [
    (1, 1, 1, 1, 8), (3, 2, 20, 40, 128), (2, 40, 3, 9, 64), (2, 1, 33, 600, 136), (2, 2, 20, 50, 320),
    (1, 3, 9, 30, 704), (2, 2, 20, 601, 64),  # 601: the last part has one token fewer
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(device, shape):
    n_q, n_d, l_q, l_d, _ = shape
    for seed, kind in enumerate(KINDS):
        own, normalize = seed % 2 == 0, seed > 1
        q, d = problem(shape, own=own, dtype=(torch.bfloat16, torch.float16)[seed % 2], seed=seed)
        argmax, g = random_argmax((n_q, n_d, l_q), l_d, kind), gradient(n_q, n_d)
        device(1 + seed)
        ours = assert_right(g, q, d, argmax, normalize=normalize)
        device(0)
        for a, b in zip(run(g, q, d, argmax, normalize=normalize), ours, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shared", [232448, 60000])
def test_more_entries_than_a_batch(device, shared):
    """33,000 query tokens: three batches, whose sums last in shared memory. The second GPU has little: two blocks."""
    q, d = problem((330, 1, 100, 140, 64), dtype=torch.bfloat16)
    argmax, g = random_argmax((330, 1, 100), 140, "few"), gradient(330, 1)
    argmax[::3, :, ::2] = -1
    device(2, 1, shared)
    grad_q, grad_d = run_backward(
        cuda, g, q, d, argmax, needs_q=False, needs_d=True, launch=cuda.Launch(), normalize=True
    )
    assert grad_q is None
    b, needs = Batch(Side(q), Side(d), None, True), Needs(False, True)
    wide = b._replace(q=Side(q.double()), d=Side(d.double()))
    assert_exact(grad_d, gather.ragged(wide, argmax, g.double(), needs).d, gather.ragged(b, argmax, g, needs).d)


def test_a_gradient_stays_with_its_own_tokens(device):
    """NaN and infinity, in tokens that are no argmax, in masked query tokens and in the gradient."""
    device(1)
    q, d = problem((2, 3, 5, 20, 16), dtype=torch.bfloat16)
    # the first rows too: entries that fill up a group of 32 are read there
    argmax = 1 + random_argmax((2, 3, 5), 9, "anywhere")
    argmax[0, :, 0] = -1
    q[0, 0], d[:, 10:], d[:, 0] = math.nan, math.inf, math.nan
    g = gradient(2, 3)
    for normalize in (False, True):
        grad_q, grad_d = run(g, q, d, argmax, normalize=normalize)
        assert grad_q.isfinite().all() and grad_d.isfinite().all()
        assert (grad_q[0, 0] == 0).all() and (grad_d[:, 10:] == 0).all() and (grad_d[:, 0] == 0).all()
    g[1, 2] = math.nan
    grad_q, grad_d = run(g, q, d, argmax)
    assert grad_q[0].isfinite().all() and grad_q[1].isnan().all()
    hit = torch.zeros(3, 20, dtype=torch.bool)
    hit[2, argmax[1, 2].long()] = True
    assert grad_d[hit].isnan().all() and grad_d[~hit].isfinite().all()


def test_a_clamped_norm_is_a_constant(device):
    device(1)
    q, d = problem((2, 2, 5, 20, 32), dtype=torch.bfloat16)
    q *= 1e-13  # norms of about 0.6e-12
    d *= 1e-13
    assert_right(gradient(2, 2), q, d, random_argmax((2, 2, 5), 20, "few"), normalize=True)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8), (2, 0, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8)], ids=str)
def test_nothing_to_sum(device, shape):
    n_q, n_d, l_q, _, _ = shape
    q, d = problem(shape, dtype=torch.bfloat16)
    argmax = torch.full((n_q, n_d, l_q), -1, dtype=torch.int32)
    for grad in run(gradient(n_q, n_d), q, d.expand(n_q, *d.shape), argmax):
        assert (grad == 0).all()


def test_strided_tokens_and_gradients(device):
    device(1)
    q, d = problem((4, 3, 6, 30, 32), dtype=torch.float16)
    argmax = random_argmax((4, 3, 6), 30, "anywhere")
    expanded = torch.tensor(0.5).expand(4, 3)
    wide = torch.zeros(4, 6, 48, dtype=q.dtype)
    wide[..., 8:40] = q
    for a, b, g in (
        (q, d, expanded),
        (wide[..., 8:40], d.flip(1).flip(1), gradient(3, 4).T),
        (q[..., :8], d[..., :8], gradient(4, 3)),
    ):
        assert_right(g, a, b, argmax)


def test_rerank_through_the_public_call(device, monkeypatch):
    """Queries that name the same documents, one of them twice."""
    device(1)
    monkeypatch.setattr(cuda, "status", lambda: Status(True, "emulated"))
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    dispatch.plan_for.cache_clear()
    q, d = problem((3, 1, 9, 120, 32), dtype=torch.bfloat16)
    offsets, candidates = torch.tensor([0, 40, 40, 100, 120]), torch.tensor([[2, 0, 2], [3, 2, -1], [1, 0, 3]])
    grads = {}
    for backend in ("cuda", "reference"):
        a, b = q.clone().requires_grad_(), d[0].clone().requires_grad_()
        scores = latemax.rerank(a, b, offsets, candidates, empty_score=0.0, backend=backend)
        scores.square().sum().backward()
        grads[backend] = a.grad, b.grad
    dispatch.plan_for.cache_clear()
    for ours, theirs in zip(grads["cuda"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_whose_kernels_compute_the_gradient(monkeypatch):
    """By name the CUDA kernels wherever they can; under auto only where they are predicted to be faster."""
    q, d = problem((2, 2, 4, 100, 16), dtype=torch.bfloat16)
    offsets = torch.tensor([0, 4, 8])
    batch = Batch(Side(q), Side(d))
    ragged = batch._replace(q=Side(q.view(8, 16), None, offsets))
    named = batch._replace(
        d=Side(d.view(200, 16), None, torch.tensor([0, 20, 30, 40])), candidates=torch.zeros(2, 2).long()
    )
    wide = batch._replace(q=Side(q.repeat(1, 1, 65)), d=Side(d.repeat(1, 1, 65)))
    for b, by_name, auto in (
        (batch, "", ""),
        (batch._replace(d=Side(d[:, :95])), "", "short documents"),
        (batch._replace(d=Side(d.view(200, 16), None, offsets)), "", ""),
        (batch._replace(d=Side(d.view(200, 16), None, torch.arange(5))), "", "short documents"),
        (named, "", "short documents"),
        (named._replace(d=named.d._replace(offsets=torch.tensor([0, 100, 200]))), "", ""),
        (ragged, "queries of one length", "queries of one length"),
        (wide, "up to 1024 dims", "up to 1024 dims"),
    ):
        for reason, asked in ((by_name, True), (auto, False)):
            found = cuda.no_gradient(b, asked)
            assert reason in found and bool(reason) == bool(found)
    ran = Gradients(q, d)
    monkeypatch.setattr(triton, "backward", lambda *args: ran)
    needs = Needs(True, True)
    assert cuda.backward(ragged, Plan("cuda", "", launch=cuda.Launch()), offsets, offsets, needs) is ran


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@settings(max_examples=EXAMPLES or 25, deadline=None, derandomize=not EXAMPLES, database=None)
@given(data=st.data())
def test_random(device, data):
    """Dense, ragged and named documents: empty, named by no query or by several, duplicates, wrong names."""
    draw = data.draw
    seed, form = draw(st.integers(0, 999)), draw(st.sampled_from(["shared", "own", "ragged", "named"]))
    n_q, n_d, l_q = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.sampled_from([1, 7, 32, 33, 70]))
    dim = draw(st.sampled_from([8, 64, 96, 128, 136, 264, 704]))
    options = {"normalize": draw(st.booleans())}
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from([torch.bfloat16, torch.float16]))
    if form in ("shared", "own"):
        l_d = draw(st.sampled_from([1, 31, 33, 90, 330]))
        q, d = problem((n_q, n_d, l_q, l_d, dim), own=form == "own", dtype=dtype, seed=seed)
        argmax = random_argmax((n_q, n_d, l_q), l_d, kind, seed)
    else:
        lengths = draw(st.lists(st.sampled_from([0, 1, 40, 64, 150]), min_size=n_d, max_size=n_d))
        after = draw(st.sampled_from([1, 50]))  # rows that belong to no document
        q, d = problem((n_q, 1, l_q, sum(lengths) + after, dim), dtype=dtype, seed=seed)
        d = d[0]
        options["d_offsets"] = torch.tensor([0, *lengths]).cumsum(0)
        names = torch.arange(n_d).expand(n_q, -1)
        if form == "named":
            names = torch.tensor([[draw(st.integers(-1, n_d)) for _ in range(4)] for _ in range(n_q)])
            options["candidates"] = names
        valid = torch.tensor([*lengths, 0])  # name n_d, which does not exist, and -1, an empty slot, have no tokens
        argmax = torch.stack([
            torch.stack([random_argmax((l_q,), int(valid[n]), kind, seed + i) for i, n in enumerate(row)])
            for row in names
        ])  # fmt: skip
    g = gradient(*argmax.shape[:2], seed=seed)
    multiprocessors = draw(st.integers(1, 9))
    device(seed, multiprocessors, draw(st.sampled_from([101376, 232448])))
    ours = assert_right(g, q, d, argmax, **options)
    device(seed + 1, multiprocessors)
    for a, b in zip(run(g, q, d, argmax, **options), ours, strict=True):
        assert torch.equal(a, b)


def test_the_driver_without_torch(device):
    driver = emulator.program(emulator.HERE.parent / "native" / "cuda_driver.cpp")
    for case in (240, 246, 251, 255, 259, 262, 270, 279, 284, 290):
        done = subprocess.run([driver, "90", "case", str(case)], capture_output=True, text=True)
        assert done.returncode == 0, f"case {case}: {done.stdout}"
