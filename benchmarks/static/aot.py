"""What the Triton kernels become on GPUs that need not be here: ``shapes.builds()`` compiled ahead of time.

    python -m benchmarks.static.aot [--arch 80 90 100] [--short] [--json FILE]

A part of ``latemax.warmup`` compiles what a call would launch, under a driver that launches nothing; each kernel is
then taken apart: registers, spills, shared memory, matrix instructions and the length of the innermost loop that holds
one. Needs triton (it carries ptxas, cuobjdump and nvdisasm) and no GPU.

A complete result is stored with a digest of everything that decides it. The tests read the stored rows while the digest
holds, since compiling takes minutes; afterwards they compile, until the result is written again.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import harness, internals, sass
from benchmarks.internals import tiles
from benchmarks.shapes import KINDS, LONG, SHORT, Build, Shape, builds
from benchmarks.tables import Table, markdown

ARCHES = (80, 90, 100)
# of a multiprocessor of sm_90, and what a block takes on top
REGISTERS, SHARED_BYTES, BLOCK_BYTES = 65536, 233472, 1024
LENGTHS = (196, 300, 400)
STORED = harness.RESULTS / "aot.json"
SOURCES = (
    "kernels/*.py", "latemax/ops/tiles.*", "latemax/ops/backends/*triton*.py", "latemax/warm.py",
    "benchmarks/static/aot.py", "benchmarks/internals.py", "benchmarks/null_driver.py", "benchmarks/sass.py",
    "benchmarks/shapes.py",
)  # fmt: skip
# the null driver of a worker process, which compiles for one architecture
null: Any = None


def start_worker(arch: int) -> None:
    global null
    null = internals.install_null_driver(arch)
    torch.set_num_threads(1)


def label(build: Build) -> str:
    """As "half dim 128 l_q 32 n_q 16 d_masked=True": flags are the words with "="."""
    words = [f"{build.kind} dim {build.dim} l_q {build.l_q}"]
    if build.n_q > 1:
        words.append(f"n_q {build.n_q}")
    if build.layout != "dense":
        words.append(f"layout={build.layout}")
    if build.l_d != LONG:
        words.append(f"l_d={build.l_d}")
    words += ["train=True"] * build.train + ["d_masked=True"] * build.d_masked
    if build.normalize:
        dense = build.layout == "dense" and build.d_kind is None
        words.append(f"norm={internals.triton_launch(shape_of(build), null.arch).norm}" if dense else "normalize=True")
    words += [f"{name}={kind}" for name, kind in (("q", build.q_kind), ("d", build.d_kind)) if kind]
    words += [f"bounds={build.bounds}"] * (build.bounds != "")
    return " ".join(words + ["argmax=True"] * build.return_argmax)


def shape_of(build: Build) -> Shape:
    return Shape(
        build.n_q, 1, build.l_q, build.l_d, build.dim, KINDS[build.kind][0], masked=build.d_masked,
        normalize=build.normalize, argmax=build.return_argmax,
    )  # fmt: skip


def compile_build(build: Build) -> tiles.TileConfig | None:
    """Compiles what the call launches; returns the tile of its forward, None if that is of smooth maxima."""
    name, precision = KINDS[build.kind]
    dtype = getattr(torch, name)
    torch.set_float32_matmul_precision(precision)
    if build.layout == "smooth":
        internals.warm_smooth(build.dim, build.l_q, dtype, build.train)
        return None
    options = build._asdict()
    options.pop("kind")
    batch = internals.warm(**options, dtype=dtype, device="cpu", backend="triton")
    return internals.tile_of(batch, build.return_argmax or build.train, build.bounds)


def rows_of(build: Build) -> list[dict[str, Any]]:
    """In a worker: a row for each kernel that the call loads and no call of this worker loaded before."""
    before = len(null.built)
    tile = compile_build(build)
    rows = []
    for built in null.built[before:]:
        row = dict(
            arch=null.arch, kernel=built.name, case=label(build), num_warps=built.num_warps,
            num_stages=built.num_stages, **inspect(built.cubin), shared=built.shared,
            cubin=hashlib.sha256(built.cubin).hexdigest()[:16],
        )  # fmt: skip
        if tile is not None and built.name == "forward_kernel":
            itemsize = getattr(torch, KINDS[build.kind][0]).itemsize
            row |= dict(tile=[*tile], dim=build.dim, estimate=tiles.shared_bytes(tile, build.dim, itemsize))
        rows.append(row)
    return rows


def inspect(cubin: bytes) -> dict[str, int]:
    """Registers, spills, instructions and the hottest loop of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = sass.resource_usage(file.name), sass.disassembly(file.name)
    loop = sass.hottest_loop(code)
    return dict(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=sass.spills(code), loop_spills=sass.spills("\n".join(loop)),
        wgmma=sass.count("[HI]GMMA", code), mma=sass.count("[HDI]MMA", code), utcmma=sass.count(r"UTC\w*MMA", code),
        loop=len(loop), alu=sass.alu(loop), loop_mma=sum("MMA" in name for name in sass.opcodes(loop)),
        vector_loads=sass.count(r"LDG\S*\.128", code),
    )  # fmt: skip


