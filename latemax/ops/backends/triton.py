"""The Triton kernels: which problems they take, and with which tile. ``triton_launch`` imports triton and runs them.

float16, bfloat16, float32 and float64, on CUDA, or on the CPU in Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from latemax.ops import tiles
from latemax.ops.backends.base import PreparedLaunch, Status, WrongDevice, capability
from latemax.ops.problem import Batch, Gradients, Needs, Outputs, Plan, Problem
from latemax.ops.tiles import NO_NORM, NORM_BEFORE, NORM_IN_TILE, Launch

name = "triton"
LEAST_INTEGERS = 32  # columns of a product of 8-bit integers
MOST_BOUND_DIMS = 1 << 17  # up to here sums of products of 8-bit codes fit in 32 bits
# Up to these dims bounds of a float q need no norms of codes (latemax.kernels.bounds), and take fewer instructions than
# those of an 8-bit one: for 32 x 64 tokens of 128 dims on sm_90, 535 (bfloat16) or 556 (float32) instead of 636. With
# norms they take 907 or 942 instead of 738, and for 64 of 768 dims 375 or 495 instead of 179.
FEW_DIMS = 512


@functools.cache
def status() -> Status:
    if importlib.util.find_spec("triton") is None:
        return Status(False, "triton is not installed")
    import triton

    if _version() < (3, 4):
        return Status(False, f"triton {triton.__version__} is older than 3.4")
    if interpreted():
        return Status(True, f"triton {triton.__version__}, interpreted on the CPU (TRITON_INTERPRET=1)")
    if not torch.cuda.is_available():
        return Status(False, f"triton {triton.__version__} is installed, but torch sees no CUDA device")
    return Status(True, f"triton {triton.__version__}")


@functools.cache
def _version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


@functools.cache
def interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def float64_products() -> bool:
    """Whether ``tl.dot`` takes float64: 3.4 refuses it, 3.6 compiles it to DMMA."""
    return _version() >= (3, 6)


def why_not(p: Problem, by_name: bool) -> str:
    usable, reason = status()
    if not usable:
        return f"it needs triton: {reason}"
    if p.device.type != "cuda" and not interpreted():
        return WrongDevice(f"needs tensors on a CUDA device; got {p.device}")
    if p.dtype == torch.float64 and not float64_products():
        return "float64 needs triton 3.6: older ones cannot multiply it"
    if p.dtype == torch.float64 and p.d_codes:
        return "Triton multiplies codes with q of float16, bfloat16 or float32, not float64"
    if p.bounds and p.dim > MOST_BOUND_DIMS:
        return f"Triton has bounds of at most {MOST_BOUND_DIMS} dims; got {p.dim}"
    return ""


def plan(p: Problem, by_name: bool) -> Plan:
    # codes are multiplied in half precision, or as integers, which take no more
    itemsize, chip = 2 if p.d_codes else p.dtype.itemsize, capability(p.device)
    rows = query_rows(p)
    integers = p.q_codes or (p.bounds == "coarse" and _rounds_queries(p.normalize, p.dim))
    if p.d_codes and p.dtype == torch.float32 and not integers and chip < 90:
        # two operands of bfloat16: 128 rows of them spill 85 registers on sm_80, 64 rows spill 61
        rows = min(rows, 32)
    tile, source = tiles.pick(kind(p), p.dim, rows, p.l_d, itemsize, chip, p.argmax)
    if integers:
        tile = tile._replace(block_k=max(tile.block_k, LEAST_INTEGERS))
    why = "asked for by name" if by_name else "the tensors are on a CUDA device"
    pack = 1 if p.q_ragged else queries_per_tile(tile, p.l_q, p.n_q, p.own)
    return Plan(name, f"{why}; tile: {source}", launch=Launch(tile, pack, _norm(p, tile, pack)))


def _norm(p: Problem, tile: tiles.TileConfig, pack: int) -> int:
    """Norms inside the tile are free where memory is the limit. A document tile that several query tiles use would pay
    for them again, but a corpus of which a few candidates are read would pay more for all its norms."""
    if not p.normalize:
        return NO_NORM
    if p.d_codes:
        return NORM_IN_TILE
    chunks = p.l_q * p.n_q // tile.block_q + p.n_q if p.q_ragged else -(-p.n_q // pack) * -(-p.l_q // tile.block_q)
    return NORM_IN_TILE if p.candidates or (chunks == 1 and p.dim <= tile.block_k) else NORM_BEFORE


def queries_per_tile(tile: tiles.TileConfig, l_q: int, n_q: int, own: bool) -> int:
    """As many queries share one tile as fit, if they share the documents too."""
    return 1 if own or n_q == 1 else max(1, tile.block_q >> (l_q - 1).bit_length())


def kind(p: Problem) -> str:
    """How products are computed, see ``tiles.Row``."""
    if p.bounds:
        return "bounds"
    if p.dtype == torch.float64:
        return "double"
    if p.dtype != torch.float32 or p.d_codes:
        return "half"
    return "ieee" if p.matmul_precision == "highest" else "tf32"


def query_rows(p: Problem) -> int:
    """Query tokens that one tile could hold: those of one query, or of all queries if they share the documents.

    Ragged queries get a tile each, sized by their mean length, so that a score does not depend on the other queries.
    """
    padded = 1 << (p.l_q - 1).bit_length()
    return padded if p.own or p.q_ragged else padded * (1 << max(0, p.n_q - 1).bit_length())


def forward(b: Batch, plan: Plan, out: Outputs) -> PreparedLaunch | None:
    return _launcher().forward(b, plan.launch, out)


def bounds(b: Batch, plan: Plan, lower: Tensor, upper: Tensor, *, coarse: bool = False) -> None:
    """Bounds of the scores of the tokens that int8 codes were made of, float32 [n_q, n_d].

    ``coarse``: with query tokens of 8 bits where that is faster; wider bounds.
    """
    from latemax.ops.backends import triton_bounds

    triton_bounds.forward(b, plan.launch, lower, upper, coarse=coarse and _rounds_queries(b.normalize, b.dim))


def _rounds_queries(normalize: bool, dim: int) -> bool:
    return normalize or dim > FEW_DIMS


def backward(b: Batch, plan: Plan, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
    return _launcher().backward(b, argmax, g, needs)


@functools.cache
def _launcher() -> ModuleType:
    # imports triton: not before it is needed
    from latemax.ops.backends import triton_launch

    return triton_launch
