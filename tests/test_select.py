"""The choice of backend and tile: pure, explained, and never a silent fallback."""

import itertools
import types

import pytest
import torch
from common import GPU, TRITON_DEVICE, batch, problem

import latemax
from latemax.arguments.check import BACKENDS
from latemax.ops import dispatch, tiles
from latemax.ops.backends import cuda, native, triton
from latemax.ops.backends.base import Status
from latemax.ops.problem import Problem

SMALL = Problem(
    device=torch.device("cpu"), q_dtype=torch.bfloat16, d_dtype=torch.bfloat16, matmul_precision="highest", dim=128,
    n_q=1, l_q=32, q_ragged=False, own=False, candidates=False, normalize=False, argmax=False,
)  # fmt: skip


def test_explain_on_the_cpu():
    q, d = problem((2, 3, 4, 9, 16))
    choice = latemax.explain(q, d)
    assert choice.backend == "cpu" and choice.tile is None and "on the CPU" in choice.why
    assert latemax.explain(q, d, backend="reference").backend == "reference"
    assert "asked for by name" in latemax.explain(q, d, backend="cpu").why


def test_explain_names_the_tile_and_where_it_was_found():
    q, d = problem((1, 3, 32, 9, 128), dtype=torch.bfloat16, device=TRITON_DEVICE)
    choice = latemax.explain(q, d, backend="triton")
    assert choice.backend == "triton" and choice.tile.block_q == 32
    assert "tile: " in choice.why


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_explain_says_is_what_runs(backend, monkeypatch):
    q, d = problem((2, 3, 4, 9, 16), device=TRITON_DEVICE if backend == "triton" else "cpu")
    try:
        choice = latemax.explain(q, d, backend=backend)
    except RuntimeError as error:
        assert backend == "cuda"
        with pytest.raises(RuntimeError, match=str(error).split(":")[0]):
            latemax.maxsim(q, d, backend=backend)
        return
    ran = []
    for name, module in dispatch.MODULES.items():
        monkeypatch.setattr(module, "forward", lambda *_, name=name: ran.append(name))
    if native._cpu is not None:
        kernel = types.SimpleNamespace(forward=lambda *_: ran.append("native"), levels=native._cpu.levels)
        monkeypatch.setattr(native, "_cpu", kernel)
    # with a mask too: calls without one take the fast path to the native kernel
    for mask in (None, torch.ones(d.shape[:-1], dtype=torch.bool, device=d.device)):
        ran.clear()
        latemax.maxsim(q, d, d_mask=mask, backend=backend)
        expected = choice.backend if choice.backend != "cpu" else "native" if choice.native else "blocks"
        assert ran == [expected]


def test_explain_gives_the_reason_of_every_other_backend():
    q, d = problem((2, 3, 4, 9, 16), dtype=torch.float64)
    choice = latemax.explain(q, d)
    assert choice.backend == "cpu" and not choice.native
    assert choice.notes == (native.why_not(dispatch.problem_of(batch(q, d, None, None), argmax=False)),)
    half = latemax.explain(*problem((2, 3, 4, 9, 16), dtype=torch.float16))
    assert not half.native or half.notes == ("blocks can run this too; native comes first",)


def test_an_unknown_length_meets_a_known_problem(fresh_plan):
    """Of the number and length of documents a problem says only whether they are short: a new one is no new choice."""
    for n_d, l_d in ((3, 9), (4, 9), (3, 90), (3, 401), (3, 900), (3, 9)):
        latemax.explain(*problem((2, n_d, 4, l_d, 16)))
    assert dispatch.plan_for.cache_info().misses == len(tiles.LENGTHS)


CUDA = torch.device("cuda", 0)


def pretend(monkeypatch, *, capability=90, cuda_status=(True, ""), triton_status=(True, "")):
    """A machine with a GPU of this compute capability and with these answers."""
    for module in (cuda, triton):
        monkeypatch.setattr(module, "capability", lambda device: capability)
    monkeypatch.setattr(cuda, "status", lambda: Status(*cuda_status))
    monkeypatch.setattr(triton, "status", lambda: Status(*triton_status))
    dispatch.plan_for.cache_clear()


