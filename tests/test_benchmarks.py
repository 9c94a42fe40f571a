"""The benchmarks count right, refuse a wrong contender, and can be rehearsed whole on any machine."""

import json
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("triton", reason="the tuner times Triton kernels")
from benchmarks import harness, internals, peers, report, shapes, tables, tune
from benchmarks.internals import tiles
from benchmarks.shapes import Shape
from benchmarks.static import predict
from benchmarks.suites import cpu, kill_writer, maxsim, ragged

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
    assert maxsim.bound(Shape(1, 1000, 32, 1024), False, limit) == ("read", pytest.approx(0.262, rel=0.01))
    kind, ms = maxsim.bound(Shape(1, 1000, 1024, 1024), False, limit)
    assert kind == "matmul" and ms == pytest.approx(2 * 1000 * 1024 * 1024 * 128 / 100e12 * 1e3)


def test_a_wrong_contender_is_refused():
    shape = Shape(1, 2, 4, 5, 8, "float32")
    q, d, _ = shape.tensors("cpu")
    truth, allowed = maxsim.truth_of(q, d, None), harness.tolerance(4, "float32")
    assert harness.check("ours", peers.ours(q, d, None, False), truth, allowed) < 1e-5
    for wrong in (truth + 1, truth * torch.nan):
        with pytest.raises(RuntimeError, match="wrong at 7 is wrong: error"):
            harness.check("wrong at 7", wrong, truth, allowed)


def test_every_run_is_timed_in_every_round_and_in_changing_order():
    calls, clock = [], iter(range(1000))
    runs = {name: lambda name=name: calls.append(name) for name in "abcd"}
    times = harness.interleaved(runs, 6, harness.timer(lambda: next(clock), calls=2), fewer={"d": 1})
    assert {name: len(found) for name, found in times.items()} == dict(a=6, b=6, c=6, d=1)
    # the mean of two calls, between two ticks
    assert all(seconds == 0.5 for found in times.values() for seconds in found)
    assert calls[:8:2] == calls[1:8:2] and set(calls[:8]) == set("abcd")
    rounds = [tuple(calls[start : start + 6 : 2]) for start in range(8, len(calls), 6)]
    assert len(rounds) == 5 and len(set(rounds)) > 1 and all(set(order) == set("abc") for order in rounds)


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    harness.write(path, dict(a=1))
    with pytest.raises(TypeError):
        harness.write(path, dict(a=torch.ones(1)))
    assert json.loads(path.read_text()) == dict(a=1) and not list(tmp_path.glob("*.part"))


def test_every_contender_on_this_machine_is_right():
    for shape in (*shapes.CPU, *shapes.VARIANTS, shapes.TRAIN[2]):
        tiny = shape.tiny()
        q, d, mask = tiny.tensors("cpu")
        contenders, absent = peers.contenders(tiny, "cpu", False)
        assert set(contenders) == {"latemax", "torch chunked", "torch eager"}
        assert set(absent) == {
            "latemax cuda",
            "torch.compile",
            "late-interaction-kernels",
            "flash-maxsim",
            "flash-maxsim, query whole",
        }
        assert all(absent.values())
        truth, allowed = maxsim.truth_of(q, d, mask), harness.tolerance(tiny.l_q, tiny.dtype)
        for name, contender in contenders.items():
            harness.check(name, contender(q, d, mask, tiny.normalize), truth, allowed)


def test_the_shapes_cover_what_is_promised():
    """Lengths, dims, dtypes, masks, normalisation, argmax, own candidates, and both directions."""
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
    assert {shape[:4] for shape in shapes.COMPILED} == {
        (1, 1000, 32, 300), (1, 1000, 1024, 1024), (32, 32, 32, 300), (128, 128, 32, 300)
    }  # fmt: skip
    assert len(shapes.SWEEP) == 54


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 3, 8, 20, 64, "float16"), Shape(2, 3, 8, 20, 64, "float16"),
        Shape(2, 3, 8, 20, 64, "float16", own=True), Shape(2, 3, 8, 20, 64, "float16", masked=True),
        Shape(2, 3, 8, 20, 64, "float16", normalize=True), Shape(1, 3, 136, 20, 64, "float16"),
    ],
    ids=lambda shape: shape.name.replace(" ", "-"),
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
    truth, allowed = maxsim.truth_of(q, d, mask), harness.tolerance(shape.l_q, shape.dtype)
    harness.check(module, run(q, d, mask, shape.normalize), truth, allowed)
    peers.forget_tuning(module)


