"""What documents of up to 400 tokens take, against the tiles of long ones: one query, half precision, dim 128, sm_90.

python -m benchmarks.static.short [--json FILE]
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from benchmarks import harness
from benchmarks.internals import tiles
from benchmarks.shapes import LONG, SHORT, Build
from benchmarks.static import aot
from benchmarks.tables import Table, markdown

# of a multiprocessor
REGISTERS, SHARED_BYTES, BLOCK_BYTES = 65536, 233472, 1024
LENGTHS = (196, 300, 400)


def measure() -> list[dict[str, Any]]:
    jobs = [
        Build("half", 128, l_q, l_d=l_d, return_argmax=argmax)
        for l_q in (16, 32, 64)
        for argmax in (False, True)
        for l_d in (LONG, SHORT)
    ]
    return aot.measure((90,), jobs=jobs)


def table(result: dict[str, Any]) -> str:
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


TABLES = {"aot-short": Table("aot-short", table)}


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    machine = harness.machine()
    result = dict(
        rows=measure(), triton=importlib.metadata.version("triton"), commit=machine["commit"], date=machine["date"]
    )
    harness.finish(result, table, options.json)


if __name__ == "__main__":
    main()
