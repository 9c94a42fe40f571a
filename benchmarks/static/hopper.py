"""What the CUDA forward should take on an H100 or H200: one model, calibrated on published timings of other kernels,
then applied unchanged. Predictions, never measurements.

    python -m benchmarks.static.hopper

A multiprocessor works through tiles. A tile takes the clocks of the tensor cores and ``EXPOSED`` of those of the
busiest other pipe, or of shared memory, or of L2, whichever are most. What surrounds a work item (first loads, last
stores) takes ``AROUND`` clocks. Device memory at the measured copy rate and the measured matmul rate are floors. These
two numbers are fitted to the published timings, everything else is counted.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from benchmarks import harness, shapes
from benchmarks.tables import Table, markdown

# Fitted: the part of the other pipe's clocks for which tensor cores wait, and the clocks around a work item
EXPOSED, AROUND = 0.78, 4600
MULTIPROCESSORS, CLOCK_GHZ = 132, 1.755
FLOPS_A_CLOCK = {16: 4096, 8: 8192}  # of one multiprocessor, by the bits of an element
SHARED_BYTES_A_CLOCK = 128
L2_BYTES_A_CLOCK = 5500 / MULTIPROCESSORS / CLOCK_GHZ  # 5.5 TB/s, an assumption
EXPONENTIALS_A_CLOCK, ALU_LANES, FMA_LANES = 16, 64, 128
# counted: the shuffles and stores of a document's maxima; a kernel more on the stream is 4000 clocks in the planner
DOCUMENT, LAUNCH = 100, 4000


class Chip(NamedTuple):
    name: str
    matmul_tflops: float  # measured, bfloat16, of torch
    copy_tbs: float  # measured


H100, H200 = Chip("H100", 798, 3.0), Chip("H200", 788, 4.3)


class Tile(NamedTuple):
    """Clocks of one tile on one multiprocessor."""

    tensor: float
    other: float
    shared: float
    l2: float = 0.0

    @property
    def clocks(self) -> float:
        return max(self.tensor + EXPOSED * self.other, self.shared, self.l2)

    @property
    def binds(self) -> str:
        return {self.shared: "shared memory", self.l2: "L2"}.get(self.clocks, "tensor cores")


def multiply(rows: int, tokens: int, dims: int, *, registers: bool, bits: int = 16) -> tuple[float, float]:
    """Tensor clocks of a product, and the bytes that its wgmma read from shared memory: for each 64 rows those of the
    tokens, and of the rows unless they are in registers."""
    steps = dims * bits // 8 / 32
    return 2 * rows * tokens * dims / FLOPS_A_CLOCK[bits], rows / 64 * steps * 32 * (tokens + (0 if registers else 64))


def seconds(items: int, tiles: float, tile: Tile) -> float:
    """Equal work items of so many tiles."""
    return math.ceil(items / MULTIPROCESSORS) * (tiles * tile.clocks + AROUND) / CLOCK_GHZ / 1e9


def attention(dim: int, rows: int, tokens: int, length: int) -> float:
    """TFLOP/s of FlashAttention-3: two products a tile, an exponential for each similarity."""
    batch, heads = 16384 // length, 2048 // dim
    (scores, read), (values, read_values) = (
        multiply(rows, tokens, dim, registers=False), multiply(rows, dim, tokens, registers=True)
    )  # fmt: skip
    written = 2 * 2 * tokens * dim
    tile = Tile(
        scores + values, rows * tokens / EXPONENTIALS_A_CLOCK, (read + read_values + written) / SHARED_BYTES_A_CLOCK
    )
    time = seconds(math.ceil(length / rows) * heads * batch, math.ceil(length / tokens), tile)
    return 4 * length * length * dim * heads * batch / time / 1e12


def matmul(m: int, n: int, k: int) -> float:
    """TFLOP/s of DeepGEMM: tiles of 64 or 128 x 128 x 128, an FFMA for each of its sums."""
    rows = min(m, 128)
    tensor, read = multiply(rows, 128, 128, registers=False, bits=8)
    tile = Tile(tensor, rows * 128 / FMA_LANES, (read + 128 * (rows + 128)) / SHARED_BYTES_A_CLOCK)
    moved = m * k + n * k + 2 * m * n
    floor = moved / H100.copy_tbs / 1e12 + AROUND / CLOCK_GHZ / 1e9
    time = max(seconds(math.ceil(m / rows) * math.ceil(n / 128), k / 128, tile), floor)
    return 2 * m * n * k / time / 1e12


def calibration(published: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Name, published and predicted TFLOP/s of every timing."""
    found = []
    for heads in published["attention"]["heads"]:
        for length, tflops in zip(published["attention"]["lengths"], heads["tflops"], strict=True):
            predicted = attention(heads["dim"], heads["rows"], heads["tokens"], length)
            found.append((f"FlashAttention-3, head dim {heads['dim']}, {length} tokens", tflops, predicted))
    for row in published["matmul"]["rows"]:
        shape = f"{row['m']} × {row['n']} × {row['k']}"
        found.append((f"DeepGEMM, {shape}", row["tflops"], matmul(row["m"], row["n"], row["k"])))
    return found


def calibration_table(published: dict[str, Any]) -> str:
    lines = [
        [name, f"{tflops:.0f}", f"{predicted:.0f}", f"{predicted / tflops - 1:+.1%}"]
        for name, tflops, predicted in calibration(published)
    ]
    sources = "; ".join(f"{part['name']}: {part['source']}" for part in published.values())
    return markdown(["kernel", "published TFLOP/s", "model", "error"], lines) + f"\n{sources}.\n"