def test_predictions_by_hand():
    """128 x 64 tiles at dim 128: 512 tensor-core clocks, and the largest of the four counts decides."""
    launch = tiles.Launch(tiles.TileConfig(128, 64, 128, True, 4, 3), pack=4, norm=0)
    shape = Shape(128, 128, 32, 320)
    row = dict(registers=160, shared=81920, loop=100)
    chip = predict.H200._replace(l2_tbs=1e6)
    found = predict.predict(shape, row, launch, chip)
    # 32 query tiles x 128 documents on 132 multiprocessors, 5 tiles each, two blocks at a time
    programs = 32 * 128 / 132
    assert found.binding == "wgmma"
    assert found.overlapped_us == pytest.approx(programs * (5 * 512 + predict.AROUND / 2) / 1.755e3)
    assert found.serial_us == pytest.approx(programs * (5 * (512 + 100) + predict.AROUND) / 1.755e3)
    narrow = predict.predict(shape, row, launch, chip._replace(l2_tbs=1.0))
    assert narrow.binding == "L2" and narrow.overlapped_us > found.overlapped_us
    scan = predict.predict(Shape(1, 10_000, 32, 1024), row, launch._replace(pack=1), predict.H200)
    assert scan.binding == "device memory" and scan.of_limit == 1.0


def test_predictions_are_of_the_build_that_runs():
    rows = json.loads((harness.RESULTS / "aot.json").read_text())["rows"]
    plain = Shape(1, 1000, 1024, 1024)
    for flags, words in ({}, set()), (dict(normalize=True), {"norm=2"}), (dict(argmax=True), {"argmax=True"}):
        row, launch = predict.build(plain._replace(**flags), rows)
        assert {word for word in row["case"].split() if "=" in word} == words
        assert tiles.TileConfig(*row["tile"]) == launch.tile and launch.pack == 1
    assert predict.build(plain._replace(dim=77), rows) is None


def test_the_gpu_table_is_rendered_from_rows():
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
    lines = maxsim.table(dict(machine=machine, limits=limits, rows=rows)).splitlines()
    assert "peak MB" in lines[0] and "other 2.00" in lines[2] and "2.00×" in lines[2] and len(lines) == 5
    assert lines[-1].startswith("A GPU")


def test_a_table_without_a_result_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert report.render(tables.Table("none", str, absent="not yet\n")) == "not yet\n"
    with pytest.raises(FileNotFoundError):
        report.render(tables.Table("none", str))


@pytest.mark.parametrize("folder", ["", "suites", "static"])
def test_suites_are_independent_and_only_internals_knows_the_inside(folder):
    files = sorted((ROOT / "benchmarks" / folder).glob("*.py"))
    assert files
    for path in files:
        text = path.read_text()
        if path.name != "internals.py":
            assert not re.search(r"(?:from|import) latemax(?:\.ops|\._|\.cli)|from latemax import _", text), path
        if folder:
            assert not re.search(r"(?:from|import) benchmarks\.(?:suites|static)", text), path


def test_every_suite_measures_and_has_a_table():
    """And no two name one table."""
    known = report.tables()
    modules = [
        module for name, module in sys.modules.items() if name.startswith(("benchmarks.suites.", "benchmarks.static."))
    ]
    assert len(modules) >= 10 and sum(len(module.TABLES) for module in modules) == len(known)
    assert all(callable(module.table) and callable(module.main) for module in modules)


def test_the_tuner_writes_the_row_it_measured():
    text = tiles.TABLE_FILE.read_text("utf-8")
    entries, row = json.loads(text), tiles.TABLE[1]
    assert tune.dump(entries) == text
    tile = tiles.TileConfig(32, 64, 128, False, 8, 4)
    same_chip, newer_chip = (
        tiles.read_table(tune.dump(tune.with_row(entries, row, tile, capability, "measured: a test")))
        for capability in (row.capability, 100)
    )
    assert len(same_chip) == len(tiles.TABLE) and len(newer_chip) == len(tiles.TABLE) + 1
    tuned = row._replace(tile=tile, source="measured: a test")
    assert same_chip[1] == tuned and (same_chip[0], *same_chip[2:]) == (tiles.TABLE[0], *tiles.TABLE[2:])
    # in front of the row it was tuned from, which stays for older chips
    assert newer_chip[1] == tuned._replace(capability=100) and newer_chip[2:] == tiles.TABLE[1:]
    with pytest.raises(ValueError, match="no row of the table is"):
        tune.with_row(entries, row._replace(dim=77), tile, 90, "")


