"""The CUDA kernels' own sources, run without a GPU: tests/cuda_emulator compiles them with g++ and plays the tensor
cores, copies, barriers and threads, the last in several random orders. benchmarks/GPU_PENDING.md lists what it cannot
show.
"""

import importlib.util
import math
import subprocess
from pathlib import Path

import pytest
import torch
from common import assert_argmax, assert_exact, exact, masks, plain_torch, problem, run_forward

import latemax
from latemax.ops import dispatch, tiles
from latemax.ops.backends import cuda, triton
from latemax.ops.backends.base import Status

HERE = Path(__file__).parent / "cuda_emulator"
spec = importlib.util.spec_from_file_location("cuda_emulator_build", HERE / "build.py")
emulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulator)

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())
CAPABILITIES = [pytest.param(80, id="sm_80"), pytest.param(90, id="sm_90a")]
# 0: one fixed order, copies land at once; 1: random order, copies land as late as they can; 2: at random moments
SEEDS = (0, 1, 2)
SHAPES = [
    pytest.param((1, 1, 1, 1, 8), id="ones"),
    pytest.param((1, 3, 5, 17, 16), id="short"),
    pytest.param((3, 2, 15, 33, 96), id="dim96"),
    pytest.param((2, 3, 17, 196, 128), id="patches"),
    pytest.param((9, 4, 8, 65, 64), id="packed"),
    pytest.param((5, 7, 96, 70, 72), id="slots"),
    pytest.param((3, 2, 140, 70, 48), id="chunks"),
    pytest.param((2, 2, 513, 33, 40), id="513"),
    pytest.param((1, 1, 1030, 130, 16), id="1030-tokens"),
    pytest.param((1, 2, 3, 1030, 24), id="1030-patches"),
    pytest.param((2, 1, 33, 90, 256), id="dim256"),
    pytest.param((3, 2, 40, 64, 200), id="dim200"),
    pytest.param((1, 2, 20, 128, 320), id="dim320"),
]


@pytest.fixture(params=CAPABILITIES, scope="module")
def device(request):
    """Sets the emulated GPU; returns a function that sets the order of threads."""
    module, configure = emulator.built()
    replaced = pytest.MonkeyPatch()
    replaced.setattr(cuda, "_cuda", module)
    replaced.setattr(cuda, "_stream", lambda device: 0)
    request.addfinalizer(replaced.undo)

    def seed(number, multiprocessors=3, shared=tiles.SHARED_MEMORY[request.param], launch_clocks=0):
        """launch_clocks: what a document cut between thread blocks must save; 0: every document that can be is cut."""
        configure(number, request.param, multiprocessors, shared, launch_clocks)

    seed.capability = request.param
    return seed


@pytest.fixture(autouse=True)
def first_order(device):
    device(1)


def forward(q, d, scores, argmax, **options):
    run_forward(cuda, q, d, scores, argmax, launch=cuda.Launch(), **options)


def run(q, d, q_mask=None, d_mask=None, *, argmax=False, normalize=False, empty_score=-math.inf):
    n_q, n_d = len(q), d.shape[-3]
    scores = torch.full((n_q, n_d), math.nan)
    where = torch.full((n_q, n_d, q.shape[1]) if argmax else (0,), -99, dtype=torch.int32)
    forward(q, d, scores, where, q_mask=q_mask, d_mask=d_mask, normalize=normalize, empty_score=empty_score)
    return (scores, where) if argmax else scores


