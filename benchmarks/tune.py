"""Measures tiles on this GPU and writes the fastest into the tile table.

    python -m benchmarks.tune [--write] [--seconds 240]

For each row of the tile table that this GPU would use, neighbours of its tile (block sizes halved and doubled, warps 4
and 8, stages 2 to 4, for long queries both operand orders) are timed at a shape that the row covers, after their scores
were compared with those of the row's own tile. ``--write`` puts the fastest into the table as rows for this compute
capability, with GPU, date and gain; rows of other chips stay. Without a GPU ``--rehearse`` goes through everything in
the interpreter, once.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import harness
from benchmarks.internals import forward_with_tile, tiles
from benchmarks.shapes import KINDS, Shape, tuning

# kinds of row that are tuned: float64 has one tile that fits; bounds are a share of a search (GPU_PENDING, entry 25)
TUNED = ("half", "tf32", "ieee")
# tiles tried for a row: 21 rows of them are compiled and timed in six minutes, at a second each
MOST = 18
# finalists of a row, and how often each is timed
FINALISTS, ROUNDS = 3, 50


def shape_of(row: tiles.Row) -> Shape | None:
    """A shape that the row covers, or None if rows of its kind are not tuned."""
    return tuning(row.dim, row.q_rows, row.l_d, KINDS[row.kind][0]) if row.kind in TUNED else None


def neighbours(tile: tiles.TileConfig, dim: int, itemsize: int, capability: int) -> Iterator[tiles.TileConfig]:
    """Tiles that differ from this one in block sizes, operand order, warps or stages; the closest first.

    Without those that would spill or leave threads idle: a thread holds two numbers, the similarity and the maximum,
    for each of its elements of the tile. All peel, or none do.
    """
    longer = {2 * tile.block_q} if tile.block_q >= 128 else set()
    sizes = itertools.product(
        {tile.block_q, max(16, tile.block_q // 2)} | longer,
        {max(32, tile.block_d // 2), tile.block_d, min(256, tile.block_d * 2)},
        {tile.block_k},
        (True, False) if tile.block_q >= 64 else (tile.swap,),
        (4, 8),
        (2, 3, 4),
    )
    near = sorted(sizes, key=lambda values: (sum(a != b for a, b in zip(values, tile, strict=True)), values))
    for values in near:
        other = tiles.TileConfig(*values, tile.peel)
        held = 2 * other.block_q * other.block_d / (32 * other.num_warps)
        if 16 <= held <= 160 and tiles.fits(other, dim, itemsize, capability):
            yield other


def tune(
    row: tiles.Row, device: str, capability: int, until: float, rehearse: bool
) -> tuple[tiles.TileConfig, float, float] | None:
    """(fastest tile, its ms, the ms of the row's tile), or None if the row is not tuned or the time is over."""
    shape = shape_of(row)
    if shape is None or time.monotonic() > until:
        return None
    torch.set_float32_matmul_precision(KINDS[row.kind][1])
    q, d, _ = (shape.tiny() if rehearse else shape).tensors(device)
    itemsize = q.element_size()
    own = row.tile._replace(block_k=min(row.tile.block_k, tiles.padded_dim(shape.dim)))
    scores = torch.empty(len(q), len(d), device=device)
    forward_with_tile(q, d, own, scores)
    truth = scores.clone()
    found: dict[tiles.TileConfig, float] = {}
    seconds = harness.gpu_timer() if device == "cuda" else harness.timer()

    def runs(chosen: list[tiles.TileConfig]) -> dict:
        return {tile: functools.partial(forward_with_tile, q, d, tile, scores) for tile in chosen}

    others = [tile for tile in neighbours(own, shape.dim, itemsize, capability) if tile != own]
    for tile in [own, *others][: 3 if rehearse else MOST]:
        if time.monotonic() > until:
            break
        try:
            forward_with_tile(q, d, tile, scores.fill_(torch.nan))
        except Exception as problem:
            print(f"  {tile}: {type(problem).__name__}")
            continue
        # the same products, summed in another order
        harness.check(f"{tile} at {shape.name}", scores, truth, 1e-2)
        found |= harness.medians(runs([tile]), 1 if rehearse else 10, seconds)
    # the best few, interleaved: one pass is too noisy to choose by
    finalists = [own, *sorted((tile for tile in found if tile != own), key=found.__getitem__)[:FINALISTS]]
    medians = harness.medians(runs(finalists), 1 if rehearse else ROUNDS, seconds)
    best = min(medians, key=medians.__getitem__)
    # 2 %: less is noise, and a table that changes with it helps nobody
    best = best if medians[best] < 0.98 * medians[own] else own
    return best, 1e3 * medians[best], 1e3 * medians[own]


Entry = dict[str, Any]  # a row as tiles.json has it


def with_row(table: list[Entry], row: tiles.Row, tile: tiles.TileConfig, capability: int, source: str) -> list[Entry]:
    """The table with a row for this capability in place of the row it was tuned from, or before it if that row is for
    other chips.

    Raises:
        ValueError: the table has no such row.
    """
    sizes = {name: getattr(row, name) for name in tiles.BOUNDS}
    bounds = {name: None if value == tiles.UNBOUNDED else value for name, value in sizes.items()}
    covered = dict(capability=row.capability, kind=row.kind, **bounds)
    at = next((i for i, entry in enumerate(table) if covered.items() <= entry.items()), None)
    if at is None:
        raise ValueError(f"no row of the table is {covered}")
    tuned = covered | dict(capability=capability, tile=[*tile], source=source)
    return [*table[:at], tuned, *table[at + (row.capability == capability) :]]


def dump(table: list[Entry]) -> str:
    """JSON with a row on each line."""
    return "[\n" + ",\n".join(" " + json.dumps(entry) for entry in table) + "\n]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {tiles.TABLE_FILE.name}")
    parser.add_argument("--seconds", type=float, default=240, help="stop after so long (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, three tiles a row, no GPU needed")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.rehearse:
        raise SystemExit("no CUDA device: tiles are measured on one (--rehearse goes through everything without)")
    name, capability = "rehearsal", 90
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name, capability = torch.cuda.get_device_name(), 10 * major + minor
    until, covered = time.monotonic() + options.seconds, set()
    table = json.loads(tiles.TABLE_FILE.read_text("utf-8"))
    for row in tiles.TABLE:
        place = (row.kind, row.dim, row.q_rows, row.l_d)
        if capability < row.capability or place in covered:
            continue
        covered.add(place)
        found = tune(row, device, capability, until, options.rehearse)
        if found is None:
            print(f"{place}: not tuned")
            continue
        tile, ms, before = found
        print(f"{place}: {tile} {ms:.3f} ms, the row's own {before:.3f} ms")
        if row.argmax_tile is None:
            source = f"measured: {name}, {datetime.date.today()}, {before / ms:.2f}x the static choice"
            table = with_row(table, row, tile, capability, source)
    if options.write:
        tiles.TABLE_FILE.write_text(dump(table), "utf-8")
        print(f"written: {tiles.TABLE_FILE}")


if __name__ == "__main__":
    main()