def test_a_row_without_bounds_is_tuned_too():
    row = next(row for row in tiles.TABLE if row.q_rows == tiles.UNBOUNDED)
    entries = json.loads(tiles.TABLE_FILE.read_text("utf-8"))
    changed = tiles.read_table(tune.dump(tune.with_row(entries, row, tiles.DEFAULT, row.capability, "x")))
    assert changed[tiles.TABLE.index(row)] == row._replace(tile=tiles.DEFAULT, source="x")


def test_every_tuned_shape_falls_into_its_row():
    for row in tiles.TABLE:
        shape = tune.shape_of(row)
        if shape is None:
            assert row.kind in ("double", "bounds")
            continue
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(shapes.KINDS[row.kind][1])
        try:
            picked = internals.triton_launch(shape, row.capability).tile
        finally:
            torch.set_float32_matmul_precision(precision)
        assert picked._replace(block_k=0, num_stages=0) == row.tile._replace(block_k=0, num_stages=0), row


def rehearse(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_maxsim_suite_is_rehearsed(tmp_path):
    path = tmp_path / "rows.json"
    printed = rehearse("benchmarks.suites.maxsim", "--tiny", "--json", path)
    result = json.loads(path.read_text())
    assert result["tiny"] and result["limits"]["read_gbs"] > 0
    timed = [row for row in result["rows"] if "wall" in row]
    assert {row["name"] for row in timed} >= {"latemax", "torch chunked"}
    assert {row["train"] for row in timed} == {False, True}
    assert all(row["wall"]["p20"] <= row["wall"]["p50"] <= row["wall"]["p80"] for row in timed)
    assert all(row["absent"] for row in result["rows"] if "wall" not in row)
    assert printed.endswith(maxsim.table(result)) and not list(tmp_path.glob("*.part"))


def test_a_run_that_is_out_of_time_keeps_what_it_has(monkeypatch):
    monkeypatch.setattr(harness, "limits", lambda device, rounds: dict(matmul_float32_tflops=1.0, read_gbs=1.0))
    monkeypatch.setattr(maxsim, "cases", lambda device: [(shapes.CPU[0], False), (shapes.CPU[1], False)])
    saved, clock = [], iter([0.0, 1.0, 100.0])
    monkeypatch.setattr(maxsim, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(maxsim, "measure_shape", lambda *_, **__: [dict(label="a", name="latemax", wall=dict(p50=1.0))])
    result = maxsim.measure(True, seconds=50, save=lambda result: saved.append(len(result["rows"])))
    assert saved == [1, 2] and "time given to the run was over" in result["rows"][1]["absent"]


def test_the_pytest_benchmark_cases_are_rehearsed():
    pytest.importorskip("pytest_benchmark")
    printed = rehearse("pytest", "benchmarks", "-q", "--tiny", "-k", "masked or backward")
    assert " passed" in printed


def test_the_cpu_suite_is_rehearsed():
    limit = dict(matmul_float32_tflops=0.1, matmul_bfloat16_tflops=0.1, matmul_float16_tflops=0.1, read_gbs=10.0)
    shape = shapes.SCAN[0].tiny()
    rows = cpu.scan(shape, limit, rounds=2, exact=True)
    trained, one = cpu.train(shape, limit, rounds=2), cpu.one_document(shapes.ONE_DOCUMENT[1], limit, 2, calls=3)
    for found in (rows, trained, one):
        assert found[0]["name"] == "latemax" and found[0]["vs_latemax"] == 1 and len(found) > 2
    result = dict(rows=rows, train=trained, one=one, ragged=[cpu.ragged(shapes.SCAN_RAGGED[0].tiny(), 2)], sweep=rows)
    machine = dict(cpu="a CPU", capability="", threads=1, torch="", peers={}, commit="c", date="")
    assert "**latemax**" in cpu.table(result | dict(machine=machine, limits=limit))
    assert "sweep of 1 shapes" in cpu.table_of_others(result)


def test_the_ragged_suite_is_rehearsed(monkeypatch):
    monkeypatch.setattr(harness, "machine", lambda device: dict(cpu="a CPU", threads=1, torch="", commit="", date=""))
    result = ragged.measure(tiny=True)
    assert [row["case"] for row in result["rows"]] == ["ragged"] * 3 + ["rerank"]
    assert ragged.table(result).count("\n") >= 2 + 12


def test_a_killed_writer_reports_what_it_committed(tmp_path):
    from latemax.store import PatchStore

    committed = kill_writer.killed_writer(tmp_path / "store", 0.2)
    assert committed % 8 == 0 and committed <= len(PatchStore(tmp_path / "store")) <= committed + 8
