"""The CUDA C++ kernels (csrc/cuda): float16 and bfloat16 forward, where the extension was built.

Triton runs the backward, from the argmax that these kernels record.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from latemax.ops import tiles
from latemax.ops.backends import pointers, triton
from latemax.ops.backends.base import Status, capability
from latemax.ops.problem import Batch, Gradients, Needs, Outputs, Plan, Problem, Side
from latemax.ops.tiles import SHARED_MEMORY, SMALLEST_SHARED_MEMORY

name = "cuda"
_cuda, _why_not = pointers.load("_cuda")

DEVICE = "cuda"  # the emulator in the tests runs on the CPU
DTYPES = (torch.float16, torch.bfloat16)
ARCHITECTURES = "sm_90a (wgmma), sm_80 and PTX for later chips (mma.sync)"


class Launch(NamedTuple):
    capability: int = 0  # 80 or 90: that architecture's kernel; 0: the device's


@functools.cache
def status() -> Status:
    if _cuda is None:
        return Status(False, f"the CUDA extension cannot be loaded: {_why_not}")
    if not torch.cuda.is_available():
        return Status(False, f"built for {ARCHITECTURES}, but torch sees no CUDA device")
    driver, runtime = _cuda.versions()
    if driver // 1000 < runtime // 1000:
        return Status(
            False, f"built with CUDA {_version(runtime)}, which the driver (CUDA {_version(driver)}) is too old for"
        )
    return Status(True, f"built for {ARCHITECTURES}; forward only, Triton runs the backward; not yet timed on a GPU")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def most_dims(capability: int) -> int:
    """The largest dim at which a tile of queries fits in shared memory next to the ring of document tiles."""
    shared = SHARED_MEMORY.get(capability, SMALLEST_SHARED_MEMORY)
    # sm_90: 128 query tokens, two stages of 8 KB, 12 KB of tables and barriers; else 64, three of 16 KB, 4.2 KB
    left = (shared - 16384 - 12288) // 256 if capability == 90 else (shared - 49152 - 4200) // 128
    return left // 64 * 64


def why_not(p: Problem, by_name: bool) -> str:
    usable, reason = status()
    if not usable:
        return reason
    if p.device.type != DEVICE:
        return f"the tensors are on {p.device}"
    arch = capability(p.device)
    if arch < 80:
        return f"compute capability {arch / 10} is below 8.0"
    if p.q_dtype != p.d_dtype or p.q_dtype not in DTYPES:
        return f"the CUDA kernels take q and d both float16 or both bfloat16, not {p.q_dtype} and {p.d_dtype}"
    if p.weighted or p.mean:
        return "the CUDA kernels take neither weights nor the mean of query tokens"
    if p.dim % 8:
        return f"the CUDA kernels copy 16 bytes at a time: dim must be a multiple of 8, not {p.dim}"
    if p.dim > most_dims(arch):
        return f"the CUDA kernels keep whole query tokens in shared memory: dim up to {most_dims(arch)} here"
    if not by_name and not _faster(p):
        return "backend='cuda' can run this too, but was not timed against Triton"
    return ""


def _faster(p: Problem) -> str:
    return tiles.cuda_faster(p.dim, triton.query_rows(p), capability(p.device))


def plan(p: Problem, by_name: bool) -> Plan:
    why = _faster(p) or "asked for by name; auto takes Triton, against which this was not timed"
    return Plan(name, why, ("Triton's kernels compute the gradient, from the recorded argmax",), Launch())


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _rows(x: Tensor) -> Tensor:
    """``x`` as the copy engines take it: contiguous dims, every token at a multiple of 16 bytes, no two tokens that
    overlap. Copies where that does not hold."""
    x = x.resolve_neg() if x.is_neg() else x
    strides = x.stride()
    taken = strides[-1] == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides[:-1])
    # an axis of size 1 may have any stride; expanded and sliding views overlap, which a tensor map cannot express
    taken = taken and (strides[-2] >= x.shape[-1] or x.shape[-2] <= 1)
    # not contiguous(), which returns a contiguous x itself, however it is aligned
    return x if taken else x.clone(memory_format=torch.contiguous_format)


def forward(b: Batch, plan: Plan, out: Outputs) -> None:
    """Offsets and candidates are on the device and are not checked, since reading them would need a device sync: the
    kernels stay inside the tokens, and an invalid candidate scores NaN."""
    if not out.scores.numel():
        return
    b = b._replace(q=_side(b.q), d=_side(b.d))
    device, capability = b.q.tokens.device, plan.launch.capability
    index = device.index or 0
    if b.q.offsets is not None and out.argmax is not None:
        # no program owns the rows after the last offset
        out.argmax.fill_(-1)
    with pointers.on(device):
        call = pointers.forward_call(b, out)
        needed = _cuda.scratch_bytes(index, capability, *call)
        scratch = b.q.tokens.new_empty(needed, dtype=torch.uint8) if needed else None
        _cuda.forward(index, _stream(device), capability, pointers.address(scratch), *call)


def backward(b: Batch, plan: Plan, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
    return triton.backward(b, plan, argmax, g, needs)


def _side(s: Side) -> Side:
    return s._replace(tokens=_rows(s.tokens))
