"""The native CPU kernel under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer, without Python.

Torch's OpenMP runtime is not compiled for ThreadSanitizer: plain threads take its place.
"""

import concurrent.futures
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
LEVELS = {
    "level_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "level_avx512": AVX512,
    "level_avx512_bf16": [*AVX512, "-mavx512bf16"],
    # on tile registers of the tests' own, whatever the processor; what debuggers want of vectors in pieces takes long
    "level_amx_bf16": ["-include", ROOT / "tests/native/tiles.h", "-g0"],
    "maxsim": ["-include", ROOT / "tests/native/tiles.h"],
}
COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="g++ is not there")
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_finding(sanitizer, tmp_path):
    flags = ["-std=c++17", "-O1", "-g", "-w", "-DLATEMAX_OWN_THREADS"]
    checks = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    (tmp_path / "none.cpp").write_text("int main() {}")
    probe = subprocess.run([COMPILER, *checks, tmp_path / "none.cpp", "-o", tmp_path / "none"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"g++ here has no -fsanitize={sanitizer}")

    def compiled(source: Path) -> Path:
        extra = [*LEVELS.get(source.stem, [])] if platform.machine() == "x86_64" else []
        # the driver's plain loops took 30 s under ThreadSanitizer; its memory is guarded all the same
        extra += ["-O2"] if source.stem == "driver" else checks
        out = tmp_path / f"{source.stem}.o"
        subprocess.run([COMPILER, *flags, *extra, "-c", source, "-o", out], check=True)
        return out

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*(ROOT / "csrc" / "cpu").glob("*.cpp"), ROOT / "tests/native/driver.cpp"]))
    driver = tmp_path / "driver"
    subprocess.run([COMPILER, *checks, *objects, "-o", driver, "-pthread", "-ldl"], check=True)
    # ThreadSanitizer of GCC 12 cannot place its shadow where addresses are drawn from more than 28 bits
    still = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*still, driver], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith("0 wrong\n")
