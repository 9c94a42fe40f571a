"""Builds the CUDA kernels' own sources with a C++ compiler and the emulated device headers of this folder."""

import atexit
import concurrent.futures
import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
# exceptions end a fiber by longjmp, which the fortified one takes for a bug
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-DPy_LIMITED_API=0x030A0000"]


def why_not() -> str:
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the emulator needs Python.h"
    return ""


@functools.cache
def built():
    """The module that `latemax.ops._cuda` is on a GPU, and the function that sets the emulated device."""
    folder = Path(tempfile.mkdtemp(prefix="latemax-emulator-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sources = [
        *sorted((CSRC / "cuda").glob("*.cu")),
        CSRC / "binding_cuda.cpp",
        HERE / "emulator.cpp",
        HERE / "plan.cpp",
    ]
    include = [f"-I{HERE}", f"-I{CSRC}", f"-I{sysconfig.get_path('include')}"]

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", str(out)], check=True)
        return out

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "_cuda.abi3.so"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(library)], check=True)
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(library))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location("_cuda", str(library), loader=loader)
    )
    loader.exec_module(module)
    configure = ctypes.CDLL(str(library)).latemax_emulator
    configure.argtypes = [ctypes.c_uint, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return module, configure


def program(source: Path) -> Path:
    """A program over the kernels, without Python."""
    folder = Path(built()[0].__spec__.origin).parent
    objects = [folder / f"{name}.o" for name in ("forward", "backward", "shared", "sm80", "sm90", "emulator")]
    out = folder / source.stem
    subprocess.run(
        ["g++", *FLAGS, f"-I{HERE}", f"-I{CSRC}", str(source), *map(str, objects), "-o", str(out)], check=True
    )
    return out


def plan(n_q: int, l_q: int, dim: int, own: bool, shared: int, multiprocessors: int) -> tuple[int, ...]:
    """Rows, stages, parts of a tile, query buffers and warpgroups of a call on sm_90; zeros where it does not fit."""
    out = (ctypes.c_int * 5)()
    ask = ctypes.CDLL(built()[0].__spec__.origin).latemax_plan
    ask.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 3 + [ctypes.c_void_p]
    ask(n_q, l_q, dim, own, shared, multiprocessors, out)
    return tuple(out)
