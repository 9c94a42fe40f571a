"""The CUDA C++ kernels (csrc/cuda): float16 and bfloat16 forward on CUDA, where they were built.

Backward is Triton's, from the winners that these kernels record.
"""

from __future__ import annotations

import functools

import torch

from latemax._check import Problem
from latemax.ops import binding
from latemax.ops.binding import address
from latemax.ops.tiles import SHARED_MEMORY, SMALLEST_SHARED_MEMORY

_cuda, _why_not = binding.load("_cuda")

# maxsim_dtype of csrc/maxsim.h
_DTYPES = {torch.float16: 0, torch.bfloat16: 1}
ARCHITECTURES = "sm_90a (wgmma), sm_80 and PTX for later chips (mma.sync)"


@functools.cache
def status() -> tuple[bool, str]:
    """(usable here, why not or for which architectures)."""
    if _cuda is None:
        return False, f"the CUDA extension cannot be loaded: {_why_not}"
    if not torch.cuda.is_available():
        return False, f"built for {ARCHITECTURES}, but torch sees no CUDA device"
    driver, runtime = _cuda.versions()
    if driver // 1000 < runtime // 1000:
        return False, f"built with CUDA {_version(runtime)}, which the driver (CUDA {_version(driver)}) is too old for"
    return True, f"built for {ARCHITECTURES}; forward alone, backward is Triton's; not yet timed on a GPU"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def load(device: torch.device, capability: int = 0) -> None:
    """Loads the kernels on ``device``, so that a later first call may be inside a graph capture."""
    with binding.on(device):
        _cuda.load(device.index or 0, capability)


def most_dims(capability: int) -> int:
    """Up to which dim a tile of queries stays in shared memory beside the ring of document tiles."""
    shared = SHARED_MEMORY.get(capability, SMALLEST_SHARED_MEMORY)
    # sm_90: 128 query tokens, two stages of 16 KB, 10 KB of tables and barriers; else 64, three of 16 KB, 4.2 KB
    left = (shared - 32768 - 10240) // 256 if capability == 90 else (shared - 49152 - 4200) // 128
    return left // 64 * 64


