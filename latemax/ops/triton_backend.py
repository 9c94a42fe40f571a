"""Launches the Triton kernels of latemax.kernels on canonical tensors."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from latemax.kernels.backward import grad_d_kernel, grad_q_kernel, through_norm_kernel
from latemax.kernels.forward import forward_kernel, inverse_norm_kernel
from latemax.ops.tiles import TileConfig, backward_tile, padded_dim

TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
# programs below which a GPU of 132 multiprocessors idles: then a loop over documents is split further
ENOUGH_PROGRAMS = 4 * 132


def _on(device: torch.device):
    """Launches go to the tensors' device, whichever is current."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _unit_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: torch.Tensor | None, own: bool) -> tuple[int, int, int]:
    """(n_q, n_d, token) strides of d or its mask; shared documents do not move with the query."""
    if x is None:
        return 0, 0, 0
    return (x.stride(0), x.stride(1), x.stride(2)) if own else (0, x.stride(0), x.stride(1))


def _align(*tensors: torch.Tensor) -> int:
    """How many elements every row address is a multiple of: 16 bytes' worth, or 1."""
    for x in tensors:
        step = 16 // x.element_size()
        if x.data_ptr() % 16 or any(s % step for s in x.stride()[:-1]):
            return 1
    return min(16 // x.element_size() for x in tensors)


def _compute(dtype: torch.dtype):
    """What products are taken in. The interpreter multiplies bfloat16 bit patterns as integers (triton 3.9), so there
    they are taken in float32, which holds them exactly."""
    return tl.float32 if dtype == torch.bfloat16 and triton.knobs.runtime.interpret else TL_DTYPES[dtype]


def _precision(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def _accumulator(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _inverse_norms(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[n, l, dim] or [n, k, l, dim] → flat 1 / max(‖token‖, 1e-12) in the accumulation dtype."""
    out = x.new_empty(x[..., 0].numel(), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if out.numel():
        x4 = x if x.dim() == 4 else x.unsqueeze(1)
        columns = min(padded_dim(x.shape[-1]), 1024)
        block = max(1, 4096 // columns)
        inverse_norm_kernel[(triton.cdiv(out.numel(), block),)](
            x4, out, *x4.stride()[:3], x4.shape[1], x4.shape[2], out.numel(),
            DIM=x.shape[-1], BLOCK_R=block, BLOCK_K=columns, ALIGN=_align(x4), ACC=_accumulator(dtype),
        )  # fmt: skip
    return out


def _splits(programs: int, most: int) -> int:
    """Into how many parts a program's loop is cut so that the GPU is filled."""
    return max(1, min(most, ENOUGH_PROGRAMS // max(1, programs)))


def packed(tile: TileConfig, l_q: int, n_q: int, own: bool) -> int:
    """How many queries share one tile: as many as fit, where they share the documents too."""
    return 1 if own or n_q == 1 else max(1, tile.block_q >> (l_q - 1).bit_length())


def forward(q, d, q_mask, d_mask, scores, argmax, *, normalize, empty_score, tile) -> None:
    """Fills scores [n_q, n_d] and, where it has elements, argmax int32 [n_q, n_d, l_q]."""
    n_q, l_q, dim = q.shape
    own, n_d, l_d = d.dim() == 4, d.shape[-3], d.shape[-2]
    if not scores.numel():
        return
    q, d = _unit_last(q), _unit_last(d)
    dtype = torch.promote_types(q.dtype, d.dtype)
    pack = packed(tile, l_q, n_q, own)
    q_tiles, chunks = triton.cdiv(n_q, pack), triton.cdiv(l_q, tile.block_q)
    # norms inside the tile are free where memory is waited for; a tile used again would pay for them again
    norm = 0
    if normalize:
        norm = 1 if q_tiles == chunks == 1 and dim <= tile.block_k else 2
    with _on(q.device):
        q_inv, d_inv = (_inverse_norms(q, dtype), _inverse_norms(d, dtype)) if norm == 2 else (scores, scores)
        out = scores if chunks == 1 else scores.new_empty(chunks, n_q, n_d)
        forward_kernel[(q_tiles * chunks * n_d,)](
            q, d, scores if q_mask is None else q_mask, scores if d_mask is None else d_mask, q_inv, d_inv, out,
            argmax, q.stride(0), q.stride(1), *_strides(d, own),
            *((0, 0) if q_mask is None else q_mask.stride()), *_strides(d_mask, own), n_d * l_d if own else 0,
            n_q, n_d, l_q, l_d, chunks, empty_score,
            DIM=dim, BLOCK_Q=tile.block_q, BLOCK_D=tile.block_d, BLOCK_K=tile.block_k, PACK=pack,
            SWAP=tile.swap, Q_MASKED=q_mask is not None, D_MASKED=d_mask is not None, NORM=norm,
            ARGMAX=argmax.numel() > 0, ALIGN=_align(q, d), COMPUTE=_compute(dtype), ACC=_accumulator(dtype),
            PRECISION=_precision(dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if chunks > 1:
            torch.sum(out, 0, out=scores)


def backward(g, q, d, argmax, *, normalize, needs_q, needs_d):
    """(grad_q, grad_d) in the dtypes of q and d, or None for a side that needs none."""
    n_q, l_q, dim = q.shape
    own, n_d, l_d = d.dim() == 4, d.shape[-3], d.shape[-2]
    dtype = torch.promote_types(q.dtype, d.dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    columns = padded_dim(dim)
    if not g.numel() or not l_d:
        return (torch.zeros_like(q) if needs_q else None), (torch.zeros_like(d) if needs_d else None)
    q, d = _unit_last(q), _unit_last(d)
    common = dict(DIM=dim, BLOCK_K=columns, ALIGN=_align(q, d), ACC=_accumulator(dtype))
    grad_q = grad_d = None
    with _on(q.device):
        q_inv, d_inv = (_inverse_norms(q, dtype), _inverse_norms(d, dtype)) if normalize else (g, g)
        if needs_q:
            block = min(max(1, 4096 // columns), padded_dim(l_q))
            blocks = triton.cdiv(l_q, block)
            splits = _splits(blocks * n_q, n_d)
            parts = q.new_empty(splits, n_q, l_q, dim, dtype=acc if normalize or splits > 1 else q.dtype)
            grad_q_kernel[(blocks * n_q * splits,)](
                d, d_inv, argmax, g, parts, *_strides(d, own), n_d * l_d if own else 0, *g.stride(),
                n_q, n_d, l_q, l_d, splits, BLOCK_R=block, NORM=normalize, **common,
            )  # fmt: skip
            grad_q = parts[0] if splits == 1 else parts.sum(0)
            if normalize:
                raw, grad_q = grad_q, torch.empty_like(q, memory_format=torch.contiguous_format)
                through_norm_kernel[(triton.cdiv(n_q * l_q, block),)](
                    q, q_inv, raw, grad_q, q.stride(0), q.stride(1), l_q, n_q * l_q,
                    DIM=dim, BLOCK_R=block, BLOCK_K=columns, ACC=_accumulator(dtype),
                )  # fmt: skip
            grad_q = grad_q.to(q.dtype)
        if needs_d:
            grad_d = torch.empty_like(d, memory_format=torch.contiguous_format)
            # scaled rows would round to half precision before the product, so they take the float32 path
            compute = acc if normalize else q.dtype
            tile = backward_tile(dim, l_q, compute.itemsize)
            grad_d_kernel[(triton.cdiv(l_d, tile.block_d) * n_d * (n_q if own else 1),)](
                q, d, q_inv, d_inv, argmax, g, grad_d, q.stride(0), q.stride(1), *_strides(d, own), *g.stride(),
                n_q, n_d, l_q, l_d, BLOCK_D=tile.block_d, BLOCK_R=tile.block_r, OWN=own, NORM=normalize,
                COMPUTE=_compute(compute), num_warps=tile.num_warps, num_stages=2,
                PRECISION=_precision(q.dtype) if compute == q.dtype else "tf32" if acc == torch.float32 else "ieee",
                **common,
            )  # fmt: skip
    return grad_q, grad_d
