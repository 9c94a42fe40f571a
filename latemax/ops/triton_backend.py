"""Launches the Triton kernels of latemax.kernels on canonical tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from latemax._check import DENSE, sizes
from latemax.kernels.backward import grad_d_kernel, grad_q_kernel, through_norm_kernel
from latemax.kernels.forward import forward_kernel, inverse_norm_kernel, sum_slots_kernel
from latemax.ops import binding
from latemax.ops.tiles import TileConfig, backward_tile, padded_dim

TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
# decided when the kernels are decorated, at import
INTERPRETED = triton.knobs.runtime.interpret
# programs below which a GPU of 132 multiprocessors idles: then a loop over documents is split further
ENOUGH_PROGRAMS = 4 * 132


# (kernel, device, constants, options, pointer types) → the compiled kernel
_built: dict = {}


def _launch(
    kernel, programs: int, pointers: tuple, numbers: tuple, constants: tuple, types: tuple,
    warps: int = 4, stages: int = 3,
):  # fmt: skip
    """``kernel[(programs,)](*pointers, *numbers, *constants, *types)`` without triton's binder, once a build is known:
    3 µs instead of 40 (benchmarks/host.py).

    What decides the build is in the key: the constants, each pointer's dtype and 16-byte alignment. Not the numbers,
    which are not specialised (beyond int32 they take triton's own way, which sees that they need another type), nor the
    types of products and sums, which follow from the pointers and the constants (and are slow to hash).

    Returns the build where it may be launched again, else None.
    """
    narrow = max(numbers) < 1 << 31
    key = (
        kernel, pointers[0].device, constants, warps, stages, *[(x.dtype, x.data_ptr() % 16 == 0) for x in pointers]
    )  # fmt: skip
    built = _built.get(key) if narrow else None
    if built is not None:
        built[(programs, 1, 1)](*pointers, *numbers, *constants, *types)
        return built
    built = kernel[(programs,)](*pointers, *numbers, *constants, *types, num_warps=warps, num_stages=stages)
    # the interpreter builds nothing
    if built is None or not narrow:
        return None
    _built[key] = built
    return built


def _hooked() -> bool:
    """Whether somebody, a profiler say, wants to be called around launches (triton 3.4: one hook; later: a chain)."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Again:
    """A forward that was one launch, prepared for other tensors of the same shapes, strides, dtypes, 16-byte alignment
    and device. What it leaves out of a call is two thirds of its host time (benchmarks/host.py)."""

    __slots__ = ("built", "constants", "function", "grid", "index", "metadata", "numbers", "outputs", "run")

    def __init__(self, built, programs: int, numbers: tuple, constants: tuple, scores, argmax):
        self.built, self.numbers, self.constants, self.grid = built, numbers, constants, (programs, 1, 1)
        self.run, self.function, self.metadata = built.run, built.function, built.packed_metadata
        self.index = scores.device.index if scores.is_cuda else None
        # (shape, strides, dtype, device) of the outputs: torch.empty_strided is the quickest of the allocations
        self.outputs = [
            (x.shape, x.stride(), x.dtype, x.device) if x.numel() else None for x in (scores, argmax)
        ]  # fmt: skip

    def __call__(self, q, d, q_mask, d_mask, empty_score: float):
        """(scores, argmax or None where none is wanted); None where another device is the current one."""
        if self.index is not None and self.index != torch.cuda.current_device():
            return None
        (shape, strides, dtype, device), winners = self.outputs
        scores = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        argmax = None
        if winners is not None:
            argmax = torch.empty_strided(winners[0], winners[1], dtype=winners[2], device=device)
        pointers = (
            q, d, scores if q_mask is None else q_mask, scores if d_mask is None else d_mask, scores, scores, scores,
            *[scores if argmax is None else argmax] * 4,
        )  # fmt: skip
        if _hooked():
            self.built[self.grid](*pointers, *self.numbers, empty_score, *self.constants)
        else:
            stream = driver.active.get_current_stream(self.index or 0)
            self.run(
                *self.grid, stream, self.function, self.metadata, None, None, None, *pointers, *self.numbers,
                empty_score, *self.constants,
            )  # fmt: skip
        return scores, argmax


def _ceil(a: int, b: int) -> int:
    # triton.cdiv is a constexpr function: 7 µs a call
    return -(-a // b)


def _unit_last(x: torch.Tensor) -> torch.Tensor:
    # a lazy negation (of a view of a conjugate) is a flag that a pointer does not carry
    x = x.resolve_neg() if x.is_neg() else x
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: torch.Tensor | None, packing, mask: bool = False) -> tuple[int, int, int]:
    """(n_q, n_d, token) strides of d or its mask; documents that all queries share do not move with the query."""
    if x is None:
        return 0, 0, 0
    if packing.cu_d is not None:
        return 0, 0, x.stride(0)
    own = x.dim() == (3 if mask else 4)
    return (x.stride(0), x.stride(1), x.stride(2)) if own else (0, x.stride(0), x.stride(1))


def _q_strides(x: torch.Tensor | None, packing) -> tuple[int, int]:
    """(n_q, token) strides of q or its mask."""
    if x is None:
        return 0, 0
    return (0, x.stride(0)) if packing.cu_q is not None else (x.stride(0), x.stride(1))


def _four(x: torch.Tensor) -> torch.Tensor:
    """Tokens as [n, k, l, dim]."""
    return x if x.dim() == 4 else x.unsqueeze(1) if x.dim() == 3 else x[None, None]


def _align(*tensors: torch.Tensor) -> int:
    """How many elements every row address is a multiple of: 16 bytes' worth, or 1."""
    most = 16
    for x in tensors:
        step = 16 // x.element_size()
        odd = x.data_ptr() % 16
        for stride in x.stride()[:-1]:
            odd |= stride % step
        if odd:
            return 1
        most = min(most, step)
    return most


def _compute(dtype: torch.dtype):
    """What products are taken in. The interpreter multiplies bfloat16 bit patterns as integers (triton 3.9), so there
    they are taken in float32, which holds them exactly."""
    return tl.float32 if dtype == torch.bfloat16 and INTERPRETED else TL_DTYPES[dtype]


def _precision(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def _accumulator(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _inverse_norms(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[l, dim], [n, l, dim] or [n, k, l, dim] → flat 1 / max(‖token‖, 1e-12) in the accumulation dtype."""
    out = x.new_empty(x[..., 0].numel(), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if out.numel():
        x4 = _four(x)
        columns = min(padded_dim(x.shape[-1]), 1024)
        block = max(1, 4096 // columns)
        _launch(
            inverse_norm_kernel, _ceil(out.numel(), block), (x4, out),
            (*x4.stride()[:3], x4.shape[1], x4.shape[2], out.numel()),
            (x.shape[-1], block, columns, _align(x4)), (_accumulator(dtype),),
        )  # fmt: skip
    return out


def _through_norm(x: torch.Tensor, inv: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Gradient of the tokens x given that of their unit vectors; in the dtype of x."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x4 = _four(x)
    columns = padded_dim(x.shape[-1])
    block = max(1, 4096 // columns)
    _launch(
        through_norm_kernel, _ceil(inv.numel(), block), (x4, inv, g, out),
        (*x4.stride()[:3], x4.shape[1], x4.shape[2], inv.numel()), (x.shape[-1], block, columns),
        (_accumulator(g.dtype),),
    )  # fmt: skip
    return out


def _splits(programs: int, most: int) -> int:
    """Into how many parts a program's loop is cut so that the GPU is filled."""
    return max(1, min(most, ENOUGH_PROGRAMS // max(1, programs)))


def packed(tile: TileConfig, l_q: int, n_q: int, own: bool) -> int:
    """How many queries share one tile: as many as fit, where they share the documents too."""
    return 1 if own or n_q == 1 else max(1, tile.block_q >> (l_q - 1).bit_length())


def forward(q, d, q_mask, d_mask, scores, argmax, *, normalize, empty_score, tile, packing=DENSE) -> Again | None:
    """Fills scores [n_q, n_d] and, where it has elements, argmax: int32 [n_q, n_d, l_q], or with cu_q [n_d, t_q].

    Returns how to repeat it on other dense tensors of the same form, where that takes one launch and nothing else.
    """
    own, n_q, n_d, l_q, l_d, dim = sizes(q, d, packing)
    cu_q, cu_d, candidates = packing
    if not scores.numel():
        return None
    given = q, d
    q, d = _unit_last(q), _unit_last(d)
    dtype = torch.promote_types(q.dtype, d.dtype)
    pack = 1 if cu_q is not None else packed(tile, l_q, n_q, own)
    q_tiles, chunks = (_ceil(n_q, pack), _ceil(l_q, tile.block_q)) if cu_q is None else (1, l_q // tile.block_q + n_q)
    # norms inside the tile are free where memory is waited for; a tile used again would pay for them again, but
    # a corpus of which a few candidates are read would pay more
    norm = 0
    if normalize:
        norm = 1 if candidates is not None or (q_tiles == chunks == 1 and dim <= tile.block_k) else 2
    with binding.on(q.device):
        q_inv = d_inv = scores
        if norm == 2 or (norm and dim > tile.block_k):
            q_inv = _inverse_norms(q, dtype)
        if norm == 2:
            d_inv = _inverse_norms(d, dtype)
        out = scores
        if cu_q is not None:
            out = scores.new_empty(chunks, n_d)
            # rows behind the last offset are no program's
            argmax.fill_(-1)
        elif chunks > 1:
            out = scores.new_empty(chunks, n_q, n_d)
        programs, types = q_tiles * chunks * n_d, (_compute(dtype), _accumulator(dtype))
        numbers = (
            *_q_strides(q, packing), *_strides(d, packing), *_q_strides(q_mask, packing),
            *_strides(d_mask, packing, True), n_d * l_d if own else 0, n_q, n_d, l_q, l_d, chunks,
            0 if cu_d is None else len(cu_d) - 1,
        )  # fmt: skip
        constants = (
            dim, tile.block_q, tile.block_d, tile.block_k, pack, tile.swap, cu_q is not None, cu_d is not None,
            candidates is not None, q_mask is not None, d_mask is not None, norm, argmax.numel() > 0, _align(q, d),
            _precision(dtype),
        )  # fmt: skip
        winners = argmax if argmax.numel() else scores
        built = _launch(
            forward_kernel, programs,
            (q, d, scores if q_mask is None else q_mask, scores if d_mask is None else d_mask, q_inv, d_inv, out,
             winners, *(winners if x is None else x for x in packing)),
            (*numbers, empty_score), constants, types, tile.num_warps, tile.num_stages,
        )  # fmt: skip
        if cu_q is not None:
            _launch(
                sum_slots_kernel, n_q * _ceil(n_d, 256), (out, cu_q, scores), (n_q, n_d, l_q, chunks),
                (tile.block_q, 256), (_accumulator(dtype),),
            )  # fmt: skip
        elif chunks > 1:
            torch.sum(out, 0, out=scores)
    if built is None or norm == 2 or chunks > 1 or packing is not DENSE or given[0] is not q or given[1] is not d:
        return None
    return Again(built, programs, numbers, constants + types, scores, argmax)


def _owners(cu_q: torch.Tensor, t_q: int) -> torch.Tensor:
    """The query of every token [t_q]; tokens behind the last offset are the last query's, and have won nothing."""
    tokens = torch.arange(t_q, device=cu_q.device)
    return (torch.searchsorted(cu_q, tokens, right=True) - 1).clamp_(0, len(cu_q) - 2)


def backward(g, q, d, argmax, *, normalize, needs_q, needs_d, packing=DENSE):
    """(grad_q, grad_d) in the dtypes and shapes of q and d, or None for a side that needs none.

    grad_d of candidates is not taken here: its owner would have to know every query that names it.
    """
    own, n_q, n_d, l_q, l_d, dim = sizes(q, d, packing)
    cu_q, cu_d, candidates = packing
    dtype = torch.promote_types(q.dtype, d.dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    columns = padded_dim(dim)
    if not g.numel() or not l_d or not l_q:
        return tuple(
            torch.zeros_like(x, memory_format=torch.contiguous_format) if needed else None
            for x, needed in ((q, needs_q), (d, needs_d))
        )
    q, d = _unit_last(q), _unit_last(d)
    align, accumulator = _align(q, d), _accumulator(dtype)
    grad_q = grad_d = None
    with binding.on(q.device):
        q_inv, d_inv = (_inverse_norms(q, dtype), _inverse_norms(d, dtype)) if normalize else (g, g)
        if needs_q:
            # tokens end to end are one long query to a gather
            items = 1 if cu_q is not None else n_q
            block = min(max(1, 4096 // columns), padded_dim(l_q))
            blocks = _ceil(l_q, block)
            splits = _splits(blocks * items, n_d)
            # always wide, so that one build serves every number of splits
            parts = q.new_empty(splits, items, l_q, dim, dtype=acc)
            _launch(
                grad_q_kernel, blocks * items * splits,
                (d, d_inv, argmax, g, parts, argmax if cu_q is None else _owners(cu_q, l_q),
                 *(argmax if x is None else x for x in (cu_d, candidates))),
                (*_strides(d, packing), n_d * l_d if own else 0, *g.stride(), items, n_d, l_q, l_d, splits,
                 0 if cu_d is None else len(cu_d) - 1),
                (dim, block, columns, cu_q is not None, cu_d is not None, candidates is not None, normalize, align),
                (accumulator,),
            )  # fmt: skip
            grad_q = (parts[0] if splits == 1 else parts.sum(0)).view(q.shape)
            if normalize:
                grad_q = _through_norm(q, q_inv, grad_q)
            grad_q = grad_q.to(q.dtype)
        if needs_d:
            # scaled rows would round to half precision before the product, so they take the float32 path; TF32 holds
            # a half-precision row's digits, but where either side is float32 torch's own setting decides
            compute = acc if normalize or acc == torch.float64 else q.dtype
            precision = "tf32" if normalize and dtype.itemsize == 2 else _precision(compute)
            mean = l_q if cu_q is None else _ceil(l_q, n_q)
            tile = backward_tile(dim, mean, compute.itemsize)
            column_blocks = _ceil(dim, tile.block_k)
            project = normalize and column_blocks == 1
            # rows outside every document belong to no program
            empty = torch.empty_like if cu_d is None else torch.zeros_like
            grad_d = empty(
                d, dtype=acc if normalize and not project else d.dtype, memory_format=torch.contiguous_format
            )
            blocks = _ceil(l_d, tile.block_d) if cu_d is None else l_d // tile.block_d + n_d
            documents = 1 if cu_d is not None else n_d * (n_q if own else 1)
            _launch(
                grad_d_kernel, column_blocks * blocks * documents,
                (q, d, q_inv, d_inv, argmax, g, grad_d, *(argmax if x is None else x for x in (cu_q, cu_d))),
                (*_q_strides(q, packing), *_strides(d, packing), *g.stride(), n_q, n_d, l_q, l_d, blocks),
                (dim, tile.block_d, tile.block_r, tile.block_k, cu_q is not None, cu_d is not None, own, normalize,
                 project, align, precision),
                (_compute(compute), accumulator), tile.num_warps, 2,
            )  # fmt: skip
            if normalize and not project:
                grad_d = _through_norm(d, d_inv, grad_d)
    return grad_q, grad_d
