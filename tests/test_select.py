"""The choice of backend and tile: pure, explained, and never a silent fallback."""

import types

import pytest
import torch
from common import GPU, TRITON_DEVICE, problem

import latemax
from latemax._check import Problem
from latemax.ops import select, tiles

SMALL = Problem(
    own=False, n_q=1, n_d=10, l_q=32, l_d=196, dim=128, q_dtype=torch.bfloat16, d_dtype=torch.bfloat16,
    device=torch.device("cpu"), q_masked=False, d_masked=False, normalize=False, argmax=False, train=False,
    matmul_precision="highest",
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


@pytest.mark.parametrize("backend", latemax._check.BACKENDS)
def test_what_explain_says_is_what_runs(backend, monkeypatch):
    from latemax.ops import cpu_backend, native_cpu_backend

    q, d = problem((2, 3, 4, 9, 16), device=TRITON_DEVICE if backend == "triton" else "cpu")
    try:
        choice = latemax.explain(q, d, backend=backend)
    except RuntimeError as error:
        assert backend == "cuda"
        with pytest.raises(RuntimeError, match=str(error).split(":")[0]):
            latemax.maxsim(q, d, backend=backend)
        return
    ran = []
    monkeypatch.setattr(cpu_backend, "forward", lambda *_, **__: ran.append("cpu"))
    if native_cpu_backend._cpu is not None:
        native = types.SimpleNamespace(forward=lambda *_: ran.append("native"), levels=native_cpu_backend._cpu.levels)
        monkeypatch.setattr(native_cpu_backend, "_cpu", native)
    monkeypatch.setattr(latemax.ops.launch.reference, "maxsim", lambda *_, **__: ran.append("reference") or (q, q))
    from latemax.ops import triton_backend

    monkeypatch.setattr(triton_backend, "forward", lambda *_, **__: ran.append("triton"))
    # with a mask too: plain calls go to the native kernel by a shorter way
    for mask in (None, torch.ones(d.shape[:-1], dtype=torch.bool, device=d.device)):
        ran.clear()
        latemax.maxsim(q, d, d_mask=mask, backend=backend)
        assert ran == ["native" if choice.native else choice.backend]


CUDA = torch.device("cuda", 0)


def test_the_cuda_kernels_say_what_they_cannot_take(monkeypatch, fresh_choice):
    half = SMALL._replace(device=CUDA)
    monkeypatch.setattr(select, "capability", lambda device: 90)
    monkeypatch.setattr(select, "cuda_status", lambda: (False, "built for no chip"))
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: built for no chip"):
        select.choose(half, "cuda")
    select.choose.cache_clear()
    monkeypatch.setattr(select, "cuda_status", lambda: (True, ""))
    choice = select.choose(half, "cuda")
    assert choice.backend == "cuda" and "asked for by name" in choice.why and "Triton" in choice.notes[0]
    for change, reason in (
        (dict(device=torch.device("cpu")), "the tensors are on cpu"),
        (dict(dim=100), "dim must be a multiple of 8, not 100"),
        (dict(dim=768), "dim up to 704 here"),
        (dict(d_dtype=torch.float16), "both float16 or both bfloat16"),
        (dict(q_dtype=torch.float32, d_dtype=torch.float32), "both float16 or both bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run: .*{reason}"):
            select.choose(half._replace(**change), "cuda")
    monkeypatch.setattr(select, "capability", lambda device: 75)
    with pytest.raises(RuntimeError, match=r"compute capability 7.5 is below 8.0"):
        select.choose(half._replace(n_d=11), "cuda")


def test_auto_takes_the_cuda_kernels_only_where_the_table_says_they_were_faster(monkeypatch, fresh_choice):
    monkeypatch.setattr(select, "capability", lambda device: 90)
    monkeypatch.setattr(select, "cuda_status", lambda: (True, ""))
    monkeypatch.setattr(select, "triton_status", lambda: (True, ""))
    untimed = select.choose(SMALL._replace(device=CUDA), "auto")
    assert tiles.CUDA_FASTER == () and untimed.backend == "triton" and "not timed" in untimed.notes[0]
    monkeypatch.setattr(tiles, "CUDA_FASTER", (tiles.CudaRow(90, 128, 64, "measured by a test"),))
    for change, backend in (({}, "cuda"), (dict(dim=136), "triton"), (dict(l_q=65), "triton"), (dict(n_q=2), "cuda")):
        select.choose.cache_clear()
        choice = select.choose(SMALL._replace(device=CUDA, **change), "auto")
        assert choice.backend == backend and (backend == "triton" or choice.why == "measured by a test")


@pytest.fixture
def fresh_choice():
    """A choice is remembered: forget it around a test that changes what the machine says of itself."""
    select.choose.cache_clear()
    yield
    select.choose.cache_clear()


def test_triton_without_a_gpu_is_refused_outside_the_interpreter(monkeypatch, fresh_choice):
    monkeypatch.setattr(select, "interpreted", lambda: False)
    monkeypatch.setattr(select, "triton_status", lambda: (True, ""))
    with pytest.raises(ValueError, match="backend='triton' needs tensors on a CUDA device; got cpu"):
        select.choose(SMALL, "triton")
    monkeypatch.setattr(select, "triton_status", lambda: (False, "triton is not installed"))
    with pytest.raises(RuntimeError, match="needs triton: triton is not installed"):
        select.choose(SMALL._replace(device=torch.device("cuda", 0)), "auto")


def test_float64_on_an_old_triton_is_said_not_compiled(monkeypatch, fresh_choice):
    monkeypatch.setattr(select, "triton_status", lambda: (True, ""))
    monkeypatch.setattr(select, "float64_products", lambda: False)
    double = SMALL._replace(q_dtype=torch.float64, device=torch.device("cuda", 0))
    assert select.choose(double, "auto").backend == "reference"
    assert "triton older than 3.6" in select.choose(double, "auto").why
    with pytest.raises(RuntimeError, match="cannot run float64"):
        select.choose(double, "triton")


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
        assert select.kind(p) == expected


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120, 75])
@pytest.mark.parametrize("argmax", [False, True])
@pytest.mark.parametrize("dim", [1, 64, 96, 128, 256, 768, 4096])
def test_every_pick_fits(capability, argmax, dim):
    for kind, itemsize in (("half", 2), ("tf32", 4), ("ieee", 4), ("double", 8)):
        for rows in (1, 16, 32, 64, 128, 4096):
            tile, source = tiles.pick(kind, dim, rows, itemsize, capability, argmax)
            assert tiles.fits(tile, dim, itemsize, capability), (kind, rows, tile, source)
            assert tile.block_q >= 16 and tile.block_d >= 16 and tile.block_k >= 16


