"""The benchmark suite counts right, refuses a wrong contender, and can be rehearsed whole on any machine."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the tuner times Triton kernels")
from benchmarks import peers, predict, report, shapes, timing, tune
from benchmarks.shapes import Shape
from latemax.ops import tiles

ROOT = pathlib.Path(__file__).parents[1]


def test_work_and_traffic_by_hand():
    shape = Shape(2, 3, 4, 5, 8, "bfloat16")
    assert shape.flops == 2 * 2 * 3 * 4 * 5 * 8
    assert shape.bytes == 2 * 8 * (2 * 4 + 3 * 5) + 4 * 6
    own = shape._replace(own=True)
    assert own.flops == shape.flops and own.bytes == 2 * 8 * (2 * 4 + 6 * 5) + 4 * 6
    q, d, mask = own._replace(masked=True).tensors("cpu")
    assert q.shape == (2, 4, 8) and d.shape == (2, 3, 5, 8) and mask.shape == (2, 3, 5)
    assert mask[..., 0].all()


def test_the_binding_limit_by_hand():
    limit = dict(matmul_bfloat16_tflops=100.0, read_gbs=1000.0)
    assert timing.bound(Shape(1, 1000, 32, 1024), False, limit) == ("read", pytest.approx(0.262, rel=0.01))
    kind, ms = timing.bound(Shape(1, 1000, 1024, 1024), False, limit)
    assert kind == "matmul" and ms == pytest.approx(2 * 1000 * 1024 * 1024 * 128 / 100e12 * 1e3)


def test_a_wrong_contender_is_refused():
    shape = Shape(1, 2, 4, 5, 8, "float32")
    q, d, _ = shape.tensors("cpu")
    truth = timing.truth_of(q, d, None)
    assert timing.check("ours", peers.ours(q, d, None, False), truth, shape) < 1e-5
    for wrong in (truth + 1, truth * torch.nan):
        with pytest.raises(RuntimeError, match="is wrong at"):
            timing.check("wrong", wrong, truth, shape)


def test_every_contender_on_this_machine_is_right():
    for shape in (*shapes.CPU, *shapes.VARIANTS, shapes.TRAIN[2]):
        tiny = shape.tiny()
        q, d, mask = tiny.tensors("cpu")
        functions, absent = peers.contenders(tiny, "cpu", False)
        assert set(functions) == {"latemax", "torch chunked", "torch eager"}
        assert set(absent) == {
            "latemax cuda",
            "torch.compile",
            "late-interaction-kernels",
            "flash-maxsim",
            "flash-maxsim, query whole",
        }
        assert all(absent.values())
        for name, function in functions.items():
            timing.check(name, function(q, d, mask, tiny.normalize), timing.truth_of(q, d, mask), tiny)


def test_the_shapes_cover_what_is_promised():
    """Lengths, dims, dtypes, masks, normalisation, winners, own candidates, and both directions."""
    forward = set(shapes.CORE + shapes.VARIANTS)
    sizes = {shape[:4] for shape in forward}
    assert sizes >= {
        (1, 1000, 32, 300), (1, 1000, 32, 1024), (1, 10_000, 32, 1024), (1, 100_000, 32, 196), (1, 1000, 1024, 1024),
        (32, 32, 32, 300), (128, 128, 32, 300), (16, 16, 1030, 1030), (64, 64, 768, 512), (256, 256, 32, 300),
        (256, 16, 32, 1030),
    }  # fmt: skip
    assert {shape.dim for shape in forward} >= {64, 96, 128, 256, 768}
    assert {shape.dtype for shape in forward} == {"float16", "bfloat16", "float32"}
    for flag in ("own", "masked", "normalize", "argmax"):
        assert {getattr(shape, flag) for shape in forward} == {False, True}
    assert {shape[:4] for shape in shapes.TRAIN} >= {(256, 256, 32, 300), (256, 16, 32, 1030)}
    assert sizes >= peers.COMPILED


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 3, 8, 20, 64, "float16"), Shape(2, 3, 8, 20, 64, "float16"),
        Shape(2, 3, 8, 20, 64, "float16", own=True), Shape(2, 3, 8, 20, 64, "float16", masked=True),
        Shape(2, 3, 8, 20, 64, "float16", normalize=True), Shape(1, 3, 136, 20, 64, "float16"),
    ],
    ids=lambda shape: shape.name.strip().replace(" ", "-"),
)  # fmt: skip
@pytest.mark.parametrize(
    "module, build",
    [
        ("late_interaction_kernels", peers.late_interaction_kernels), ("flash_maxsim", peers.flash_maxsim),
        ("flash_maxsim", peers.flash_maxsim_whole),
    ],
)  # fmt: skip
def test_the_peers_calls_are_right(shape, module, build, monkeypatch):
    """Where they are installed, in the interpreter."""
    pytest.importorskip(module)
    if torch.cuda.is_available():
        pytest.skip("the benchmark suite itself checks them on a GPU")
    from triton.runtime.autotuner import Autotuner

    # there is nothing to time in the interpreter
    monkeypatch.setattr(Autotuner, "_bench", lambda *_, **__: [1.0, 1.0, 1.0], raising=False)
    run = build(shape, False)
    if isinstance(run, str):
        pytest.skip(run)
    q, d, mask = shape.tensors("cpu")
    timing.check(module, run(q, d, mask, shape.normalize), timing.truth_of(q, d, mask), shape)
    peers.forget_tuning(module)


def test_predictions_by_hand():
    """128 x 64 tiles at dim 128: 512 tensor-core clocks, and the largest of the four counts decides."""
    shape = Shape(128, 128, 32, 320)
    tile = tiles.TileConfig(128, 64, 128, True, 4, 3)
    row = dict(registers=160, shared=81920, loop=100, case="half dim 128 l_q 32 x4")
    chip = predict.H200._replace(l2_tbs=1e6)
    found = predict.predict(shape, row, tile, 4, chip)
    # 32 query tiles x 128 documents on 132 multiprocessors, 5 tiles each, two blocks at a time
    programs = 32 * 128 / 132
    assert found.binding == "wgmma"
    assert found.overlapped_us == pytest.approx(programs * (5 * 512 + predict.AROUND / 2) / 1.755e3)
    assert found.serial_us == pytest.approx(programs * (5 * (512 + 100) + predict.AROUND) / 1.755e3)
    narrow = predict.predict(shape, row, tile, 4, chip._replace(l2_tbs=1.0))
    assert narrow.binding == "L2" and narrow.overlapped_us > found.overlapped_us
    scan = predict.predict(Shape(1, 10_000, 32, 1024), row, tile, 1, predict.H200)
    assert scan.binding == "device memory" and scan.of_limit == 1.0


def test_the_gpu_table_is_rendered_from_rows(tmp_path, monkeypatch):
    spread = dict(p20=1.0, p50=1.0, p80=1.0)
    shape = Shape(1, 2, 4, 5, 8)
    row = dict(
        label=shape.name, train=False, wall=spread, cold=spread, warm=spread, peak_mb=1.0, first_call_ms=9.0,
        allowed_ms=0.5, binding="read", of_limit=0.5,
    )  # fmt: skip
    machine = dict(cpu="", gpu="A GPU", torch="", commit="", date="")
    limits = dict(matmul_float32_tflops=1.0, matmul_bfloat16_tflops=1.0, read_gbs=1.0)
    rows = [row | dict(name="latemax"), row | dict(name="other", wall=dict(p50=2.0)), dict(row, name="x", absent="y")]
    rows[-1].pop("wall")
    # a shape that time did not reach has no row to show
    rows.append(dict(label="late", train=True, name="latemax", absent="the time given to the run was over"))
    monkeypatch.setattr(report, "result", lambda _: dict(machine=machine, limits=limits, rows=rows))
    lines = report.suite("any").splitlines()
    assert "peak MB" in lines[0] and "other 2.00" in lines[2] and "2.00×" in lines[2] and len(lines) == 5
    assert lines[-1].startswith("A GPU")


def test_the_tuner_rewrites_the_row_it_measured():
    text = tune.TABLE.read_text()
    row = tiles.TABLE[1]
    tile = tiles.TileConfig(32, 64, 128, False, 8, 4)
    same_chip = tune.written(text, row, tile, row.capability, "measured: a test")
    newer_chip = tune.written(text, row, tile, 100, "measured: a test")
    tables = []
    for changed in (same_chip, newer_chip):
        module: dict = {"__name__": "changed"}
        exec(compile(changed, "tiles.py", "exec"), module)
        tables.append(module)
    assert len(tables[0]["TABLE"]) == len(tiles.TABLE) and len(tables[1]["TABLE"]) == len(tiles.TABLE) + 1
    for module, chip in zip(tables, (row.capability, 100), strict=True):
        found, source = module["pick"](row.kind, row.dim, row.q_rows, 2, chip)
        assert tuple(found) == tuple(tile) and source == "measured: a test"
    assert tuple(tables[1]["pick"](row.kind, row.dim, row.q_rows, 2, 90)[0]) == tuple(row.tile)
    with pytest.raises(RuntimeError, match="no line of the table"):
        tune.written(text, row._replace(dim=77), tile, 90, "")


def test_every_tuned_shape_falls_into_its_row():
    from latemax.ops.select import query_rows

    for row in tiles.TABLE:
        shape = tune.shape_of(row)
        if shape is None:
            assert row.kind == "double"
            continue

        class Problem:
            own, n_q, l_q, q_ragged = shape.own, shape.n_q, shape.l_q, False

        itemsize = getattr(torch, shape.dtype).itemsize
        picked, _ = tiles.pick(row.kind, shape.dim, query_rows(Problem), itemsize, row.capability)
        assert picked._replace(block_k=0, num_stages=0) == row.tile._replace(block_k=0, num_stages=0), row


def test_the_suite_is_rehearsed(tmp_path):
    rows = tmp_path / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-q",
        "--tiny",
        "--rows",
        str(rows),
        "-k",
        "masked or backward",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(rows.read_text())
    assert result["tiny"] and result["limits"]["read_gbs"] > 0
    timed = [row for row in result["rows"] if "wall" in row]
    assert {row["name"] for row in timed} >= {"latemax", "torch chunked"} and {row["train"] for row in timed} == {
        False,
        True,
    }
    assert all(row["wall"]["p20"] <= row["wall"]["p50"] <= row["wall"]["p80"] for row in timed)
    left_out = [row for row in result["rows"] if "absent" in row]
    assert all(row["absent"] for row in left_out)
    assert not list(tmp_path.glob("*.part"))
