"""What the compiled kernels should take on an H100 or H200: a prediction from static counts, never a measurement.

    python -m benchmarks.static.predict

For each registered shape that has a build in results/aot.json. A document tile needs: tensor-core clocks, issue slots
(length of the inner loop times warps, over four schedulers), shared-memory clocks (the tile written once, operands read
by every warpgroup instruction) and L2 clocks (the tile once). Blocks that share a multiprocessor overlap: the largest
of the four then counts ("overlapped"); a single block adds issue to multiplication ("serial"). Device memory is a floor
under both. Times are the kernel's, without launch and host.
"""

from __future__ import annotations

import json
import math
from typing import NamedTuple

from benchmarks import harness, internals, shapes
from benchmarks.internals import tiles
from benchmarks.tables import Table, markdown

ARCH = 90


class Chip(NamedTuple):
    name: str
    memory_tbs: float  # datasheet
    matmul_tflops: float = 989.0  # bfloat16, dense, datasheet
    multiprocessors: int = 132
    clock_ghz: float = 1.755
    l2_tbs: float = 5.5  # an assumption: what other MaxSim kernels imply on this chip
    flops_a_clock: int = 4096  # of one multiprocessor, bfloat16
    shared_bytes_a_clock: int = 128
    registers: int = 65536
    shared_bytes: int = 233472


H100, H200 = Chip("H100", 3.35), Chip("H200", 4.8)
# clocks of a program before its first product and after its last (query tile, first document tile, reduction): a guess
AROUND = 2000


class Prediction(NamedTuple):
    overlapped_us: float
    serial_us: float
    binding: str
    of_limit: float  # the shape's own limit (datasheet matmul rate or memory) over the overlapped time


def build(shape: shapes.Shape, rows: list[dict]) -> tuple[dict, tiles.Launch] | None:
    """(row of the AOT table, launch) of the forward build that sm_90 would run, or None."""
    launch = internals.triton_launch(shape, ARCH)
    flags = {flag for flag, given in (("d_masked=True", shape.masked), ("argmax=True", shape.argmax)) if given}
    flags |= {f"norm={launch.norm}"} if shape.normalize else set()
    for row in rows:
        if row["arch"] != ARCH or row["kernel"] != "forward_kernel" or not row["case"].startswith("half"):
            continue
        # the length of documents is in the tile
        named = {word for word in row["case"].split() if "=" in word and not word.startswith("l_d=")}
        if named == flags and tiles.TileConfig(*row["tile"]) == launch.tile and row["dim"] == shape.dim:
            return row, launch
    return None


def predict(shape: shapes.Shape, row: dict, launch: tiles.Launch, chip: Chip) -> Prediction:
    tile = launch.tile
    dim = tiles.padded_dim(shape.dim)
    steps = -(-shape.dim // tile.block_k)
    columns = tile.block_k * steps if shape.dim > tile.block_k else dim
    threads = 32 * tile.num_warps
    resident = min(
        chip.registers // (-(-row["registers"] // 8) * 8 * threads), chip.shared_bytes // (row["shared"] + 1024)
    )  # fmt: skip
    multiply = 2 * tile.block_q * tile.block_d * columns / chip.flops_a_clock
    issue = row["loop"] * tile.num_warps / 4 * steps
    written = 2 * tile.block_d * columns + (2 * tile.block_q * columns if steps > 1 else 0)
    read = 2 * columns * (tile.block_d + tile.block_q * tile.block_d / 64)
    shared = (written + read) / chip.shared_bytes_a_clock
    l2_a_clock = chip.l2_tbs * 1e3 / chip.multiprocessors / chip.clock_ghz
    # the mean of the random lengths
    part = (1 + 1 / shapes.SHORTEST) / 2 if shape.masked else 1
    tokens = shape.l_d * part
    n_tiles = math.ceil(tokens / tile.block_d)
    l2 = (2 * shape.dim * tokens / n_tiles) / l2_a_clock
    programs = -(-shape.n_q // launch.pack) * -(-shape.l_q // tile.block_q) * shape.n_d
    clocks = {"wgmma": multiply, "issue": issue, "shared memory": shared, "L2": l2}
    binding = max(clocks, key=clocks.__getitem__)

    def microseconds(a_tile: float, around: float) -> float:
        each = n_tiles * a_tile + around
        waves = max(programs / chip.multiprocessors, 1)
        return waves * each / chip.clock_ghz / 1e3

    memory = shape.bytes * part / chip.memory_tbs / 1e6
    if launch.norm == tiles.NORM_BEFORE:
        memory *= 2
    overlapped = microseconds(max(clocks.values()), AROUND / resident)
    serial = microseconds(max(multiply + issue, shared, l2), AROUND)
    if memory > overlapped:
        overlapped, binding = memory, "device memory"
    limit = max(memory, shape.flops * part / chip.matmul_tflops / 1e6)
    return Prediction(overlapped, max(serial, memory), binding, limit / overlapped)


def table(result: dict) -> str:
    """From a result of static.aot."""
    lines = []
    for shape in dict.fromkeys(shapes.CORE + shapes.VARIANTS):
        known = build(shape, result["rows"]) if shape.dtype == "bfloat16" else None
        if known is None:
            continue
        row, launch = known
        fast, slow = predict(shape, row, launch, H200), predict(shape, row, launch, H100)
        tile = f"{launch.tile.block_q}×{launch.tile.block_d}"
        lines.append(
            [
                shape.name, tile + (f", {launch.pack} queries" if launch.pack > 1 else ""),
                fast.binding, f"{fast.overlapped_us:.0f} – {fast.serial_us:.0f}", f"{fast.of_limit:.0%}",
                f"{slow.overlapped_us:.0f} – {slow.serial_us:.0f}", f"{slow.of_limit:.0%}",
            ]
        )  # fmt: skip
    head = ["(n_q,n_d,l_q,l_d) dim", "tile", "binds on H200", "H200 µs, overlapped – serial", "of its limit at best",
            "H100 µs", "of its limit at best"]  # fmt: skip
    return markdown(head, lines)


TABLES = {"predicted": Table("aot", table)}


def main() -> None:
    print(table(json.loads((harness.RESULTS / "aot.json").read_text())), end="")


if __name__ == "__main__":
    main()
