"""The `latemax` command: what `info` tells, what `demo` hands on, and how errors end."""

import json
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from latemax import _info, cli

STATUS = {"triton": (False, "no CUDA device"), "cpu": (True, "always"), "reference": (True, "always")}


@pytest.fixture
def status(monkeypatch):
    monkeypatch.setattr("latemax.ops.dispatch.backend_status", lambda: STATUS)


@pytest.fixture
def demo(monkeypatch):
    """Calls to the demo are recorded; what `demo.error` holds is raised."""
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


def test_info_json_tells_versions_and_devices(status, capsys):
    info = info_json(capsys)
    assert info["packages"]["torch"] == metadata.version("torch")
    assert info["packages"]["numpy"] == metadata.version("numpy")
    assert info["cpu"]["torch_threads"] == torch.get_num_threads()
    assert info["cpu"]["cores"] >= 1
    assert info["cpu"]["model"]
    assert len(info["cuda"]["devices"]) == torch.cuda.device_count()
    assert bool(info["cuda"]["devices"]) != bool(info["cuda"]["reason"])


def test_info_tells_which_backends_work_and_why_not(status, capsys):
    assert info_json(capsys)["backends"] == {
        "triton": {"usable": False, "reason": "no CUDA device"},
        "cpu": {"usable": True, "reason": "always"},
        "reference": {"usable": True, "reason": "always"},
    }
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
    monkeypatch.setattr(_info, "OPTIONAL", ("no-such-package",))
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
    assert _info._cpu_model(tmp_path / "cpuinfo") == model
    assert _info._cpu_model(tmp_path / "absent") == "aarch64"


def test_demo_hands_its_options_on(demo):
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
    from latemax import _bench

    limits = dict(matmul_float32_tflops=1.0, matmul_bfloat16_tflops=1.0, read_gbs=10.0)
    monkeypatch.setattr(_bench, "limits", lambda device, rounds: limits)
    monkeypatch.setattr(_bench.quick, "__defaults__", (2,))
    assert cli.main(["bench", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3
    for row in rows:
        assert row["latemax_ms"] > 0 and row["eager_ms"] > 0 and row["error"] < 0.1
        assert row["binding"] in ("matmul", "read")
    # 2 · 1000 · 32 · 196 · 128 FLOPs at 1 TFLOP/s, or its documents at 10 GB/s
    assert rows[0]["allowed_ms"] == pytest.approx(1000 * 196 * 128 * 4 / 10e9 * 1e3, rel=0.01)
    assert cli.main(["bench"]) == 0
    assert "of limit" in capsys.readouterr().out