def test_the_cuda_kernels_say_what_they_cannot_take(monkeypatch, fresh_plan):
    half = SMALL._replace(device=CUDA)
    pretend(monkeypatch, cuda_status=(False, "built for no chip"))
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: built for no chip"):
        dispatch.plan_for(half, "cuda")
    pretend(monkeypatch)
    plan = dispatch.plan_for(half, "cuda")
    assert plan.backend == "cuda" and "asked for by name" in plan.why and "never run on a GPU" in plan.notes[0]
    for change, reason in (
        (dict(device=torch.device("cpu")), "the tensors are on cpu"),
        (dict(dim=100), "dim must be a multiple of 8, not 100"),
        (dict(dim=832), "dim up to 768 here"),
        (dict(d_dtype=torch.float16), "both float16 or both bfloat16"),
        (dict(q_dtype=torch.float32, d_dtype=torch.float32), "both float16 or both bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run: .*{reason}"):
            dispatch.plan_for(half._replace(**change), "cuda")
    pretend(monkeypatch, capability=75)
    with pytest.raises(RuntimeError, match=r"compute capability 7.5 is below 8.0"):
        dispatch.plan_for(half, "cuda")


def test_auto_takes_the_cuda_kernels_only_where_the_table_says_they_were_faster(monkeypatch, fresh_plan):
    pretend(monkeypatch)
    untimed = dispatch.plan_for(SMALL._replace(device=CUDA), "auto")
    assert tiles.CUDA_FASTER == () and untimed.backend == "triton" and "not timed" in untimed.notes[0]
    monkeypatch.setattr(tiles, "CUDA_FASTER", (tiles.CudaRow(90, 128, 64, "measured by a test"),))
    for change, backend in (({}, "cuda"), (dict(dim=136), "triton"), (dict(l_q=65), "triton"), (dict(n_q=2), "cuda")):
        dispatch.plan_for.cache_clear()
        plan = dispatch.plan_for(SMALL._replace(device=CUDA, **change), "auto")
        assert plan.backend == backend and (backend == "triton" or plan.why == "measured by a test")


@pytest.fixture
def fresh_plan():
    """Plans are remembered: forget them around a test that changes what the machine says about itself."""
    dispatch.plan_for.cache_clear()
    yield
    dispatch.plan_for.cache_clear()


def test_triton_without_a_gpu_is_refused_outside_the_interpreter(monkeypatch, fresh_plan):
    pretend(monkeypatch, cuda_status=(False, "not built"))
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="backend='triton' needs tensors on a CUDA device; got cpu"):
        dispatch.plan_for(SMALL, "triton")
    pretend(monkeypatch, cuda_status=(False, "not built"), triton_status=(False, "triton is not installed"))
    with pytest.raises(
        RuntimeError, match=r"cannot run on cuda:0: cuda: not built; .*needs triton: triton is not inst"
    ):
        dispatch.plan_for(SMALL._replace(device=CUDA), "auto")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: it needs triton: triton is not installed"):
        dispatch.plan_for(SMALL._replace(device=CUDA), "triton")


def test_float64_on_an_old_triton_is_said_not_compiled(monkeypatch, fresh_plan):
    pretend(monkeypatch, cuda_status=(False, "not built"))
    monkeypatch.setattr(triton, "float64_products", lambda: False)
    double = SMALL._replace(q_dtype=torch.float64, device=CUDA)
    plan = dispatch.plan_for(double, "auto")
    assert plan.backend == "reference" and any("float64 needs triton 3.6" in note for note in plan.notes)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: float64 needs triton 3\.6"):
        dispatch.plan_for(double, "triton")


