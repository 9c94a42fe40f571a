"""The CUDA extension as nvcc compiles it, on a machine that needs no GPU: the wheel, the libraries it loads and the
machine code of its kernels. Their results are checked by tests/test_cuda_emulated.py and, on a GPU, by the operator's
tests.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import CLEAN_ENV, PROGRAMS, ROOT, members, run, source  # noqa: F401

NVCC = shutil.which("nvcc") or os.environ.get("CUDA_HOME")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="there is no CUDA toolkit (nvcc on PATH, or CUDA_HOME)")
needs_tools = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton carries cuobjdump")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("cuda") / "out"
    # without the native CPU kernels, which would double the time
    env = {"LATEMAX_BUILD_CUDA": "1", "LATEMAX_BUILD_CPU": "0"} | (
        {"CUDA_HOME": os.environ["CUDA_HOME"]} if "CUDA_HOME" in os.environ else {}
    )
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--verbose", "--wheel-dir", out]
    printed = run(sys.executable, "-m", "pip", "wheel", *options, source, env=env, timeout=400)
    (made,) = out.iterdir()
    return made, printed


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory):
    from benchmarks.static import cuda_aot

    return cuda_aot.unpacked(wheel[0], tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def kernels(library):
    from benchmarks.static import cuda_aot

    return cuda_aot.kernels(library)


@needs_nvcc
def test_one_wheel_for_every_python_and_every_torch(wheel):
    made, printed = wheel
    assert re.fullmatch(r"latemax-[\d.]+-cp310-abi3-linux_\w+\.whl", made.name)
    assert "latemax/ops/_cuda.abi3.so" in members(made)
    # (C75xx): ptxas serialised wgmma or ignored setmaxnreg
    assert not re.search(r"\(C75\d\d\)|warning #|error:", printed)
    (line,) = (line for line in printed.splitlines() if line.strip().startswith("latemax: "))
    assert "wheel without the native CPU kernels: LATEMAX_BUILD_CPU=0" in line


@needs_nvcc
def test_the_library_loads_without_a_driver_and_names_what_is_missing(library):
    answer, gpu = json.loads(run(sys.executable, PROGRAMS / "load_cuda.py", library))
    assert re.fullmatch(r"[1-9]\d* bytes", answer) if gpu else "CUDA driver" in answer or "device" in answer


@needs_nvcc
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_library_needs_neither_torch_nor_cuda(library):
    needed = re.findall(r"NEEDED.*\[(\S+?)\.so", run("readelf", "-d", library))
    assert needed and not {name for name in needed if "torch" in name or "cuda" in name or "c10" in name}
    undefined = re.findall(r"UND (\w+)", run("readelf", "-W", "--dyn-syms", library))
    assert not {name for name in undefined if name.startswith(("cu", "aoti", "torch")) or "c10" in name}


@needs_nvcc
@needs_tools
def test_no_spills_and_the_right_instructions(kernels):
    forward = [row for row in kernels if row["kernel"].startswith("forward")]
    steps = {"f16": 16, "bf16": 16, "i8": 32}  # dims of one product

    def instances(arch, dtype):
        if arch == "sm_80":
            return [f"{tokens} tokens" for tokens in (32, 64)]
        dims = ["", *(f", {count * steps[dtype]} dims" for count in (4, 6, 8))]
        return [f"{tokens} tokens{kept}" for tokens in (64, 128) for kept in dims]

    assert {(row["arch"], row["dtype"], row["instance"], row["argmax"]) for row in forward} == {
        (arch, dtype, instance, argmax)
        for arch in ("sm_80", "sm_90a")
        for dtype in steps
        for instance in instances(arch, dtype)
        for argmax in (False, True)
    }
    for row in kernels:
        assert row["spills"] == 0 and row["stack"] == 0, row
    for row in forward:
        hopper = row["arch"] == "sm_90a"
        codes = row["dtype"] == "i8"
        products = row["igmma" if codes else "hgmma"]
        others = [row[key] for key in ("hgmma", "hmma", "igmma", "imma")]
        assert sum(others) == (products if hopper else row["imma" if codes else "hmma"]) > 0, row
        if hopper:
            # a chain for each block of 64 query tokens, and one more for a warpgroup that holds half
            chains = 3 if row["instance"].startswith("128") else 1
            if ", " in row["instance"]:
                assert products == chains * int(row["instance"].split(", ")[1][:-5]) // steps[row["dtype"]], row
            else:
                # slabs of 4 steps and last ones of 1 to 4; ptxas peels some
                assert products >= chains * sum(4 + last for last in (1, 2, 3, 4)), row
        assert (row["bulk_copies"] > 0, row["async_copies"] == 0) == (hopper, hopper), row
        # sm_80: 128 threads, two blocks per multiprocessor; sm_90a: 384 threads, one block
        assert row["registers"] <= (168 if hopper else 255), row
    assert {row["arch"] for row in kernels if row["kernel"] == "unit_factors"} == {"sm_80", "sm_90"}
    gradients = [row for row in kernels if row["kernel"] in ("grad_d", "grad_q", "sum_splits")]
    assert len(gradients) == 2 * 2 * 4 * 3  # architectures, dtypes, numbers of dims, kernels
    for row in gradients:
        # blocks of 320 and 256 threads: two and four on a multiprocessor, one and two with more than 256 dims
        most = (96, 64) if row["instance"] in ("128 dims", "256 dims") else (200, 128)
        assert row["registers"] <= most[row["kernel"] != "grad_d"], row


@needs_nvcc
@needs_tools
def test_later_chips_find_ptx(library):
    from benchmarks import sass

    assert sass.tool("cuobjdump", "--list-ptx", library).count("sm_80.ptx") >= 2


@needs_nvcc
@needs_tools
def test_the_table_in_the_docs_lists_these_kernels(kernels):
    stored = json.loads((ROOT / "benchmarks" / "results" / "cuda-aot.json").read_text())
    keys = ("arch", "kernel", "dtype", "instance", "argmax")
    assert [[row[key] for key in keys] for row in stored["rows"]] == [[row[key] for key in keys] for row in kernels]


@pytest.mark.parametrize(
    ("switch", "path", "said"),
    [
        ("0", None, "LATEMAX_BUILD_CUDA=0"),
        ("1", "", "LATEMAX_BUILD_CUDA=1: there is no CUDA toolkit (nvcc on PATH, or CUDA_HOME)"),
        ("", "", "there is no CUDA toolkit (nvcc on PATH, or CUDA_HOME)"),
        ("yes", None, "LATEMAX_BUILD_CUDA must be 0, 1 or unset; got 'yes'"),
    ],
    ids=["0", "1", "unset", "yes"],
)
def test_the_switch(switch, path, said, tmp_path):
    env = CLEAN_ENV | {"LATEMAX_BUILD_CPU": "0", "LATEMAX_BUILD_CUDA": switch}
    env |= {} if path is None else {"PATH": path}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)
    text = done.stdout + done.stderr
    assert said in text and (done.returncode == 0) == (switch in ("0", "")), text
    if done.returncode == 0:
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("latemax: "))
        assert "pure Python wheel" in line and not list(Path(tmp_path).rglob("*.so"))
