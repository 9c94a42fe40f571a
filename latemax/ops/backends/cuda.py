"""The CUDA C++ kernels (csrc/cuda), where the extension was built: float16, bfloat16, and 8-bit codes with each other.

The backward is theirs too, or Triton's where ``no_gradient`` says why; codes have none.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from latemax.ops import tiles
from latemax.ops.backends import pointers, triton
from latemax.ops.backends.base import Status, capability, pairs_by_document
from latemax.ops.problem import Batch, Gradients, Needs, Outputs, Plan, Problem, Side
from latemax.ops.tiles import SHARED_MEMORY, SMALLEST_SHARED_MEMORY

name = "cuda"
_cuda, _why_not = pointers.load("_cuda")

DEVICE = "cuda"  # the emulator in the tests runs on the CPU
DTYPES = (torch.float16, torch.bfloat16)
ARCHITECTURES = "sm_90a (wgmma), sm_80 and PTX for later chips (mma.sync)"

MOST_GRADIENT_DIMS = 1024  # as in csrc/cuda/backward.h
# Where auto leaves the gradient to Triton. Its one-hot products take l_d / 64 / 32 blocks of 235 issue slots (128 dims,
# sm_90) for a query token and a document; the CUDA kernel reads the query token from L2, 256 bytes at 24 a clock and
# multiprocessor: 0.115 l_d clocks and 10.7, both in proportion to dim. Equal at 93 tokens. Predicted: neither ran on a
# GPU.
SHORT_DOCUMENT = 96


class Launch(NamedTuple):
    capability: int = 0  # 80 or 90: that architecture's kernel; 0: the device's
    by_name: bool = True  # the caller asked for this backend


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
    return Status(True, f"built for {ARCHITECTURES}; not yet timed on a GPU")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def most_dims(capability: int, itemsize: int = 2) -> int:
    """The largest dim at which a tile of queries fits in shared memory next to the ring of document tiles."""
    shared = SHARED_MEMORY.get(capability, SMALLEST_SHARED_MEMORY)
    # bytes of a query token. sm_90: 128 of them, two stages of 8 KB, 12 KB of tables and barriers; else 64, three of
    # 16 KB, 4.2 KB
    left = (shared - 16384 - 12288) // 128 if capability == 90 else (shared - 49152 - 4200) // 64
    return left // 128 * 128 // itemsize


def why_not(p: Problem, by_name: bool) -> str:
    if p.bounds:
        return "the CUDA kernels have no bounds"
    usable, reason = status()
    if not usable:
        return reason
    if p.device.type != DEVICE:
        return f"the tensors are on {p.device}"
    arch = capability(p.device)
    if arch < 80:
        return f"compute capability {arch / 10} is below 8.0"
    if "binary" in (p.q_codes, p.d_codes):
        return "the CUDA kernels take 8-bit codes, not 1-bit ones"
    if p.d_codes and not p.q_codes:
        return f"the CUDA kernels take 8-bit codes of d only with those of q, not with q of {p.q_dtype}"
    if not p.d_codes and (p.q_dtype != p.d_dtype or p.q_dtype not in DTYPES):
        return f"the CUDA kernels take q and d both float16 or both bfloat16, not {p.q_dtype} and {p.d_dtype}"
    if p.weighted or p.mean:
        return "the CUDA kernels take neither weights nor the mean of query tokens"
    itemsize = p.q_dtype.itemsize
    if p.dim * itemsize % 16:
        return f"the CUDA kernels copy 16 bytes at a time: dim must be a multiple of {16 // itemsize}, not {p.dim}"
    if p.dim > most_dims(arch, itemsize):
        return f"the CUDA kernels keep whole query tokens in shared memory: dim up to {most_dims(arch, itemsize)} here"
    if not by_name and not _faster(p):
        return "backend='cuda' can run this too, but was not timed against Triton"
    return ""


def _faster(p: Problem) -> str:
    # the table is of half precision
    return "" if p.d_codes else tiles.cuda_faster(p.dim, triton.query_rows(p), capability(p.device))


def plan(p: Problem, by_name: bool) -> Plan:
    why = _faster(p) or "asked for by name; auto takes Triton, against which this was not timed"
    if p.d_codes:
        gradient = "codes have no gradient"
    elif p.q_ragged or p.dim > MOST_GRADIENT_DIMS:
        gradient = "Triton's kernels compute the gradient, from the recorded argmax"
    elif by_name:
        gradient = "these kernels compute the gradient too; their backward has never run on a GPU"
    else:
        gradient = f"Triton's kernels compute the gradient of documents of under {SHORT_DOCUMENT} tokens, else these"
    return Plan(name, why, (gradient,), Launch(by_name=by_name))


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _rows(x: Tensor) -> Tensor:
    """``x`` as the copy engines take it: contiguous dims, every token at a multiple of 16 bytes, no two tokens that
    overlap. Copies where that does not hold."""
    x = x.resolve_neg() if x.is_neg() else x
    strides, packet = x.stride(), 16 // x.element_size()
    taken = strides[-1] == 1 and x.data_ptr() % 16 == 0 and all(stride % packet == 0 for stride in strides[:-1])
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
        call = (*pointers.forward_call(b, out), *pointers.codes(b))
        needed = _cuda.scratch_bytes(index, capability, *call)
        scratch = b.q.tokens.new_empty(needed, dtype=torch.uint8) if needed else None
        _cuda.forward(index, _stream(device), capability, pointers.address(scratch), *call)


def no_gradient(b: Batch, by_name: bool) -> str:
    """Why Triton's kernels compute the gradient of this batch; empty if the CUDA kernels do."""
    if b.q.offsets is not None:
        return "the CUDA kernels compute the gradient of queries of one length"
    if b.dim > MOST_GRADIENT_DIMS:
        return f"the CUDA kernels compute gradients of up to {MOST_GRADIENT_DIMS} dims"
    tokens = b.d.length if b.d.offsets is None else -(-b.d.length // max(1, b.d.items))
    if not by_name and tokens < SHORT_DOCUMENT:
        return "predicted to be slower than Triton's for short documents"
    return ""


def backward(b: Batch, plan: Plan, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
    if no_gradient(b, plan.launch.by_name):
        return triton.backward(b, plan, argmax, g, needs)
    b = b._replace(q=_side(b.q), d=_side(b.d))
    q, d = b.q.tokens, b.d.tokens
    empty = not g.numel() or not b.q.length or not b.d.length
    allocate = torch.zeros_like if empty else torch.empty_like
    grads = Gradients(
        *(
            allocate(x, memory_format=torch.contiguous_format) if needed else None
            for x, needed in ((q, needs.q), (d, needs.d))
        )
    )
    if empty:
        return grads
    g = g.resolve_neg()
    device = q.device.index or 0
    with pointers.on(q.device):
        pairs = starts = parts = None
        if b.candidates is not None and needs.d:
            pairs, starts = pairs_by_document(b.candidates, b.d.items)
        if needs.q and (splits := _cuda.splits(len(q) * b.q.length, b.n_d, device)) > 1:
            parts = q.new_empty(splits, *q.shape, dtype=torch.float32)
        _cuda.backward(
            device, _stream(q.device), *pointers.call(b, g.shape, None, argmax), pointers.address(g), g.stride(),
            *(pointers.address(x) for x in (pairs, starts, grads.q, grads.d, parts)),
        )  # fmt: skip
    return grads


def _side(s: Side) -> Side:
    return s._replace(tokens=_rows(s.tokens))
