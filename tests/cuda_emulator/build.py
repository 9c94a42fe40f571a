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
        HERE / "warp.cpp",
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
    configure.argtypes = [ctypes.c_uint] + 4 * [ctypes.c_int]
    return module, configure


def program(source: Path) -> Path:
    """A program over the kernels, without Python."""
    folder = Path(built()[0].__spec__.origin).parent
    objects = [folder / f"{name}.o" for name in ("forward", "backward", "shared", "sm80", "sm90", "emulator", "warp")]
    out = folder / source.stem
    subprocess.run(
        ["g++", *FLAGS, f"-I{HERE}", f"-I{CSRC}", str(source), *map(str, objects), "-o", str(out)], check=True
    )
    return out


def products() -> int:
    """wgmma that were issued since the device was set."""
    count = ctypes.CDLL(built()[0].__spec__.origin).latemax_products
    count.restype = ctypes.c_int64
    return count()


PLAN = (
    "rows", "stages", "parts", "query_buffers", "warpgroups", "segments", "chunks", "blocks", "grid", "tile", "split",
)  # fmt: skip
ALL = 0x7FFFFFFF  # of a document's tiles


class Planner:
    """The plan of the sm_90 kernel, and the documents of its thread blocks, from a library with plan.cpp."""

    def __init__(self, library: ctypes.CDLL, shared: int, multiprocessors: int, launch_clocks: int = 4000) -> None:
        self._library, self._device = library, (shared, multiprocessors, launch_clocks)
        library.latemax_walk.restype = ctypes.c_int64

    def _call(self, n_q, n_d, l_q, l_d, dim, own, d_offsets):
        given = (ctypes.c_int64 * 9)(n_q, n_d, l_q, l_d, dim, own, *self._device)
        return given, None if d_offsets is None else (ctypes.c_int64 * len(d_offsets))(*d_offsets)

    def plan(self, n_q, n_d, l_q, l_d, dim, own=False, d_offsets=None) -> dict[str, int]:
        """Zeros where the call does not fit."""
        out = (ctypes.c_int64 * len(PLAN))()
        self._library.latemax_plan(*self._call(n_q, n_d, l_q, l_d, dim, own, d_offsets), out)
        return dict(zip(PLAN, out, strict=True))

    def walk(self, index: int, n_q, n_d, l_q, l_d, dim, own=False, d_offsets=None) -> list[tuple[int, ...]]:
        """Query block, document, first tile, end, piece of each document of a thread block."""
        most = 2 * n_d * max(1, n_q * -(-l_q // 8))
        out = (ctypes.c_int64 * (5 * most))()
        given = self._call(n_q, n_d, l_q, l_d, dim, own, d_offsets)
        count = self._library.latemax_walk(*given, index, out, ctypes.c_int64(most))
        return [tuple(out[5 * i : 5 * i + 5]) for i in range(count)]


def planner(shared: int, multiprocessors: int, launch_clocks: int = 4000) -> Planner:
    return Planner(ctypes.CDLL(built()[0].__spec__.origin), shared, multiprocessors, launch_clocks)


def planner_alone(folder: Path, shared: int, multiprocessors: int) -> Planner:
    """Without the kernels and Python's headers, which take a minute."""
    library = folder / "plan.so"
    command = ["g++", *FLAGS, f"-I{HERE}", f"-I{CSRC}", "-shared", str(HERE / "plan.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return Planner(ctypes.CDLL(str(library)), shared, multiprocessors)