def test_rows_of_the_table_are_reachable_and_in_order():
    reached = {
        (row.capability, row.kind, row.dim, row.q_rows)
        for row in tiles.TABLE
        if tiles.pick(row.kind, row.dim, row.q_rows, 2, row.capability)[1].startswith(row.source)
    }
    assert len(reached) == len(tiles.TABLE)
    assert tiles.pick("unheard of", 128, 32, 2, 90)[0] == tiles.DEFAULT


def test_short_queries_are_packed_where_they_share_documents():
    from latemax.ops.triton_backend import packed

    tile = tiles.TileConfig(128, 128, 128, True, 8, 3)
    assert packed(tile, l_q=32, n_q=100, own=False) == 4
    assert packed(tile, l_q=20, n_q=100, own=False) == 4
    assert packed(tile, l_q=20, n_q=100, own=True) == 1
    assert packed(tile, l_q=1030, n_q=100, own=False) == 1
    assert packed(tile, l_q=32, n_q=1, own=False) == 1


def test_warmup_runs_what_it_is_told():
    choice = latemax.warmup(
        dim=32, l_q=8, n_q=2, dtype=torch.float32, device=TRITON_DEVICE, q_masked=True, d_masked=True, own=True,
        normalize=True, train=True, backend="triton",
    )  # fmt: skip
    assert choice.backend == "triton"
    assert latemax.warmup(device="cpu", dtype=torch.float32).backend == "cpu"
    for layout in ("varlen", "rerank"):
        choice = latemax.warmup(dim=16, l_q=8, device=TRITON_DEVICE, layout=layout, train=True, backend="triton")
        assert choice.backend == "triton" and choice.tile.block_q == 16
    with pytest.raises(ValueError, match="layout must be dense, varlen or rerank; got 'packed'"):
        latemax.warmup(device="cpu", layout="packed")


def test_backend_status_names_every_backend():
    status = select.backend_status()
    assert set(status) == set(latemax._check.BACKENDS) - {"auto"}
    assert status["cpu"][0] and status["reference"][0] and not status["cuda"][0]
    assert all(isinstance(reason, str) and reason for _, reason in status.values())
    assert GPU or "interpreted" in status["triton"][1]