def why_not(p: Problem, capability: int) -> str:
    """Why this problem does not go through the CUDA kernels; empty if it does."""
    if capability < 80:
        return f"compute capability {capability / 10} is below 8.0"
    if p.q_dtype != p.d_dtype or p.q_dtype not in _DTYPES:
        return f"the CUDA kernels take q and d both float16 or both bfloat16, not {p.q_dtype} and {p.d_dtype}"
    if p.q_ragged:
        return "the CUDA kernels take ragged documents, but queries of one length"
    if p.dim % 8:
        return f"the CUDA kernels copy 16 bytes at a time: dim must be a multiple of 8, not {p.dim}"
    if p.dim > most_dims(capability):
        return f"the CUDA kernels keep whole query tokens in shared memory: dim up to {most_dims(capability)} here"
    return ""


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as the copy engines take it: contiguous dims, every token at a multiple of 16 bytes, no two tokens that
    overlap. Copies where that does not hold."""
    x = x.resolve_neg() if x.is_neg() else x
    strides = x.stride()
    taken = strides[-1] == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides[:-1])
    # an axis of size 1 may have any stride; expanded and sliding views overlap, which a tensor map cannot express
    taken = taken and (strides[-2] >= x.shape[-1] or x.shape[-2] <= 1)
    # not contiguous(), which returns a contiguous x itself, however it is aligned
    return x if taken else x.clone(memory_format=torch.contiguous_format)


def _run(
    q: torch.Tensor,  # [n_q, l_q, dim], or with q_offsets [t_q, dim]
    d: torch.Tensor,  # [n_d, l_d, dim], [n_q, n_d, l_d, dim], or with d_offsets [t_d, dim]
    q_mask: torch.Tensor | None,
    d_mask: torch.Tensor | None,
    scores: torch.Tensor,  # [n_q, n_c]
    argmax: torch.Tensor,  # [n_q, n_c, l_q] or of no element
    normalize: bool,
    empty_score: float,
    q_offsets: torch.Tensor | None = None,
    d_offsets: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
    l_q: int = 0,
    capability: int = 0,
) -> None:
    if not scores.numel():
        return
    device = q.device.index or 0
    q, d = _rows(q), _rows(d)
    n_q, n_c = scores.shape
    flat_q, flat_d = q_offsets is not None, d_offsets is not None
    l_q = l_q if flat_q else q.shape[1]
    own = d.dim() == 4 or candidates is not None
    q_strides = (0, *q.stride()) if flat_q else q.stride()
    d_strides = (0,) * (4 - d.dim()) + d.stride()
    q_mask_strides = (0, 0) if q_mask is None else (0,) * (2 - q_mask.dim()) + q_mask.stride()
    d_mask_strides = (0, 0, 0) if d_mask is None else (0,) * (3 - d_mask.dim()) + d_mask.stride()
    with binding.on(q.device):
        floats = functools.partial(q.new_empty, dtype=torch.float32)
        norms = (floats(q[..., 0].numel()), floats(d[..., 0].numel())) if normalize else (None, None)
        # of documents, not of tokens: what the kernels find there is where the last kept token lies
        documents = 0 if d_mask is None else len(d_offsets) - 1 if flat_d else d.shape[:-2].numel()
        lengths = None if d_mask is None else q.new_empty(documents, dtype=torch.int32)
        parts = _cuda.parts(l_q, device, capability)
        partial = floats(parts, n_q, n_c) if parts > 1 else None
        _cuda.forward(
            device, _stream(q.device), capability, own,
            _DTYPES[q.dtype], q.data_ptr(), (n_q, l_q, q.shape[-1]), q_strides, address(q_offsets),
            len(q) if flat_q else 0,
            d.data_ptr(), n_c, 0 if flat_d else d.shape[-2], d_strides, address(d_offsets), len(d) if flat_d else 0,
            len(d_offsets) - 1 if flat_d else 0, address(candidates),
            address(q_mask), q_mask_strides, address(d_mask), d_mask_strides, address(lengths),
            address(norms[0]), address(norms[1]), address(partial), scores.data_ptr(),
            argmax.data_ptr() if argmax.numel() else 0, normalize, empty_score,
        )  # fmt: skip


def forward(q, d, q_mask, d_mask, scores, argmax, *, normalize, empty_score, capability=0) -> None:
    """Fills scores [n_q, n_d] and, where it has elements, argmax int32 [n_q, n_d, l_q].

    ``capability``: 80 or 90 picks that kernel; that of the device by default.
    """
    _run(q, d, q_mask, d_mask, scores, argmax, normalize, empty_score, capability=capability)


def forward_packed(
    q: torch.Tensor,  # [n_q, l_q, dim], or with q_offsets [t_q, dim]
    d: torch.Tensor,  # [t_d, dim]
    q_mask: torch.Tensor | None,  # q.shape[:-1]
    d_mask: torch.Tensor | None,  # [t_d]
    d_offsets: torch.Tensor,  # int64 [n_documents + 1] contiguous
    candidates: torch.Tensor | None,  # int64 [n_q, k] contiguous, -1 for none
    scores: torch.Tensor,  # [n_q, n_documents] or [n_q, k]
    argmax: torch.Tensor,
    *,
    normalize,
    empty_score,
    q_offsets: torch.Tensor | None = None,  # int64 [n_q + 1] contiguous
    l_q: int = 0,  # the longest query, with q_offsets
    capability=0,
) -> None:
    """``forward`` over documents, and where asked queries, that lie end to end. Offsets are on the device and are not
    checked: that would take a synchronisation. Kernels keep themselves inside the tokens; a candidate that is no
    document scores NaN."""
    _run(
        q, d, q_mask, d_mask, scores, argmax, normalize, empty_score, q_offsets, d_offsets, candidates, l_q, capability
    )  # fmt: skip
