"""What nvcc makes of the CUDA kernels (csrc/cuda), on a machine that needs no GPU.

    python -m benchmarks.static.cuda_aot [--json benchmarks/results/cuda-aot.json]

Builds the wheel and takes the library in it apart: registers, spills, matrix instructions and the shortest loop that
holds one, a row for each kernel. Asks the sm_90 kernel's planner how it cuts each registered shape. Needs nvcc, g++ and
triton (which carries cuobjdump and nvdisasm).
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from typing import Any

from benchmarks import harness, sass, shapes
from benchmarks.tables import Table, markdown

GRADIENT = re.compile(r"latemax\d+(grad_d|grad_q|sum_splits)INS_\d(B?F16)ELi(\d+)E")
MULTIPROCESSORS, SHARED_MEMORY = 132, 232448  # of an H100 and an H200
# sm_90 instructions of the pipe that maxima, comparisons and selections share, 16 lanes a clock in each quarter
ALU = re.compile(r"(FMNMX|FSETP|FSEL|SEL|ISETP|IADD3|LOP3|SHF|LEA|VIADD|PLOP3|VIMNMX|I2FP)$")
FORWARD = re.compile(r"(sm\d+)7forwardINS_\d(B?F16|I8)ELi(\d+)E(?:Li(\d+)E)?Lb([01])")


def kernels(library: pathlib.Path) -> list[dict]:
    """A row for every kernel and architecture in a library."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sass.tool("cuobjdump", "--extract-elf", "all", library.resolve(), cwd=folder)
        for cubin in sorted(pathlib.Path(folder).glob("*.cubin")):
            arch = re.search(r"sm_(\d+a?)", cubin.name)[0]
            usage, code = sass.resource_usage(cubin), sass.disassembly(cubin)
            bodies = dict(re.findall(r"\.section\s+\.text\.(\S+?),.*?\n(.*?)(?=\n\t?\.section|\Z)", code, re.DOTALL))
            for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
                rows.append(dict(arch=arch, **describe(name), registers=int(registers), stack=int(stack),
                                 **count(bodies[name])))  # fmt: skip
    return sorted(rows, key=lambda row: (row["arch"], row["kernel"], row["instance"], row["argmax"], row["dtype"]))


def describe(mangled: str) -> dict[str, Any]:
    """Kernel, dtype, instance and argmax of a mangled name. An instance is the query tokens of a warpgroup and, where
    they stay in registers, the dims; of a gradient the dims that its warps hold."""
    found = FORWARD.search(mangled)
    if found:
        arch, dtype, rows, steps, argmax = found.groups()
        instance = f"{rows} tokens" if steps is None else f"{64 * int(rows)} tokens"
        # a step takes 32 bytes of a token
        instance += f", {(32 if dtype == 'I8' else 16) * int(steps)} dims" if int(steps or 0) else ""
        return dict(kernel=f"forward_{arch}", dtype=dtype.lower(), instance=instance, argmax=argmax == "1")
    found = GRADIENT.search(mangled)
    if found:
        kernel, dtype, elements = found.groups()
        return dict(kernel=kernel, dtype=dtype.lower(), instance=f"{32 * int(elements)} dims", argmax=False)
    name = re.search(r"\d+(unit_factors|lengths|units|pieces|sum_parts)", mangled)[1]
    dtype = re.search(r"INS_\d(B?F16|I8)E", mangled)
    argmax = "piecesILb1E" in mangled
    return dict(kernel=name, dtype=dtype[1].lower() if dtype else "", instance="", argmax=argmax)


def count(code: str) -> dict[str, int]:
    """Instructions of one kernel."""
    return dict(
        spills=sass.spills(code), hgmma=sass.count("HGMMA", code), hmma=sass.count("HMMA", code),
        igmma=sass.count("IGMMA", code), imma=sass.count("IMMA", code), bulk_copies=sass.count("UTMALDG", code),
        async_copies=sass.count("LDGSTS", code),
        instructions=len(re.findall(r"/\*[0-9a-f]{4,5}\*/", code)), loop=len(sass.hottest_loop(code)),
        alu=maxima(code),
    )  # fmt: skip