def sources() -> str:
    """A digest of what decides the rows: triton's version and the files that choose, compile and inspect kernels."""
    digest = hashlib.sha256(importlib.metadata.version("triton").encode())
    for path in sorted(path for pattern in SOURCES for path in harness.ROOT.glob(pattern)):
        digest.update(f"\n{path.relative_to(harness.ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def stored_or_measured() -> list[dict[str, Any]]:
    """The stored rows if they are those of the present sources, else rows compiled now."""
    stored = json.loads(STORED.read_text())
    return stored["rows"] if stored["sources"] == sources() else measure()


def measure(
    arches: Sequence[int] = ARCHES, tiny: bool = False, jobs: Sequence[Build] | None = None
) -> list[dict[str, Any]]:
    """A row for each distinct kernel of the jobs, by default all builds."""
    if jobs is None:
        jobs = [build for build in builds() if not tiny or (build.kind, build.dim, build.l_q) == ("half", 128, 16)]
    # processes with a fresh import of triton, in which the interpreter is off; one architecture each
    environment = os.environ.pop("TRITON_INTERPRET", None)
    rows: dict[tuple, dict] = {}
    try:
        for arch in arches:
            with concurrent.futures.ProcessPoolExecutor(
                os.cpu_count(), multiprocessing.get_context("spawn"), start_worker, (arch,)
            ) as pool:
                for found in pool.map(rows_of, jobs):
                    for row in found:
                        # two calls may launch the same kernel: the first names it
                        rows.setdefault((arch, row["kernel"], row.pop("cubin")), row)
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment
    return list(rows.values())


def table(result: dict[str, Any]) -> str:
    """The sm_90 builds that most calls run: half precision at dim 128. The others are in the JSON."""
    head = ["kernel", "case", "registers", "spills", "shared bytes", "wgmma", "inner loop"]
    keys = ["kernel", "case", "registers", "spills", "shared", "wgmma", "loop"]
    rows = result["rows"]
    kept = [
        row for row in rows if row["arch"] == 90 and re.match(r"(half|bf16) dim 128\b", row["case"]) and row["loop"]
    ]
    spilled = sum(row["spills"] > 0 for row in rows)
    return markdown(head, [[row[key] for key in keys] for row in kept]) + (
        f"\n{len(kept)} of {len(rows)} builds, {spilled} of which spill; the others (sm_80, sm_100, other dims and "
        "dtypes) are in benchmarks/results/aot.json.\n"
    )


def full_table(result: dict[str, Any]) -> str:
    names = ["arch", "kernel", "case", "registers", "spills", "shared", "wgmma", "mma", "utcmma", "loop",
             "vector_loads"]  # fmt: skip
    return markdown(names, [[row[name] for name in names] for row in result["rows"]])


def measure_short() -> list[dict[str, Any]]:
    """Documents of up to 400 tokens, against the tiles of long ones: one query, half precision, dim 128, sm_90."""
    flags = itertools.product((16, 32, 64), (False, True), (LONG, SHORT))
    return measure((90,), jobs=[Build("half", 128, l_q, l_d=l_d, return_argmax=argmax) for l_q, argmax, l_d in flags])


def short_table(result: dict[str, Any]) -> str:
    """From --short."""
    lines = []
    for row in result["rows"]:
        tile = tiles.TileConfig(*row["tile"])
        warps = REGISTERS // (-(-row["registers"] // 8) * 8 * 32)
        blocks = min(warps // tile.num_warps, SHARED_BYTES // (row["shared"] + BLOCK_BYTES))
        under_way = blocks * (tile.num_stages - 1) * tile.block_d * 256 // 1024
        padding = ", ".join(f"{-(-l_d // tile.block_d) * tile.block_d / l_d - 1:.0%}" for l_d in LENGTHS)
        lines.append(
            [
                f"{tile.block_q} × {tile.block_d}", "yes" if "argmax" in row["case"] else "",
                "peeled" if tile.peel else "in the loop", row["registers"], row["spills"], row["shared"], blocks,
                f"{under_way} KB", row["loop"], row["alu"], padding,
            ]
        )  # fmt: skip
    head = [
        "tile", "argmax", "last tile", "registers", "spills", "shared bytes", "blocks", "on the way", "inner loop",
        "ALU instructions", f"padding of {', '.join(map(str, LENGTHS))} tokens",
    ]  # fmt: skip
    return markdown(head, lines) + (f"\ntriton {result['triton']}, commit {result['commit']}, {result['date']}.\n")


TABLES = {"aot": Table("aot", table), "aot-short": Table("aot-short", short_table)}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHES)
    parser.add_argument("--short", action="store_true", help="tiles of short documents against those of long ones")
    options = parser.parse_args()
    if options.short:
        machine = harness.machine()
        result = dict(
            rows=measure_short(), triton=importlib.metadata.version("triton"), commit=machine["commit"],
            date=machine["date"],
        )  # fmt: skip
        harness.finish(result, short_table, options.json)
        return
    whole = tuple(options.arch) == ARCHES and not options.tiny
    result = dict(sources=sources() if whole else "a part of the builds", rows=measure(options.arch, options.tiny))
    harness.finish(result, full_table, options.json)


if __name__ == "__main__":
    main()