class Prediction(NamedTuple):
    us: float
    binds: str
    of_rate: float  # of the measured matmul or copy rate, whichever bounds the shape
    arithmetic: str


def tile_of(plan: dict[str, int], dim: int, alu: int) -> Tile:
    """Of the sm_90 kernel. alu: instructions of a warp for 16 rows x 64 tokens."""
    tensor, read = multiply(plan["rows"], plan["tile"], -(-dim // 16) * 16, registers=dim <= 128)
    tile_bytes = 2 * plan["tile"] * dim
    return Tile(
        tensor, alu * plan["rows"] / 16 * 32 / ALU_LANES, (read + tile_bytes) / SHARED_BYTES_A_CLOCK,
        tile_bytes / L2_BYTES_A_CLOCK,
    )  # fmt: skip


def tiles_of(shape: shapes.Shape, plan: dict[str, int], alu: dict[str, int]) -> tuple[Tile, Tile]:
    """A full tile, and the last one of a document."""
    rest = shape.l_d % plan["tile"]
    last = alu["full"] if not rest else rest // 16 * alu["group"] + (alu["last"] if rest % 16 else 0)
    counts = (alu["scaled"], alu["scaled"]) if shape.normalize else (alu["full"], last)
    full, end = (tile_of(plan, shape.dim, count) for count in counts)
    return full, end


def predict(shape: shapes.Shape, plan: dict[str, int], alu: dict[str, int], chip: Chip) -> Prediction:
    full, end = tiles_of(shape, plan, alu)
    # merging pieces, summing chunks, the norms of the queries
    launches = plan["split"] + (plan["chunks"] > 1) + shape.normalize
    ends = round(plan["tiles"] / -(-shape.l_d // plan["tile"]))
    clocks = (
        (plan["tiles"] - ends) * full.clocks + ends * end.clocks + plan["documents"] * DOCUMENT
        + plan["visits"] * AROUND + launches * LAUNCH
    )  # fmt: skip
    # every thread block multiplies whole query blocks
    products = 2 * plan["blocks"] * plan["rows"] * shape.n_d * -(-shape.l_d // plan["tile"]) * plan["tile"]
    times = {
        full.binds: clocks / CLOCK_GHZ / 1e3,
        "device memory": shape.bytes / chip.copy_tbs / 1e6 + AROUND / CLOCK_GHZ / 1e3,
        "measured matmul rate": products * -(-shape.dim // 16) * 16 / chip.matmul_tflops / 1e6,
    }
    binds = max(times, key=times.__getitem__)
    limit = max(shape.bytes / chip.copy_tbs, shape.flops / chip.matmul_tflops) / 1e6
    arithmetic = (
        f"{plan['tiles'] - ends} × {full.clocks:.0f} ({full.tensor:.0f} + {EXPOSED} × {full.other:.0f}; shared memory "
        f"{full.shared:.0f}, L2 {full.l2:.0f}) + {ends} × {end.clocks:.0f} + {plan['documents']} × {DOCUMENT} + "
        f"{plan['visits']} × {AROUND}{f' + {launches} × {LAUNCH}' if launches else ''} = {clocks:.0f}; "
        f"{shape.bytes / 1e6:.4g} MB"
    )
    return Prediction(times[binds], binds, limit / times[binds], arithmetic)


# the least part of the measured rate
GOALS = {
    shapes.Shape(64, 64, 768, 512): 0.80,
    shapes.Shape(1, 1000, 1024, 1024): 0.80,
    shapes.Shape(128, 128, 32, 300): 0.80,
    shapes.Shape(128, 128, 32, 300, argmax=True): 0.75,
}


def predictions(result: dict[str, Any]) -> dict[shapes.Shape, tuple[Prediction, Prediction]]:
    """On an H100 and an H200, of each shape that static.cuda_aot has planned and whose instructions are counted."""
    known = "bf16", "128 tokens, 128 dims"
    alu = {row["argmax"]: row["alu"] for row in result["rows"] if (row["dtype"], row["instance"]) == known}
    found = {}
    for shape in dict.fromkeys(shapes.CORE + shapes.VARIANTS):
        if shape.name in result["plans"]:
            plan, count = result["plans"][shape.name], alu[shape.argmax]
            found[shape] = predict(shape, plan, count, H100), predict(shape, plan, count, H200)
    return found


def table(result: dict[str, Any]) -> str:
    head = ["(n_q,n_d,l_q,l_d) dim", "binds on H100", "H100 µs", "of the measured rate", "goal", "H200 µs",
            "of the measured rate", "clocks of the busiest thread block"]  # fmt: skip
    lines = []
    for shape, (one, other) in predictions(result).items():
        goal = GOALS.get(shape)
        said = "" if goal is None else f"{goal:.0%}" + ("" if one.of_rate >= goal else ", missed")
        lines.append([shape.name, one.binds, f"{one.us:.1f}", f"{one.of_rate:.0%}", said, f"{other.us:.1f}",
                      f"{other.of_rate:.0%}", one.arithmetic])  # fmt: skip
    return markdown(head, lines)


TABLES = {
    "hopper-calibration": Table("hopper-published", calibration_table),
    "hopper-predicted": Table("cuda-aot", table),
}


def main() -> None:
    for name, of in TABLES.items():
        print(f"{name}\n{of.render(json.loads((harness.RESULTS / f'{of.result}.json').read_text()))}")


if __name__ == "__main__":
    main()
