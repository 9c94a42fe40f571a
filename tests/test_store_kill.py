"""Nothing committed is lost and nothing removed comes back, wherever the writer is killed or the power is cut.

``LATEMAX_STORE_KILL=1`` takes every write, sync, rename and deletion, and more power cuts (minutes); the default takes
each ninth of them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EVERY = "LATEMAX_STORE_KILL" in os.environ


def test_a_kill_or_a_power_cut_anywhere(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    shim = tmp_path / "disk_shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "native" / "disk_shim.c", "-ldl"], check=True
    )
    environment = os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    # in memory where there is such a folder: syncing a disk thousands of times takes minutes
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        command = [sys.executable, HERE / "store_kill_worker.py", shim, folder, *(("4", "1") if EVERY else ("1", "9"))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result)
    assert not result["wrong"], "\n".join(result["wrong"])
    assert all(n >= (25 if EVERY else 5) for n in result["kills"].values())
    assert all(n >= (100 if EVERY else 5) for n in result["power cuts"].values())