def maxima(code: str) -> dict[str, int]:
    """ALU instructions of a warp that takes the maxima of its 16 rows of 64 query tokens x 64 document tokens, by the
    blocks without a branch that hold the maxima. Of a full tile, of one that is masked or normalised, of 16 tokens at
    the end of a document, and of the last of those, some of which are left out. Empty without wgmma."""
    blocks: list[list[str]] = [[]]
    for line in code.splitlines():
        if re.match(r"\s*\.L_x_\d+:", line):
            blocks.append([])
        elif re.search(r"/\*[0-9a-f]{4,5}\*/", line):
            blocks[-1].append(line)
            if re.search(r"\bBRA\b|BSYNC|EXIT", line):
                blocks.append([])
    found: dict[int, list[int]] = {}
    for block in blocks:
        names = sass.opcodes(block)
        # a tree over 16 or 4 values of two rows; without argmax the running maximum is one more each
        found.setdefault(names.count("FMNMX"), []).append(sum(bool(ALU.match(name)) for name in names))
    if "GMMA" not in code:
        return {}
    full, group = (found[30], found[6]) if 30 in found else (found[32], found[8])
    return dict(full=min(full), scaled=max(full), group=min(group), last=max(group))


def plans(folder: pathlib.Path) -> dict[str, dict[str, int]]:
    """How the sm_90 kernel cuts each bfloat16 shape without a mask, and the work of the thread block that has most:
    tiles, documents and query blocks."""
    path = harness.ROOT / "tests" / "cuda_emulator" / "build.py"
    spec = importlib.util.spec_from_file_location("cuda_emulator_build", path)
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    planner = build.planner_alone(folder, SHARED_MEMORY, MULTIPROCESSORS)
    found = {}
    for shape in dict.fromkeys(shapes.CORE + shapes.VARIANTS):
        if shape.dtype != "bfloat16" or shape.masked:
            continue
        call = (shape.n_q, shape.n_d, shape.l_q, shape.l_d, shape.dim, shape.own)
        plan = planner.plan(*call)
        of_document, busiest = -(-shape.l_d // plan["tile"]), (0, 0, 0)
        for index in range(plan["grid"]):
            walk = planner.walk(index, *call)
            tiles = sum(min(end, of_document) - first for _, _, first, end, _ in walk)
            busiest = max(busiest, (tiles, len(walk), len({block for block, *_ in walk})))
        found[shape.name] = plan | dict(zip(("tiles", "documents", "visits"), busiest, strict=True))
    return found


def build(folder: pathlib.Path) -> tuple[pathlib.Path, float]:
    """The wheel of this checkout with the CUDA kernels, and how many seconds it took."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
         "--wheel-dir", folder, harness.ROOT],
        check=True, env=os.environ | {"LATEMAX_BUILD_CUDA": "1"},
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel, time.perf_counter() - start


def unpacked(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The CUDA library of a wheel, extracted."""
    with zipfile.ZipFile(wheel) as archive:
        return pathlib.Path(archive.extract("latemax/ops/_cuda.abi3.so", folder))


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        wheel, seconds = build(folder)
        library = unpacked(wheel, folder)
        version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        machine = harness.machine()
        facts = dict(
            nvcc=re.search(r"V([\d.]+)", version)[1], cores=os.cpu_count(), seconds=round(seconds, 1),
            wheel=wheel.name, wheel_bytes=wheel.stat().st_size, library_bytes=library.stat().st_size,
            commit=machine["commit"], date=machine["date"],
        )  # fmt: skip
        return dict(build=facts, rows=kernels(library), plans=plans(folder))


def table(result: dict) -> str:
    build = result["build"]
    head = ["arch", "kernel", "tokens", "instance", "argmax", "registers", "spills", "HGMMA, IGMMA", "HMMA, IMMA",
            "instructions", "loop"]  # fmt: skip
    rows = []
    for row in result["rows"]:
        # float16 and bfloat16 compile alike; one that differed would have a row of its own
        tokens = {"": "", "i8": "int8"}.get(row["dtype"], "half")
        line = [row["arch"], row["kernel"], tokens, row["instance"], "yes" if row["argmax"] else "", row["registers"],
                row["spills"], row["hgmma"] + row["igmma"], row["hmma"] + row["imma"], row["instructions"],
                row["loop"]]  # fmt: skip
        if line not in rows:
            rows.append(line)
    return markdown(head, rows) + (
        f"\nnvcc {build['nvcc']}; `{build['wheel']}`, {build['wheel_bytes'] / 1e6:.2f} MB, built in "
        f"{build['seconds']:.0f} s on {build['cores']} cores, the native CPU kernels included; commit "
        f"{build['commit']}, {build['date']}.\n"
    )


TABLES = {"cuda-aot": Table("cuda-aot", table)}


def main() -> None:
    options = harness.parser(__doc__, tiny=False).parse_args()
    harness.finish(measure(), table, options.json)


if __name__ == "__main__":
    main()