def assert_right(q, d, q_mask=None, d_mask=None, **options):
    """Scores within the tolerance rule, bit for bit the same with and without argmax, and the argmax right."""
    scores, argmax = run(q, d, q_mask, d_mask, argmax=True, **options)
    assert torch.equal(run(q, d, q_mask, d_mask, **options), scores)
    clean = [x if keep is None else x.masked_fill(~keep[..., None], 0) for x, keep in ((q, q_mask), (d, d_mask))]
    truth = exact(*clean, q_mask, d_mask, **options)
    if q_mask is None and d_mask is None:
        assert_exact(scores, truth, plain_torch(q, d, options.get("normalize", False)))
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=1e-4)
    assert_argmax(argmax, *clean, q_mask, d_mask, options.get("normalize", False))
    return scores


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(device, shape, own):
    for seed in (1,) if own else SEEDS:
        device(seed)
        assert_right(*problem(shape, own=own, dtype=(torch.bfloat16, torch.float16)[seed % 2]))


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("shape", [(3, 4, 20, 70, 96), (2, 3, 140, 129, 64), (5, 2, 7, 200, 136)], ids=str)
def test_masks_with_poison_under_them(device, shape, own, normalize):
    for seed in SEEDS:
        device(seed)
        q, d = problem(shape, own=own, dtype=torch.bfloat16)
        q_mask, d_mask = masks(q, d)
        d_mask[..., 1, :] = False
        q_mask[1] = False
        q[~q_mask], d[~d_mask] = math.nan, math.inf
        for sides in ((q_mask, None), (None, d_mask), (q_mask, d_mask)):
            a = q if sides[0] is not None else q.masked_fill(~q_mask[..., None], 0.5)
            b = d if sides[1] is not None else d.masked_fill(~d_mask[..., None], 0.5)
            assert_right(a, b, *sides, normalize=normalize, empty_score=-3.0)


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 16])
@pytest.mark.parametrize("shape", [(7, 9, 100, 20, 16), (3, 1, 300, 20, 16), (40, 3, 70, 9, 8)], ids=str)
def test_every_pair_is_scored_once_on_any_number_of_multiprocessors(device, shape, multiprocessors):
    for own in (False, True):
        q, d = problem(shape, own=own, dtype=torch.bfloat16)
        device(3, multiprocessors)
        scores = run(q, d)
        torch.testing.assert_close(scores.double(), exact(q, d), rtol=1e-5, atol=1e-4)
        device(0, 2)
        assert torch.equal(run(q, d), scores)


