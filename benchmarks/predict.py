"""What the compiled kernels should take on an H100 or H200: a prediction from static counts, never a measurement.

    python -m benchmarks.predict

For each shape of the registry that has a build in results/aot.json. A document tile needs: tensor-core clocks, issue
slots (length of the inner loop times warps, over four schedulers), shared-memory clocks (the tile written once,
operands read by every warpgroup instruction) and L2 clocks (the tile once). Blocks that share a multiprocessor overlap:
the largest of the four then counts ("overlapped"); a block alone adds issue to multiplication ("serial"). Device memory
is a floor under both. Times are the kernel's alone, without launch and host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from benchmarks import report, shapes
from latemax.ops import tiles


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


def build(shape: shapes.Shape, rows: list[dict]) -> tuple[dict, tiles.TileConfig, int] | None:
    """(row of the AOT table, tile, packed queries) of the forward build that sm_90 would run, or None."""
    itemsize = getattr(torch, shape.dtype).itemsize
    padded = 1 << (shape.l_q - 1).bit_length()
    in_tile = padded if shape.own else padded * (1 << (shape.n_q - 1).bit_length())
    tile, _ = tiles.pick("half", shape.dim, in_tile, itemsize, 90, shape.argmax)
    pack = 1 if shape.own or shape.n_q == 1 else max(1, tile.block_q // padded)
    flags = "d_masked=True" * shape.masked + "argmax=True" * shape.argmax
    if shape.normalize:
        flags += "norm=1" if -(-shape.l_q // tile.block_q) == 1 and -(-shape.n_q // pack) == 1 else "norm=2"
    for row in rows:
        same = row["arch"] == 90 and row["kernel"] == "forward_kernel" and row["case"].startswith("half")
        # the flags come last in the case, and without any there is no "=" in it
        named = row["case"].endswith(flags) and ("=" in row["case"]) == bool(flags)
        if same and named and row["tile"] == [*tile] and row["dim"] == shape.dim:
            return row, tile, pack
    return None


def predict(shape: shapes.Shape, row: dict, tile: tiles.TileConfig, pack: int, chip: Chip) -> Prediction:
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
    # the mean of lengths U[l_d / 32, l_d]
    part = 33 / 64 if shape.masked else 1
    tokens = shape.l_d * part
    n_tiles = math.ceil(tokens / tile.block_d)
    l2 = (2 * shape.dim * tokens / n_tiles) / l2_a_clock
    programs = -(-shape.n_q // pack) * -(-shape.l_q // tile.block_q) * shape.n_d
    clocks = {"wgmma": multiply, "issue": issue, "shared memory": shared, "L2": l2}
    binding = max(clocks, key=clocks.get)

    def microseconds(a_tile: float, around: float) -> float:
        each = n_tiles * a_tile + around
        waves = max(programs / chip.multiprocessors, 1)
        return waves * each / chip.clock_ghz / 1e3

    memory = shape.bytes * part / chip.memory_tbs / 1e6
    if shape.normalize and "norm=2" in row["case"]:
        memory *= 2
    overlapped = microseconds(max(clocks.values()), AROUND / resident)
    serial = microseconds(max(multiply + issue, shared, l2), AROUND)
    if memory > overlapped:
        overlapped, binding = memory, "device memory"
    limit = max(memory, shape.flops * part / chip.matmul_tflops / 1e6)
    return Prediction(overlapped, max(serial, memory), binding, limit / overlapped)


def table() -> str:
    found = report.result("aot")
    lines = []
    for shape in dict.fromkeys(shapes.CORE + shapes.VARIANTS):
        known = build(shape, found) if shape.dtype == "bfloat16" else None
        if known is None:
            continue
        row, tile, pack = known
        fast, slow = predict(shape, row, tile, pack, H200), predict(shape, row, tile, pack, H100)
        lines.append(
            [
                shape.name.strip(), f"{tile.block_q}×{tile.block_d}" + (f", {pack} queries" if pack > 1 else ""),
                fast.binding, f"{fast.overlapped_us:.0f} – {fast.serial_us:.0f}", f"{fast.of_limit:.0%}",
                f"{slow.overlapped_us:.0f} – {slow.serial_us:.0f}", f"{slow.of_limit:.0%}",
            ]
        )  # fmt: skip
    head = ["(n_q,n_d,l_q,l_d) dim", "tile", "binds on H200", "H200 µs, overlapped – serial", "of its limit at best",
            "H100 µs", "of its limit at best"]  # fmt: skip
    return report.markdown(head, lines)


if __name__ == "__main__":
    print(table(), end="")
