"""latemax.compat next to the hosts' own functions, each in a process of its own: hosts pin versions of each other.

LATEMAX_HOSTS names a folder with a folder per host, filled by ``pip install --no-deps --target``.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("LATEMAX_HOSTS")
PROGRAM = Path(__file__).parent / "programs" / "host_parity.py"


@pytest.mark.parametrize("host", ["colpali_engine", "transformers", "sentence_transformers", "pylate"])
def test_parity(host):
    folders = [str(Path(FOLDER) / host)] if FOLDER and (Path(FOLDER) / host).is_dir() else []
    if not folders and importlib.util.find_spec(host) is None:
        pytest.skip(f"{host} is not installed, and LATEMAX_HOSTS names no folder with it")
    path = os.pathsep.join([*folders, str(PROGRAM.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, str(PROGRAM), host], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    if run.returncode == 77:
        pytest.skip(run.stdout.strip().splitlines()[-1])
    assert run.returncode == 0, run.stdout + run.stderr
