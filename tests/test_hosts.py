"""latemax.compat next to the hosts' own functions, each in a process of its own: hosts pin versions of each other.

`make test-hosts` fills the folder that LATEMAX_HOSTS names: a folder per host, and `libs`. Without it, hosts that are
not installed are skipped. vLLM is a stand-in. LATEMAX_HOST_CASES is how many inputs hypothesis makes for a check.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("LATEMAX_HOSTS")
PROGRAM = Path(__file__).parent / "programs" / "host_parity.py"
HOSTS = sorted({path.stem for path in (PROGRAM.parent / "parity").glob("*.py")} - {"common", "retrieval"})


def run_parity(host, folder):
    folders = [str(Path(folder).resolve() / name) for name in (host, "libs")] if folder else []
    path = os.pathsep.join([*folders, str(PROGRAM.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, str(PROGRAM), host], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.parametrize("host", HOSTS)
def test_parity(host):
    if FOLDER:
        assert (Path(FOLDER) / host).is_dir() or host == "vllm", f"LATEMAX_HOSTS={FOLDER} has no folder {host}"
    elif host != "vllm" and importlib.util.find_spec(host) is None:
        pytest.skip(f"{host} is not installed, and LATEMAX_HOSTS names no folder with it")
    run = run_parity(host, FOLDER)
    if run.returncode == 77 and not FOLDER:
        pytest.skip(run.stdout.strip().splitlines()[-1])
    assert run.returncode == 0, run.stdout + run.stderr
    counters = json.loads(run.stdout.splitlines()[-1])
    assert all(n > 0 for n in counters["tried"].values()) and sum(counters["tried"].values()) > 10, counters


def test_a_missing_host_is_a_skip_with_a_reason(tmp_path):
    run = run_parity("nothing_of_this_name", tmp_path)
    assert run.returncode == 77
    assert "nothing_of_this_name cannot be imported: No module named 'nothing_of_this_name'" in run.stdout
    environment = {key: value for key, value in os.environ.items() if key not in ("LATEMAX_HOSTS", "PYTHONPATH")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"{__file__}::test_parity[qdrant_client]",
    ]
    if importlib.util.find_spec("qdrant_client") is None:
        report = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROGRAM.parents[2]).stdout
        assert "1 skipped" in report and "qdrant_client is not installed, and LATEMAX_HOSTS names no folder" in report


def test_every_host_is_tested_and_pinned():
    from latemax.compat._targets import HOSTS as PATCHED

    assert {*HOSTS} == {*PATCHED, "lancedb"}
    lines = (PROGRAM.parents[2] / "requirements" / "hosts.txt").read_text().splitlines()
    folders = dict(line.split(maxsplit=1) for line in lines if not line.startswith("#"))
    assert {*folders} == {*HOSTS, "libs"} - {"vllm"}
    for folder, requirements in folders.items():
        assert all("==" in requirement for requirement in requirements.split()), folder


def test_suites_without_hosts():
    from benchmarks import harness
    from benchmarks.runs import calmest
    from benchmarks.suites import host_parity, hosts

    parts = {host: hosts.measure_one(host, tiny=True) for host in ("vllm", "lists")}
    rows = [row for part in parts.values() for row in part["rows"]]
    versions = {host: part["version"] for host, part in parts.items()}
    text = hosts.table(dict(machine=harness.machine(), versions=versions, rows=rows))
    assert text.count("\n| stand-in for vLLM | ") == 1 and text.count("\n| latemax ") == 2
    assert {*hosts.HOSTS} == {*HOSTS, "lists"}
    calm = [{**row, "host_ms": row["host_ms"] / 2, "ours_ms": row["ours_ms"] / 2} for row in rows[:1]]
    runs = [dict(machine={"commit": commit}, versions={}, rows=x) for commit, x in (("a", rows), ("b", calm))]
    whole = calmest(runs, [*hosts.HOSTS])
    assert whole["rows"] == [*calm, *rows[1:]] and whole["machine"]["commit"] == "a, b" and whole["runs"] == 2
    counters = {"tried": {"maxsim": 7}, "refused": {"maxsim": 2}, "differs": {"why": 1, "never": 0}}
    text = host_parity.table(dict(machine=harness.machine(), cases=5, hosts={"mteb": counters}))
    assert "| mteb | maxsim | 7 | 2 | 0 |" in text and "| mteb | why |  |  | 1 |" in text and "never" not in text
