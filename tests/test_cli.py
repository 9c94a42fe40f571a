"""The ``latemax`` command: what ``info`` reports, what ``demo`` passes on, and how errors end."""

import json
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from latemax import cli
from latemax.cli import bench, info

STATUS = {
    "triton": {"usable": False, "reason": "no CUDA device"},
    "cpu": {"usable": True, "reason": "always"},
    "reference": {"usable": True, "reason": "always"},
}


@pytest.fixture
def status(monkeypatch):
    monkeypatch.setattr(info, "_backends", lambda: STATUS)


@pytest.fixture
def demo(monkeypatch):
    """Records calls to the demo, and raises ``demo.error`` if it is set."""
    seen = SimpleNamespace(calls=[], error=None)

    def run(out_dir, *, model=None, seed=0):
        seen.calls.append((out_dir, model, seed))
        if seen.error is not None:
            raise seen.error

    monkeypatch.setitem(sys.modules, "latemax.demo", SimpleNamespace(run=run))
    return seen


def info_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_json_has_versions_and_devices(status, capsys):
    found = info_json(capsys)
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["numpy"] == metadata.version("numpy")
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()
    assert found["cpu"]["cores"] >= 1
    assert found["cpu"]["model"]
    assert len(found["cuda"]["devices"]) == torch.cuda.device_count()
    assert bool(found["cuda"]["devices"]) != bool(found["cuda"]["reason"])


def test_info_reports_which_backends_work_and_why_not(status, capsys):
    assert info_json(capsys)["backends"] == STATUS
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "  triton     no     no CUDA device\n" in text
    assert "  cpu        works  always\n" in text


def test_info_of_the_real_backends(capsys):
    backends = info_json(capsys)["backends"]
    assert backends["cpu"]["usable"] and backends["reference"]["usable"]
    assert {"triton", "cuda"} <= set(backends)
    assert all(status["reason"] for status in backends.values() if not status["usable"])


def test_info_names_an_absent_package(status, monkeypatch, capsys):
    monkeypatch.setattr(info, "OPTIONAL", ("no-such-package",))
    assert info_json(capsys)["packages"]["no-such-package"] is None
    cli.main(["info"])
    assert "  no-such-package  not installed\n" in capsys.readouterr().out


def test_info_describes_gpus(status, monkeypatch, capsys):
    gpu = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "gpu (torch built for CUDA: 12.8)\n" in text
    assert "  0  NVIDIA H100, compute capability 9.0, 80.0 GiB, 132 multiprocessors\n" in text
    assert "none:" not in text


@pytest.mark.parametrize(
    ("build", "reason"),
    [(None, "is built without CUDA"), ("12.8", "built for CUDA 12.8 but sees no usable device")],
    ids=["cpu-torch", "no-driver"],
)
def test_info_says_why_there_is_no_gpu(build, reason, status, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["info"]) == 0
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\n", "Some CPU @ 2.0GHz"),
        ("processor\t: 0\nCPU part\t: 0xd4f\n", "aarch64"),
    ],
    ids=["x86", "arm"],
)
def test_cpu_model(text, model, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert info._cpu_model(tmp_path / "cpuinfo") == model
    assert info._cpu_model(tmp_path / "absent") == "aarch64"


def test_demo_passes_its_options_on(demo):
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--out", "there", "--model", "some/vit", "--seed", "3"]) == 0
    assert demo.calls == [("demo_out", None, 0), ("there", "some/vit", 3)]


@pytest.mark.parametrize("kind", [ImportError, OSError, RuntimeError, ValueError])
def test_an_expected_error_is_one_line_and_status_1(kind, demo, capsys):
    demo.error = kind("what went wrong")
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "latemax demo: what went wrong\n"
    with pytest.raises(kind, match="what went wrong"):
        cli.main(["--traceback", "demo"])


def test_a_bug_keeps_its_traceback(demo):
    demo.error = KeyError("bug")
    with pytest.raises(KeyError, match="bug"):
        cli.main(["demo"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--seed", "x"], "invalid int value: 'x'"),
    ],
    ids=["nothing", "unknown", "bad-seed"],
)
def test_wrong_usage_exits_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_bench_prints_the_quick_table(monkeypatch, capsys):
    """With a fake clock: matmul at 1 TFLOP/s, reading at 10 GB/s, latemax 2 ms, eager 6 ms."""

    def times(runs, device, rounds):
        found = {"latemax": [2e-3] * rounds, "eager": [6e-3] * rounds}
        for name, run in runs.items():
            if name.startswith("matmul "):
                found[name] = [2 * int(name.removeprefix("matmul ")) ** 3 / 1e12] * rounds
            elif name not in found:
                # sum is a method of the documents; the other two are slower
                found[name] = [run.__self__.numel() * 4 / 10e9 if name == "sum" else 1.0] * rounds
        return found

    monkeypatch.setattr(bench, "interleaved", times)
    assert cli.main(["bench", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["binding"] for row in rows] == ["read", "read", "matmul"]
    assert rows[0]["reference_ms"] == pytest.approx((1000 * 196 + 32) * 128 * 4 / 10e9 * 1e3)
    assert rows[2]["reference_ms"] == pytest.approx(2 * 32 * 32 * 32 * 196 * 128 / 1e12 * 1e3)
    assert all(row["error"] < 0.1 and row["backend"] == "cpu" for row in rows)
    assert cli.main(["bench"]) == 0
    assert "    2.00 ms    6.00 ms   3.00x" in capsys.readouterr().out


def test_limits_are_the_best_of_several_shapes(monkeypatch):
    seconds = {"sum": [0.02, 0.03], "amax": [0.05, 0.01], "mv": [0.04, 0.04], "copy": [0.1, 0.2], "": [0.1, 0.2]}
    monkeypatch.setattr(bench, "interleaved", lambda runs, device, rounds: {name: seconds[name] for name in runs})
    found = bench.limits("cpu")
    assert found["read_gbs"] == pytest.approx((1 << 28) / 0.01 / 1e9)
    assert found["copy_gbs"] == pytest.approx(2 * (1 << 28) / 0.1 / 1e9)
    assert found["matmul_float32_tflops"] == pytest.approx(2 * 1536**3 / 0.1 / 1e12)
