"""The native CPU kernel under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer, without Python.

Torch's OpenMP runtime is not compiled for ThreadSanitizer: the tests use plain threads instead.
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
VNNI = ["-mavx512vnni", "-mavx512vpopcntdq"]
TILES = ["-include", ROOT / "tests/native/tiles.h"]
CPUINFO = Path("/proc/cpuinfo")
FEATURES = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
HAS_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= FEATURES
HAS_VNNI = HAS_AVX512 and {"avx512_vnni", "avx512_vpopcntdq"} <= FEATURES
# The AMX level runs on every processor: the tests emulate its tile registers, and without AVX-512 the compiler makes
# its vectors of shorter ones. Optimised, these would compile for minutes instead of seconds.
PIECES = ["-O0"]
LEVELS = {
    "level_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "level_avx512": AVX512,
    "level_avx512_bf16": [*AVX512, "-mavx512bf16"],
    "codes_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "codes_avx512": AVX512,
    "codes_avx512_vnni": [*AVX512, *VNNI] if HAS_VNNI else PIECES,
    "codes_amx_int8": [*TILES, *(AVX512 if HAS_AVX512 else PIECES)],
    "level_amx_bf16": [*TILES, *(AVX512 if HAS_AVX512 else PIECES)],
    "levels": TILES,
}
COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(
    "sanitizer, values",
    [
        # which memory is shared does not depend on the values in it, and ThreadSanitizer doubles the time
        ("thread", "ordinary"),
        ("address,undefined", "all"),
    ],
)
def test_no_finding(sanitizer, values, tmp_path):
    flags = ["-std=c++17", "-O1", "-g1", "-w", "-Wno-psabi", "-DLATEMAX_OWN_THREADS"]
    checks = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    if "address" in sanitizer:
        # checks as calls: a file of unrolled loops compiles in 12 s instead of 40 s
        checks += ["--param", "asan-instrumentation-with-call-threshold=100"]
    (tmp_path / "none.cpp").write_text("int main() {}")
    probe = subprocess.run([COMPILER, *checks, tmp_path / "none.cpp", "-o", tmp_path / "none"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"g++ here has no -fsanitize={sanitizer}")

    def compiled(source: Path) -> Path:
        extra = [*LEVELS.get(source.stem, [])] if platform.machine() == "x86_64" else []
        # the driver's plain loops would take 30 s under ThreadSanitizer; its allocations are checked even so
        extra += ["-O2"] if source.stem == "driver" else checks
        out = tmp_path / f"{source.stem}.o"
        subprocess.run([COMPILER, *flags, *extra, "-c", source, "-o", out], check=True)
        return out

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*(ROOT / "csrc" / "cpu").glob("*.cpp"), ROOT / "tests/native/driver.cpp"]))
    driver = tmp_path / "driver"
    subprocess.run([COMPILER, *checks, *objects, "-o", driver, "-pthread", "-ldl"], check=True)
    # ThreadSanitizer of GCC 12 cannot map its shadow memory if the kernel randomises more than 28 address bits
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*fixed, driver, values], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith("0 wrong\n")
