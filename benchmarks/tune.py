"""Measures tiles on this GPU and rewrites the tile table with what was found.

    python -m benchmarks.tune [--write] [--seconds 240]

For each row of ``latemax/ops/tiles.py`` that this GPU would use, neighbours of its tile (block sizes halved and
doubled, warps 4 and 8, stages 2 to 4, for long queries both operand orders) are timed at a shape that falls into the
row, after their scores were found equal to the row's own. ``--write`` puts the fastest into the table as rows for this
compute capability, with GPU, date and gain; rows of other chips stay. Without a GPU ``--rehearse`` goes through
everything in the interpreter, once.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import pathlib
import re
import statistics
import time

import torch

from benchmarks.shapes import Shape
from latemax.ops import tiles, triton_backend

TABLE = pathlib.Path(tiles.__file__)
# the dtype and matmul precision under which a kind of product is met
KINDS = {"half": ("bfloat16", "highest"), "tf32": ("float32", "high"), "ieee": ("float32", "highest")}
# tiles tried for a row: fifteen rows of them are compiled and timed in seven minutes, at a second each
MOST = 24


def shape_of(row: tiles.Row) -> Shape | None:
    """A shape that falls into the row: its largest dim and query rows, within what is usual."""
    if row.kind not in KINDS:
        return None
    dim = min(row.dim, 768)
    n_d = 4000 if row.q_rows <= 64 else 256
    if row.q_rows <= 64:
        return Shape(1, n_d, row.q_rows, 512, dim, KINDS[row.kind][0])
    return Shape(64, n_d, 32, 300, dim, KINDS[row.kind][0])


def neighbours(tile: tiles.TileConfig, dim: int, itemsize: int, capability: int):
    """Tiles around this one, without those that would spill or leave the threads idle: a thread holds two numbers, the
    similarity and the maximum, for each of its elements of the tile. Those that differ least come first."""
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
        other = tiles.TileConfig(*values)
        held = 2 * other.block_q * other.block_d / (32 * other.num_warps)
        if 16 <= held <= 160 and tiles.fits(other, dim, itemsize, capability):
            yield other


def run(q, d, tile, scores, argmax):
    triton_backend.forward(q, d, None, None, scores, argmax, normalize=False, empty_score=0.0, tile=tile)


def milliseconds(call, rounds: int) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def tune(row: tiles.Row, device: str, capability: int, until: float, rehearse: bool):
    """(fastest tile, its ms, the row's ms), or None where the row can't be reached or time is up."""
    shape = shape_of(row)
    if shape is None or time.monotonic() > until:
        return None
    torch.set_float32_matmul_precision(KINDS[row.kind][1])
    q, d, _ = (shape.tiny() if rehearse else shape).tensors(device)
    itemsize = q.element_size()
    own = row.tile._replace(block_k=min(row.tile.block_k, tiles.padded_dim(shape.dim)))
    scores = torch.empty(len(q), len(d), device=device)
    argmax = torch.empty(0, dtype=torch.int32, device=device)
    run(q, d, own, scores, argmax)
    truth, found = scores.clone(), {}
    candidates = [own, *(t for t in neighbours(own, shape.dim, itemsize, capability) if t != own)]
    for tile in candidates[: 3 if rehearse else MOST]:
        if time.monotonic() > until:
            break
        try:
            run(q, d, tile, scores.fill_(torch.nan), argmax)
        except Exception as problem:
            print(f"  {tile}: {type(problem).__name__}")
            continue
        if not torch.allclose(scores, truth, rtol=1e-3, atol=1e-2):
            raise RuntimeError(f"{tile} at {shape.name} gives other scores than {own}")
        found[tile] = milliseconds(lambda tile=tile: run(q, d, tile, scores, argmax), 10)
    # the best few again, interleaved, against the noise of one pass
    finalists = [own, *sorted((t for t in found if t != own), key=found.get)[:3]]
    again = {tile: [] for tile in finalists}
    for _ in range(1 if rehearse else 5):
        for tile in finalists:
            again[tile].append(milliseconds(lambda tile=tile: run(q, d, tile, scores, argmax), 10))
    medians = {tile: statistics.median(times) for tile, times in again.items()}
    best = min(medians, key=medians.get)
    # 2 %: less is noise, and a table that changes with it helps nobody
    best = best if medians[best] < 0.98 * medians[own] else own
    return best, medians[best], medians[own]


def written(text: str, row: tiles.Row, tile: tiles.TileConfig, capability: int, source: str) -> str:
    """The module's text with a row for this capability in front of the row it was tuned from."""
    old = f"Row({row.capability}, {row.kind!r}, ".replace("'", '"')
    dim, rows = (str(x) if x < 1 << 30 else "1 << 30" for x in (row.dim, row.q_rows))
    match = re.search(r"^ *" + re.escape(f"{old}{dim}, {rows}, ") + r".*$", text, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"no line of the table starts with {old}{dim}, {rows}")
    values = ", ".join(map(str, tile))
    line = f'    Row({capability}, "{row.kind}", {dim}, {rows}, TileConfig({values}), None, "{source}"),'
    if row.capability == capability:
        return text.replace(match[0], line)
    return text.replace(match[0], line + "\n" + match[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite latemax/ops/tiles.py")
    parser.add_argument("--seconds", type=float, default=240, help="stop after so long (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, three tiles a row, no GPU needed")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.rehearse:
        raise SystemExit("no CUDA device: tiles are measured on one (--rehearse goes through the motions without)")
    name, capability = "rehearsal", 90
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name, capability = torch.cuda.get_device_name(), 10 * major + minor
    until, text, covered = time.monotonic() + options.seconds, TABLE.read_text(), set()
    for row in tiles.TABLE:
        place = (row.kind, row.dim, row.q_rows)
        if capability < row.capability or place in covered:
            continue
        covered.add(place)
        found = tune(row, device, capability, until, options.rehearse)
        if found is None:
            print(f"{place}: left as it is")
            continue
        tile, ms, before = found
        print(f"{place}: {tile} {ms:.3f} ms, the row's own {before:.3f} ms")
        if row.argmax_tile is None:
            source = f"measured: {name}, {datetime.date.today()}, {before / ms:.2f}x the static choice"
            text = written(text, row, tile, capability, source)
    if options.write:
        TABLE.write_text(text)
        print(f"rewritten: {TABLE}")


if __name__ == "__main__":
    main()