@pytest.mark.parametrize(
    ("shape", "own", "multiprocessors"),
    [((1, 1, 300, 700, 16), False, 16), ((1, 5, 20, 330, 16), False, 13), ((3, 3, 70, 200, 136), True, 7)],
    ids=str,
)
def test_documents_cut_between_thread_blocks(device, shape, own, multiprocessors):
    """Maxima of the pieces are merged to the same bits, the first of equals still is the argmax, and NaN stays."""
    q, d = problem(shape, own=own, dtype=torch.bfloat16)
    d[..., -70:, :] = d[..., :70, :]
    d[..., -1, 65, 3] = math.nan
    for normalize in (False, True):
        device(2, multiprocessors, launch_clocks=2**30)
        scores, argmax = run(q, d, argmax=True, normalize=normalize)
        products = emulator.products()
        for seed in (0, 1, 2):
            device(seed, multiprocessors)
            cut, where = run(q, d, argmax=True, normalize=normalize)
            assert emulator.products() == products
            torch.testing.assert_close(cut, scores, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(where, argmax)
            assert run(q, d, normalize=normalize)[:, :-1].equal(scores[:, :-1])


def test_a_score_depends_neither_on_padding_nor_on_batch_mates(device):
    for l_q in (12, 150):
        q, d = problem((3, 5, l_q, 70, 64), dtype=torch.bfloat16)
        scores = run(q, d)
        padded = torch.full((5, 200, 64), torch.nan, dtype=d.dtype)
        padded[:, :70] = d
        keep = torch.arange(200).expand(5, -1) < 70
        assert torch.equal(run(q, padded, None, keep), scores)
        assert torch.equal(run(q[1:2], d[3:4]), scores[1:2, 3:4])


# query tokens on both sides of each block size, dims that leave few stages, and more tiles than stages
RINGS = [
    (5, 3, 40, 200, 576), (1, 2, 100, 200, 640), (1, 2, 100, 200, 704), (4, 2, 128, 200, 640), (1, 2, 100, 500, 320),
    (1, 1, 100, 1500, 128), (3, 1, 20, 300, 192), (2, 1, 200, 300, 256), (1, 2, 20, 300, 512), (2, 1, 40, 200, 384),
    # a second warpgroup without query tokens
    (5, 2, 64, 130, 192), (3, 2, 64, 130, 576),
]  # fmt: skip


@pytest.mark.parametrize("shape", RINGS, ids=str)
def test_every_ring_the_planner_makes(device, shape):
    for seed in (1, 2):
        device(seed)
        assert_right(*problem(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(12, 2, 60, 300, 576), (4, 2, 100, 500, 256)], ids=str)
def test_every_ring_of_own_candidates(device, shape):
    device(2)
    assert_right(*problem(shape, own=True, dtype=torch.bfloat16))


def test_kernels_are_loaded_once_and_before_the_first_launch(device):
    """The emulator refuses to launch a kernel that was not loaded, and to set its attributes twice."""
    for dim in (64, 96, 128, 136):
        for n_q in (1, 3):
            assert_right(*problem((n_q, 2, 100, 70, dim), dtype=torch.bfloat16))


def test_a_driver_older_than_the_runtime_is_named(device, monkeypatch):
    class Old:
        @staticmethod
        def versions():
            return 12040, 13000

    monkeypatch.setattr(cuda, "_cuda", Old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    usable, why = cuda.status.__wrapped__()
    assert not usable and "built with CUDA 13.0, which the driver (CUDA 12.4) is too old for" in why


def misaligned(x):
    """A contiguous copy of x, two bytes after a multiple of 16."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def test_strides(device):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 5, 70, 96, generator=generator).bfloat16()
    q = torch.randn(4, 20, 96, generator=generator).bfloat16()
    cases = {
        "sliced dims": (q[..., 8:72], wide[0, ..., 8:72]),
        "unaligned": (q[..., 1:65], wide[0, ..., 3:67]),
        "transposed": (q.transpose(0, 1), wide[0].transpose(0, 1)),
        "own, transposed": (q, wide.transpose(1, 2).contiguous().transpose(1, 2)),
        "every second": (q[::2, ::2], wide[0, ::2, 1::3]),
        "dims not last": (q, wide[0].mT.contiguous().mT),
        "expanded documents": (q, wide[0, :1].expand(3, -1, -1)),
        "expanded candidates": (q, wide[:1].expand(4, -1, -1, -1)),
        "expanded queries": (q[:1].expand(3, -1, -1), wide[0]),
        "contiguous but misaligned": (misaligned(q), misaligned(wide[0])),
        "sliding tokens": (q[..., :64], wide[0, 0].flatten().as_strided((3, 40, 64), (2000, 32, 1))),
        "expanded tokens": (q[:, :1].expand(-1, 9, -1), wide[0, :, :1].expand(-1, 7, -1)),
    }
    for name, (a, b) in cases.items():
        keep = torch.rand(b.shape[-2::-1], generator=generator).permute(*reversed(range(b.dim() - 1))) < 0.7
        try:
            assert_right(a, b)
            assert_right(a, b, None, keep)
        except AssertionError as error:
            raise AssertionError(name) from error


def test_ties_nan_and_infinities(device):
    q, d = problem((2, 3, 20, 200, 32), dtype=torch.float16)
    d[0, 10:] = d[0, :10].repeat(19, 1)
    _, argmax = run(q, d, argmax=True)
    assert argmax[:, 0].max() < 10
    same = d[:1].clone()
    same[:] = d[0, 0]
    assert (run(q, same, argmax=True)[1] == 0).all()

    for value in (math.nan, math.inf, -math.inf):
        x = d.clone()
        x[1, 77, 3] = value
        x[2, 190, :] = value
        scores, argmax = run(q, x, argmax=True)
        truth, where = exact(q, x, return_argmax=True)
        torch.testing.assert_close(scores.double(), truth, equal_nan=True, rtol=1e-5, atol=1e-4)
        if value != value:
            assert scores[:, 1:].isnan().all() and not scores[:, 0].isnan().any()
            assert (argmax[:, 1] == 77).all() and (argmax[:, 2] == 190).all()
        assert torch.equal(argmax[:, 1:], where[:, 1:])
    # nothing is greater than -inf: the argmax is the first valid token
    low = torch.full((1, 200, 32), -math.inf, dtype=torch.float16)
    keep = torch.ones(1, 200, dtype=torch.bool)
    keep[0, :5] = False
    scores, argmax = run(q.abs(), low, None, keep, argmax=True)
    assert (scores == -math.inf).all() and (argmax == 5).all()


def test_nothing_to_score(device):
    q, d = problem((2, 3, 20, 40, 32), dtype=torch.bfloat16)
    assert run(q, d[:0]).shape == (2, 0)
    scores, argmax = run(q, d[:, :0], argmax=True, empty_score=-2.0)
    assert (scores == -2).all() and (argmax == -1).all()
    # what torch gives as the address of a tensor without elements, on any device
    assert d[:, :0].clone().data_ptr() == 0
    assert (run(q, d[:, :0].clone(), empty_score=-2.0) == -2).all()
    # a mask without elements leaves the lengths of documents unwritten
    scores, none = torch.full((2, 2), math.nan), torch.empty(0, dtype=torch.int32)
    empty = torch.empty(0, dtype=torch.bool)
    forward(
        q, d[0, :0].clone(), scores, none, d_mask=empty, d_offsets=torch.zeros(3, dtype=torch.int64), empty_score=-2.0
    )
    assert (scores == -2).all()
    keep = torch.zeros(2, 20, dtype=torch.bool)
    assert (run(q, d[:, :0], keep, empty_score=-2.0) == 0).all()


@pytest.mark.parametrize("shared", [101376, 166912, 232448])
def test_the_widest_dim_that_python_lets_through_fits(device, shared, monkeypatch):
    device(1, shared=shared)
    monkeypatch.setitem(tiles.SHARED_MEMORY, device.capability, shared)
    dim = cuda.most_dims(device.capability)
    for n_q, l_q in ((1, 20), (4, 128)):
        assert_right(*problem((n_q, 1, l_q, 9, dim), dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="more shared memory than this GPU has"):
        run(*problem((4, 1, 128, 9, 2 * dim), dtype=torch.bfloat16))


@pytest.fixture
def chosen(device, monkeypatch):
    """The public calls take the emulated GPU for one."""
    monkeypatch.setattr(cuda, "status", lambda: Status(True, "emulated"))
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "capability", lambda d: device.capability)
    monkeypatch.setattr(triton, "capability", lambda d: device.capability)
    dispatch.plan_for.cache_clear()
    yield
    dispatch.plan_for.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="backward is Triton's")
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
def test_ragged_queries_and_candidates_through_the_public_calls(chosen, normalize):
    generator = torch.Generator().manual_seed(0)
    q, d = (torch.randn(n, 24, generator=generator).bfloat16() for n in (131, 240))
    q_offsets, d_offsets = torch.tensor([0, 7, 7, 127, 130]), torch.tensor([0, 40, 41, 41, 170, 235])
    candidates = torch.tensor([3, 0, -1, 4, 2])
    ran = {}
    for backend in ("cuda", "reference"):
        a, b = q.clone().requires_grad_(), d.clone().requires_grad_()
        options = dict(normalize=normalize, return_argmax=True, backend=backend, empty_score=-1.0)
        scores, argmax = latemax.maxsim_varlen(a, b, q_offsets, d_offsets, **options)
        some, where = latemax.rerank(a[7:127], b, d_offsets, candidates, **options)
        (scores.square().sum() + some.square().sum()).backward()
        ran[backend] = scores, some, argmax, where, a.grad, b.grad
    for ours, theirs in zip(ran["cuda"][:2], ran["reference"][:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(ran["cuda"][2:4], ran["reference"][2:4], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(ran["cuda"][4:], ran["reference"][4:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="backward is Triton's")
def test_through_the_public_call_with_gradients(chosen):
    for shape, normalize in (((2, 3, 7, 40, 16), False), ((3, 3, 20, 33, 24), True)):
        q, d = problem(shape, dtype=torch.bfloat16)
        q_mask, d_mask = masks(q, d)
        ran, grads = {}, {}
        for backend in ("cuda", "reference"):
            a, b = q.clone().requires_grad_(), d.clone().requires_grad_()
            assert latemax.explain(a, b, backend=backend).backend == backend
            scores, argmax = latemax.maxsim(
                a, b, q_mask, d_mask, normalize=normalize, return_argmax=True, backend=backend
            )
            scores.square().sum().backward()
            ran[backend], grads[backend] = (scores.detach(), argmax), (a.grad, b.grad)
        torch.testing.assert_close(ran["cuda"][0], ran["reference"][0], rtol=1e-5, atol=1e-4)
        assert torch.equal(ran["cuda"][1], ran["reference"][1])
        for ours, theirs in zip(grads["cuda"], grads["reference"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        pairs = latemax.maxsim_pairs(q[:2], d[:2], normalize=normalize, backend="cuda")
        torch.testing.assert_close(pairs, latemax.maxsim(q[:2], d[:2], normalize=normalize).diagonal())
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run: .* dim must be a multiple of 8"):
        latemax.maxsim(q[..., :9], d[..., :9], backend="cuda")


def test_the_driver_without_torch(device):
    """tests/native/cuda_driver.cpp is the first program that runs on a GPU."""
    driver = emulator.program(HERE.parent / "native" / "cuda_driver.cpp")
    for case in (*range(0, 240, 19), *range(291, 351, 13)):
        done = subprocess.run([driver, str(device.capability), "case", str(case)], capture_output=True, text=True)
        assert done.returncode == 0, f"case {case}: {done.stdout}"
