"""What nvcc makes of the CUDA kernels (csrc/cuda), on a machine that needs no GPU.

    python -m benchmarks.cuda_aot [--json benchmarks/results/cuda-aot.json]

Builds the wheel and takes the library in it apart: registers, spills, matrix instructions and the shortest loop that
holds one, a row a kernel. Needs nvcc and triton (which carries cuobjdump and nvdisasm).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import zipfile

from benchmarks.aot import hottest_loop

ROOT = pathlib.Path(__file__).parents[1]
FORWARD = re.compile(r"(sm\d+)7forwardINS_\d(B?F16)ELi(\d+)ELb([01])")


def tool(name: str, *arguments, **options) -> str:
    import triton

    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True, **options).stdout


def kernels(library: pathlib.Path) -> list[dict]:
    """A row for every kernel and architecture in a library."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "--extract-elf", "all", library.resolve(), cwd=folder)
        for cubin in sorted(pathlib.Path(folder).glob("*.cubin")):
            arch = re.search(r"sm_(\d+a?)", cubin.name)[0]
            usage = tool("cuobjdump", "--dump-resource-usage", cubin)
            sass = tool("nvdisasm", "-c", cubin)
            bodies = dict(re.findall(r"\.section\s+\.text\.(\S+?),.*?\n(.*?)(?=\n\t?\.section|\Z)", sass, re.DOTALL))
            for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
                rows.append(dict(arch=arch, **describe(name), registers=int(registers), stack=int(stack),
                                 **count(bodies[name])))  # fmt: skip
    return sorted(rows, key=lambda row: (row["arch"], row["kernel"], row["columns"] or 0, row["argmax"], row["dtype"]))


def describe(mangled: str) -> dict:
    found = FORWARD.search(mangled)
    if found:
        return dict(kernel=f"forward_{found[1]}", dtype=found[2].lower(), columns=int(found[3]), argmax=found[4] == "1")
    name = re.search(r"\d+(inverse_norms|lengths|sum_parts)", mangled)[1]
    dtype = re.search(r"INS_\d(B?F16)E", mangled)
    return dict(kernel=name, dtype=dtype[1].lower() if dtype else "", columns=None, argmax=False)


def count(sass: str) -> dict:
    return dict(
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)), hgmma=len(re.findall(r"\bHGMMA", sass)),
        hmma=len(re.findall(r"\bHMMA", sass)), bulk_copies=len(re.findall(r"\bUTMALDG", sass)),
        async_copies=len(re.findall(r"\bLDGSTS", sass)), instructions=len(re.findall(r"/\*[0-9a-f]{4,5}\*/", sass)),
        loop=len(hottest_loop(sass)),
    )  # fmt: skip


def build(folder: pathlib.Path) -> tuple[pathlib.Path, float]:
    """The wheel of this checkout with the CUDA kernels, and how many seconds it took."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
         "--wheel-dir", folder, ROOT],
        check=True, env=os.environ | {"LATEMAX_BUILD_CUDA": "1"},
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel, time.perf_counter() - start


def unpacked(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    with zipfile.ZipFile(wheel) as archive:
        return pathlib.Path(archive.extract("latemax/ops/_cuda.abi3.so", folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the rows there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        wheel, seconds = build(folder)
        library = unpacked(wheel, folder)
        version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
        build_facts = dict(
            nvcc=re.search(r"V([\d.]+)", version)[1], cores=os.cpu_count(), seconds=round(seconds, 1),
            wheel=wheel.name, wheel_bytes=wheel.stat().st_size, library_bytes=library.stat().st_size,
            commit=commit.stdout.strip(), date=datetime.date.today().isoformat(),
        )  # fmt: skip
        data = dict(build=build_facts, rows=kernels(library))
    print(json.dumps(data, indent=1))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
