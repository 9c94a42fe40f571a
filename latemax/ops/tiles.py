"""Which tile the Triton kernels use, for which shapes, and how that was found: the rows of ``tiles.json``.

A missing row falls back to ``DEFAULT``, never to a sweep at the first call.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple


class TileConfig(NamedTuple):
    block_q: int  # query tokens in a tile, several packed queries together
    block_d: int  # document tokens in a tile
    block_k: int  # columns of the tokens in a tile; all of them where dim fits
    swap: bool  # document tokens are the M operand of the product
    num_warps: int
    num_stages: int
    # The last, partial tile of a document runs before a loop over full ones, which then checks no bounds. Without it
    # the loop checks them in every tile (118 more instructions at 32 x 128), and copies overlap from the first tile on:
    # for short documents that few query tokens meet, where memory binds.
    peel: bool = True


# norms: of no token; inside the tile; by a kernel of their own first (latemax.kernels.forward)
NO_NORM, NORM_IN_TILE, NORM_BEFORE = 0, 1, 2


class Launch(NamedTuple):
    """How a forward runs."""

    tile: TileConfig
    pack: int  # queries that share one tile
    norm: int


class Row(NamedTuple):
    capability: int  # from this compute capability on (80 for 8.0): 90 and later multiply by warpgroup or by block
    kind: str  # products: "half" (fp16, bf16), "tf32", "ieee" (float32 at "highest"), "double"; or "bounds"
    dim: int  # up to this dim, padded to a power of two
    q_rows: int  # up to this many query tokens to put in one tile
    l_d: int  # up to this many document tokens, one of LENGTHS
    tile: TileConfig
    argmax_tile: TileConfig | None  # with argmax, where a third tile of registers would spill
    source: str  # how the row was found: measured (GPU, date, gain) or static (what its build shows)


UNBOUNDED = 1 << 30
# Document tokens up to which tiles differ. 400 tokens are at most four tiles of 128, of which two blocks on a
# multiprocessor leave too few copies under way at the start and end of a document.
LENGTHS = (400, UNBOUNDED)


def length_class(l_d: int) -> int:
    """The first of LENGTHS that l_d does not exceed: what a problem says of the length of documents."""
    return next((length for length in LENGTHS if l_d <= length), UNBOUNDED)


BOUNDS = ("dim", "q_rows", "l_d")


def read_table(text: str) -> tuple[Row, ...]:
    """The rows of ``tiles.json``, in which null is no upper bound; their notes are for readers of the file."""

    def row(entry: dict) -> Row:
        dim, q_rows, l_d = (UNBOUNDED if entry[name] is None else entry[name] for name in BOUNDS)
        argmax_tile = TileConfig(*entry["argmax_tile"]) if "argmax_tile" in entry else None
        tile = TileConfig(*entry["tile"])
        return Row(entry["capability"], entry["kind"], dim, q_rows, l_d, tile, argmax_tile, entry["source"])

    return tuple(row(entry) for entry in json.loads(text))


# a file next to the module: benchmarks/tune.py rewrites its rows
TABLE_FILE = Path(__file__).with_suffix(".json")
# the first row that covers a problem is used
TABLE = read_table(TABLE_FILE.read_text("utf-8"))
DEFAULT = TileConfig(16, 64, 32, True, 4, 2)

# bytes of shared memory a block may use, by compute capability; 8.6, 8.9 and 12.x have less than the data-centre chips
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
SMALLEST_SHARED_MEMORY = 65536


def padded_dim(dim: int) -> int:
    """dim as the tensor cores see it: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def shared_bytes(tile: TileConfig, dim: int, itemsize: int) -> int:
    """Upper estimate of the forward kernel's shared memory: resident query tile, pipelined document tiles."""
    columns = min(tile.block_k, padded_dim(dim))
    streamed = tile.block_d * columns + (tile.block_q * columns if columns < dim else 0)
    resident = 0 if columns < dim else tile.block_q * columns
    return (streamed * max(1, tile.num_stages) + resident) * itemsize + 8192


def fits(tile: TileConfig, dim: int, itemsize: int, capability: int) -> bool:
    return shared_bytes(tile, dim, itemsize) <= SHARED_MEMORY.get(capability, SMALLEST_SHARED_MEMORY)


@functools.lru_cache(maxsize=1024)
def pick(
    kind: str, dim: int, q_rows: int, l_d: int, itemsize: int, capability: int, argmax: bool = False
) -> tuple[TileConfig, str]:
    """The tile for this problem and the sentence that says where it came from."""
    sizes = padded_dim(dim), q_rows, l_d
    for row in TABLE:
        bounds = row.dim, row.q_rows, row.l_d
        if (
            capability >= row.capability
            and row.kind == kind
            and all(a <= b for a, b in zip(sizes, bounds, strict=True))
        ):
            tile, source = (row.argmax_tile or row.tile) if argmax else row.tile, row.source
            break
    else:
        tile, source = DEFAULT, "default: no row of the tile table covers this problem"
    tile = tile._replace(block_k=min(tile.block_k, padded_dim(dim)))
    while not fits(tile, dim, itemsize, capability) and tile.num_stages > 1:
        tile, source = tile._replace(num_stages=tile.num_stages - 1), source + "; fewer stages to fit"
    if not fits(tile, dim, itemsize, capability):
        tile = DEFAULT._replace(block_k=min(DEFAULT.block_k, padded_dim(dim)))
        source = "default: the table's tile does not fit this GPU's shared memory"
    return tile, source


class CudaRow(NamedTuple):
    capability: int
    dim: int  # up to this dim
    q_rows: int  # up to this many query tokens in one tile
    source: str  # GPU, date and ratio


# where the CUDA kernels were measured faster than the tiles above, and auto picks them; none was timed yet
CUDA_FASTER: tuple[CudaRow, ...] = ()


def cuda_faster(dim: int, q_rows: int, capability: int) -> str:
    """Where the CUDA kernels were found faster for this problem; empty if nowhere."""
    for row in CUDA_FASTER:
        if capability == row.capability and dim <= row.dim and q_rows <= row.q_rows:
            return row.source
    return ""


class BackwardTile(NamedTuple):
    block_d: int  # document tokens that a grad_d program owns
    block_r: int  # query tokens it takes at a time
    block_k: int  # columns that it owns
    num_warps: int
    num_stages: int


def backward_tile(dim: int, l_q: int, itemsize: int) -> BackwardTile:
    """The grad_d tile: its accumulator [block_d, block_k] stays in registers, its rows in 64 KB of shared memory."""
    block_k = min(256, 1024 // itemsize, padded_dim(dim))
    if itemsize == 4 and dim > 256:
        # No program holds all columns, and on sm_90 64 x 32 x 128 (wgmma, 214 issue slots) beats 32 x 32 x 256 (mma,
        # 259), which reads every query row twice as often and spills 6 to 11 registers if rows are
        # not 16-byte aligned.
        block_k = 128
    block_d = min(64, max(16, 32768 // (block_k * itemsize)))
    # sm_100 builds of float32 up to dim 256: a block of 128 columns spills with 32 query tokens, one of 256 with 16
    few = l_q <= 16 or itemsize == 8 or (itemsize == 4 and dim <= 128)
    # 235 issue slots a block of 64 x 32 x 128 with 4 warps, 306 with 8 (sm_90)
    warps = 4 if itemsize == 2 and block_k <= 128 else 8
    # two blocks of rows in flight while one is multiplied; 4 stages of 256 columns of float32 take 103 KB
    return BackwardTile(block_d, 16 if few else 32, block_k, warps, 3)
