"""Launches the Triton kernels of the smooth maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from latemax.kernels.smooth import smooth_grad_d_kernel, smooth_grad_q_kernel, smooth_kernel
from latemax.ops.backends import pointers
from latemax.ops.backends import triton_operands as operands
from latemax.ops.backends.triton_launch import _ceil, _dense_dims, _launch
from latemax.ops.problem import Side
from latemax.ops.tiles import padded_dim


def tile(itemsize: int, l_q: int) -> tuple[int, int]:
    """(query tokens, document tokens) of a block, by the wider of the dtypes.

    Half precision: 64 query tokens take wgmma on sm_90, 82 instructions in the inner loop instead of 144 for 32, which
    take mma. Wider blocks of float32 and float64 spill in grad_d, up to 196 times an iteration.
    """
    if itemsize == 2:
        return (16 if l_q <= 16 else 32 if l_q <= 32 else 64), 64
    return (32, 32) if itemsize == 4 else (16, 32)


class Call:
    """What the three launches share: a dense piece of a batch, with masks and inverse norms that are always there."""

    def __init__(self, q: Side, d: Side, tau: float, normalize: bool, dtype: torch.dtype) -> None:
        q, d = _dense_dims(q), _dense_dims(d)
        self.device = q.tokens.device
        self.n_q, self.l_q, self.dim = q.tokens.shape
        self.own = d.tokens.dim() == 4
        self.n_d, self.l_d = d.tokens.shape[-3:-1]
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        (q_keep, q_inv), (d_keep, d_inv) = self._kept(q, normalize), self._kept(d, normalize)
        self.tensors = q.tokens, d.tokens, q_keep, q_inv, d_keep, d_inv
        strides = d.tokens.stride()[:-1]
        self.strides = (
            *q.tokens.stride()[:2], *((0,) * (3 - len(strides)) + strides), self.n_d * self.l_d if self.own else 0
        )  # fmt: skip
        self.sizes = (self.n_q, self.n_d, self.l_q, self.l_d, tau)
        # the wider of the dtypes of q and d decides; a half-precision row and a share keep their digits in TF32
        precision = "tf32" if dtype.itemsize == 2 else operands.precision(dtype)
        block_k = min(64, padded_dim(self.dim))
        self.block_q, self.block_d = tile(dtype.itemsize, self.l_q)
        self.constants = self.dim, self.block_q, self.block_d, block_k
        self.column_blocks = _ceil(self.dim, block_k)
        self.align = operands.align(q.tokens, d.tokens), precision
        self.types = operands.compute(dtype), operands.accumulator(dtype)

    def _kept(self, s: Side, normalize: bool) -> tuple[Tensor, Tensor]:
        x = s.tokens
        keep = x.new_ones(x.shape[:-1], dtype=torch.bool) if s.mask is None else s.mask.contiguous()
        if not normalize:
            return keep, x.new_ones(x.shape[:-1], dtype=self.wide)
        norms = torch.linalg.vector_norm(x, dim=-1, dtype=self.wide)
        return keep, 1 / norms.clamp_min_(1e-12)

    def scores(self) -> Tensor:
        """[n_q, n_d], not looking at documents without a valid token."""
        chunks = _ceil(self.l_q, self.block_q)
        parts = self._smooth((chunks, self.n_q, self.n_d), True)
        return parts[0] if chunks == 1 else parts.sum(0)

    def smooth(self) -> Tensor:
        return self._smooth((self.n_q, self.n_d, self.l_q), False)

    def _smooth(self, shape: tuple[int, ...], total: bool) -> Tensor:
        out = torch.empty(shape, dtype=self.wide, device=self.device)
        with pointers.on(self.device):
            _launch(
                smooth_kernel, _ceil(self.l_q, self.block_q) * self.n_q * self.n_d, (*self.tensors, out),
                (*self.strides, *self.sizes), (*self.constants, total, *self.align), self.types,
            )  # fmt: skip
        return out

    def grad_q(self, smooth: Tensor, g: Tensor) -> Tensor:
        """Of the unit vectors."""
        out = torch.empty(self.n_q, self.l_q, self.dim, dtype=self.wide, device=self.device)
        with pointers.on(self.device):
            _launch(
                smooth_grad_q_kernel, self.column_blocks * _ceil(self.l_q, self.block_q) * self.n_q,
                (*self.tensors, smooth, g, out), (*self.strides, *g.stride(), *self.sizes),
                (*self.constants, *self.align), self.types,
            )  # fmt: skip
        return out

    def grad_d(self, smooth: Tensor, g: Tensor) -> Tensor:
        shape = (*((self.n_q,) if self.own else ()), self.n_d, self.l_d, self.dim)
        out = torch.empty(shape, dtype=self.wide, device=self.device)
        if not out.numel():
            return out
        documents = self.n_d * (self.n_q if self.own else 1)
        with pointers.on(self.device):
            _launch(
                smooth_grad_d_kernel, self.column_blocks * _ceil(self.l_d, self.block_d) * documents,
                (*self.tensors, smooth, g, out), (*self.strides, *g.stride(), *self.sizes),
                (*self.constants, self.own, *self.align), self.types,
            )  # fmt: skip
        return out
