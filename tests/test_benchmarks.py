"""The benchmark suite counts right, refuses a wrong contender, and can be rehearsed whole on any machine."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the tuner times Triton kernels")
from benchmarks import peers, shapes, timing, tune
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
        assert set(absent) == {"latemax cuda", "torch.compile", "late-interaction-kernels", "flash-maxsim"}
        for name, function in functions.items():
            timing.check(name, function(q, d, mask, tiny.normalize), timing.truth_of(q, d, mask), tiny)


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
            own, n_q, l_q = shape.own, shape.n_q, shape.l_q

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
