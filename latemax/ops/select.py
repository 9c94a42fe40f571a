"""Problem → Choice: which backend and tile run, and why. Pure: it asks about the machine, never about values."""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch

from latemax._check import Problem
from latemax.ops import cuda_backend, native_cpu_backend, tiles

CUDA_NOTES = ("a gradient is taken by Triton's kernels, from the recorded winners",)


class Choice(NamedTuple):
    """What would run and why."""

    backend: str  # "triton", "cuda", "cpu" or "reference"
    why: str
    tile: tiles.TileConfig | None = None
    notes: tuple[str, ...] = ()
    native: bool = False  # backend "cpu": the native kernel, not blocked torch matmul


@functools.cache
def triton_status() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 4):
        return False, f"triton {triton.__version__} is older than 3.4"
    if interpreted():
        return True, f"triton {triton.__version__}, interpreted on the CPU (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return False, f"triton {triton.__version__} is installed, but torch sees no CUDA device"
    return True, f"triton {triton.__version__}"


@functools.cache
def interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def float64_products() -> bool:
    """Whether tl.dot takes float64: 3.4 refuses it, 3.6 compiles it to DMMA."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def cuda_status() -> tuple[bool, str]:
    return cuda_backend.status()


def why_not_cuda(p: Problem) -> str:
    """Why the CUDA kernels cannot run this problem; empty if they can."""
    usable, reason = cuda_status()
    if not usable:
        return reason
    if p.device.type != "cuda":
        return f"the tensors are on {p.device}"
    return cuda_backend.why_not(p, capability(p.device))


def cpu_status() -> str:
    usable, reason = native_cpu_backend.status()
    threads = f"on {torch.get_num_threads()} threads"
    if usable:
        return f"{reason} {threads}; blocked torch matmul for float64"
    return f"blocked torch matmul {threads}; {reason}"


def backend_status() -> dict[str, tuple[bool, str]]:
    """Backend name → (usable here, reason)."""
    return {
        "triton": triton_status(),
        "cuda": cuda_status(),
        "cpu": (True, cpu_status()),
        "reference": (True, "plain torch; writes every similarity to memory"),
    }


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability as 90 for 9.0; the interpreter plays sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# remembered by shape: the same call costs a look-up instead of a search of the tile table
@functools.lru_cache(maxsize=4096)
def choose(p: Problem, backend: str) -> Choice:
    """Raises ValueError / RuntimeError where the asked backend cannot run this problem, and says why."""
    device = p.device.type
    if backend == "reference":
        return Choice("reference", "asked for by name: plain torch, writes every similarity to memory")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"q and d must be on a CPU or CUDA device; got {p.device} (backend='reference' runs anywhere)")
    if backend == "cuda" or (backend == "auto" and device == "cuda"):
        why_not = why_not_cuda(p)
        if backend == "cuda" and why_not:
            raise RuntimeError(f"backend='cuda' cannot run: {why_not}")
        faster = "" if why_not else tiles.cuda_faster(p.dim, query_rows(p), capability(p.device))
        if backend == "cuda" or faster:
            why = faster or "asked for by name; auto takes Triton, beside which this was not timed"
            return Choice("cuda", why, notes=CUDA_NOTES)
    if backend == "cpu" or (backend == "auto" and device == "cpu"):
        if device != "cpu":
            raise ValueError(f"backend='cpu' needs tensors on the CPU; got {p.device}")
        why = "asked for by name" if backend == "cpu" else "the tensors are on the CPU"
        why_torch = native_cpu_backend.why_not(p.device, p.q_dtype, p.d_dtype)
        if why_torch:
            return Choice("cpu", f"{why}: blocked torch matmul and maximum", notes=(why_torch,))
        return Choice("cpu", f"{why}: {native_cpu_backend.status()[1]}", native=True)
    usable, reason = triton_status()
    if not usable:
        raise RuntimeError(f"backend={backend!r} on {p.device} needs triton: {reason}")
    if device == "cpu" and not interpreted():
        raise ValueError("backend='triton' needs tensors on a CUDA device; got cpu")
    if kind(p) == "double" and not float64_products():
        if backend == "triton":
            raise RuntimeError("backend='triton' cannot run float64: triton older than 3.6 multiplies none")
        return Choice("reference", "float64 on a triton older than 3.6, which multiplies none: plain torch")
    tile, source = tiles.pick(kind(p), p.dim, query_rows(p), p.dtype.itemsize, capability(p.device), p.argmax)
    why = "asked for by name" if backend == "triton" else "the tensors are on a CUDA device"
    untimed = device == "cuda" and backend == "auto" and not why_not
    notes = ("backend='cuda' can run this too, but was not timed beside Triton",) if untimed else ()
    return Choice("triton", f"{why}; tile: {source}", tile, notes)


def kind(p: Problem) -> str:
    """How products are taken, see tiles.Row."""
    if p.dtype == torch.float64:
        return "double"
    if p.dtype != torch.float32:
        return "half"
    return "ieee" if p.matmul_precision == "highest" else "tf32"


def query_rows(p: Problem) -> int:
    """Query tokens that one tile could hold: all of one query, or of all queries where they share the documents.

    Ragged queries stand one in a tile, their mean length deciding, so that scores do not depend on who stands beside.
    """
    padded = 1 << (p.l_q - 1).bit_length()
    return padded if p.own or p.q_ragged else padded * (1 << max(0, p.n_q - 1).bit_length())