def test_kinds_of_product():
    kinds = {
        (torch.bfloat16, "highest"): "half",
        (torch.float16, "high"): "half",
        (torch.float32, "highest"): "ieee",
        (torch.float32, "high"): "tf32",
        (torch.float64, "high"): "double",
    }
    for (dtype, precision), expected in kinds.items():
        p = SMALL._replace(q_dtype=dtype, d_dtype=dtype, matmul_precision=precision)
        assert triton.kind(p) == expected


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120, 75])
@pytest.mark.parametrize("argmax", [False, True])
@pytest.mark.parametrize("dim", [1, 64, 96, 128, 256, 768, 4096])
def test_every_pick_fits(capability, argmax, dim):
    for kind, itemsize in (("half", 2), ("bounds", 2), ("tf32", 4), ("ieee", 4), ("double", 8)):
        for rows, l_d in itertools.product((1, 16, 32, 64, 128, 4096), tiles.LENGTHS):
            tile, source = tiles.pick(kind, dim, rows, l_d, itemsize, capability, argmax)
            assert tiles.fits(tile, dim, itemsize, capability), (kind, rows, tile, source)
            assert tile.block_q >= 16 and tile.block_d >= 16 and tile.block_k >= 16


def test_tiles_of_codes(monkeypatch):
    """On sm_80 a q of two halves takes few rows, one of integers does not; bounds have tiles of their own."""
    codes = SMALL._replace(l_q=128, q_dtype=torch.float32, d_dtype=torch.int8, d_codes="int8")
    coarse = codes._replace(bounds="coarse")
    for chip, most in ((80, 32), (90, 128)):
        monkeypatch.setattr(triton, "capability", lambda _, chip=chip: chip)
        rows = {p: triton.plan(p, True).launch.tile.block_q for p in (codes, coarse, coarse._replace(normalize=True))}
        assert list(rows.values()) == [most, most, 128]
        of_codes = codes._replace(q_dtype=torch.int8, q_codes="int8")
        assert triton.plan(of_codes, True).launch.tile.block_q == 128
    plans = [triton.plan(p, True) for p in (SMALL, SMALL._replace(d_codes="int8", bounds="exact"))]
    assert [plan.launch.tile.block_d for plan in plans] == [128, 64]


def test_rows_of_the_table_are_reachable_and_in_order():
    reached = {
        (row.capability, row.kind, row.dim, row.q_rows, row.l_d)
        for row in tiles.TABLE
        if tiles.pick(row.kind, row.dim, row.q_rows, row.l_d, 2, row.capability)[1].startswith(row.source)
    }
    assert len(reached) == len(tiles.TABLE) and {row.l_d for row in tiles.TABLE} == {*tiles.LENGTHS}
    assert tiles.pick("unheard of", 128, 32, 300, 2, 90)[0] == tiles.DEFAULT


def test_short_queries_are_packed_where_they_share_documents():
    tile = tiles.TileConfig(128, 128, 128, True, 8, 3)
    assert triton.queries_per_tile(tile, l_q=32, n_q=100, own=False) == 4
    assert triton.queries_per_tile(tile, l_q=20, n_q=100, own=False) == 4
    assert triton.queries_per_tile(tile, l_q=20, n_q=100, own=True) == 1
    assert triton.queries_per_tile(tile, l_q=1030, n_q=100, own=False) == 1
    assert triton.queries_per_tile(tile, l_q=32, n_q=1, own=False) == 1


def test_warmup_runs_the_given_form():
    choice = latemax.warmup(
        dim=32, l_q=8, n_q=2, dtype=torch.float32, device=TRITON_DEVICE, q_masked=True, d_masked=True, own=True,
        normalize=True, train=True, backend="triton",
    )  # fmt: skip
    assert choice.backend == "triton"
    assert latemax.warmup(device="cpu", dtype=torch.float32).backend == "cpu"
    for layout in ("varlen", "rerank", "corpus"):
        choice = latemax.warmup(dim=16, l_q=8, device=TRITON_DEVICE, layout=layout, train=True, backend="triton")
        assert choice.backend == "triton" and choice.tile.block_q == 16
    with pytest.raises(ValueError, match="layout must be dense, list, varlen, rerank or corpus; got 'packed'"):
        latemax.warmup(device="cpu", layout="packed")


def test_backend_status_names_every_backend():
    status = dispatch.backend_status()
    assert set(status) == set(BACKENDS) - {"auto"}
    assert status["cpu"][0] and status["reference"][0] and not status["cuda"][0]
    assert all(isinstance(reason, str) and reason for _, reason in status.values())
    assert GPU or "interpreted" in status["triton"][1]
