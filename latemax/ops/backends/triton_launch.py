"""Launches the Triton kernels of ``latemax.kernels``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from latemax.kernels.backward import grad_d_kernel, grad_q_kernel, through_norm_kernel
from latemax.kernels.forward import forward_kernel, inverse_norm_kernel, sum_slots_kernel
from latemax.ops.backends import pointers
from latemax.ops.backends import triton_operands as operands
from latemax.ops.backends.base import pairs_by_document
from latemax.ops.problem import Batch, Gradients, Needs, Outputs, Side
from latemax.ops.tiles import NO_NORM, NORM_BEFORE, NORM_IN_TILE, Launch, backward_tile, padded_dim
from latemax.quantized import rounded_up

# programs below which a GPU of 132 multiprocessors idles: then a loop over documents is split further
ENOUGH_PROGRAMS = 4 * 132


# (kernel, device, constants, options, pointer types) → the compiled kernel
_built: dict = {}


def _launch(
    kernel: Any, programs: int, pointers: tuple, numbers: tuple, constants: tuple, types: tuple,
    warps: int = 4, stages: int = 3, registers: int | None = None,
) -> Any:  # fmt: skip
    """``kernel[(programs,)](*pointers, *numbers, *constants, *types)`` without triton's binder once a build is known:
    3 µs instead of 40 (benchmarks, suite ``host``).

    The key holds what decides the build: the constants, each pointer's dtype and 16-byte alignment. It leaves out the
    numbers, which are not specialised (beyond int32 triton launches them itself and picks another type), and the types
    of products and sums, which follow from the pointers and the constants and are slow to hash.

    Returns the build if it may be launched again, else None.
    """
    narrow = max(numbers) < 1 << 31
    key = (
        kernel, pointers[0].device, constants, warps, stages, registers,
        *[(x.dtype, x.data_ptr() % 16 == 0) for x in pointers],
    )  # fmt: skip
    built = _built.get(key) if narrow else None
    if built is not None:
        built[(programs, 1, 1)](*pointers, *numbers, *constants, *types)
        return built
    built = kernel[(programs,)](
        *pointers, *numbers, *constants, *types, num_warps=warps, num_stages=stages, maxnreg=registers
    )
    # the interpreter builds nothing
    if built is None or not narrow:
        return None
    _built[key] = built
    return built


def _hooked() -> bool:
    """Whether a profiler or the like has hooked launches (triton 3.4: one hook; later: a chain)."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _form(x: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, x.device


class PreparedLaunch:
    """A forward that was one launch, prepared for other tensors of the same shapes, strides, dtypes, 16-byte alignment
    and device. Skipping the rest of a call saves two thirds of its host time (benchmarks, suite ``host``)."""

    __slots__ = ("argmax", "built", "constants", "function", "grid", "index", "metadata", "numbers", "run", "scores")

    def __init__(self, built: Any, programs: int, numbers: tuple, constants: tuple, out: Outputs) -> None:
        self.built, self.numbers, self.constants, self.grid = built, numbers, constants, (programs, 1, 1)
        self.run, self.function, self.metadata = built.run, built.function, built.packed_metadata
        self.index = out.scores.device.index if out.scores.is_cuda else None
        # (shape, strides, dtype, device) of the outputs: torch.empty_strided is the fastest allocation
        self.scores = _form(out.scores)
        self.argmax = None if out.argmax is None else _form(out.argmax)

    def __call__(self, b: Batch) -> tuple[Tensor, Tensor | None] | None:
        """(scores, argmax or None); None if another device is current."""
        if self.index is not None and self.index != torch.cuda.current_device():
            return None
        q, d, q_mask, d_mask, empty_score = b.q.tokens, b.d.tokens, b.q.mask, b.d.mask, b.empty_score
        weights, q_codes, d_codes = b.q.weights, b.q.codes, b.d.codes
        shape, strides, dtype, device = self.scores
        scores = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        argmax = None
        if self.argmax is not None:
            shape, strides, dtype, _ = self.argmax
            argmax = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        pointers = (
            q, d, scores if q_mask is None else q_mask, scores if d_mask is None else d_mask,
            scores if q_codes is None else q_codes.scale, scores if d_codes is None else d_codes.scale, scores,
            *[scores if argmax is None else argmax] * 5, scores if weights is None else weights, scores,
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


def _dense_dims(s: Side) -> Side:
    """The same tokens with contiguous dims."""
    x = s.tokens
    # a lazy negation (a view of a conjugate) is a flag that a pointer does not carry
    x = x.resolve_neg() if x.is_neg() else x
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return s if x is s.tokens else s._replace(tokens=x)


def _strides(b: Batch) -> tuple[int, ...]:
    """Element strides of q (n_q, token), of d (n_q, n_d, token), and likewise of q_mask and d_mask.

    An axis or a mask that is not there has 0, and so has the query axis of documents that all queries share.
    """
    return (
        *_leading_strides(b.q.tokens, 2, 1), *_leading_strides(b.d.tokens, 3, 1),
        *_leading_strides(b.q.mask, 2, 0), *_leading_strides(b.d.mask, 3, 0),
    )  # fmt: skip


def _leading_strides(x: Tensor | None, axes: int, inner: int) -> tuple[int, ...]:
    """Strides of x without its last ``inner`` axes, right-aligned in ``axes`` after zeros."""
    if x is None:
        return (0,) * axes
    strides = x.stride()[: x.dim() - inner]
    return (0,) * (axes - len(strides)) + strides


def _four(x: Tensor) -> Tensor:
    """Tokens as [n, k, l, dim]."""
    return x if x.dim() == 4 else x.unsqueeze(1) if x.dim() == 3 else x[None, None]


def _inverse_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[l, dim], [n, l, dim] or [n, k, l, dim] → flat 1 / max(‖token‖, 1e-12) in the accumulation dtype."""
    out = x.new_empty(x[..., 0].numel(), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if out.numel():
        x4 = _four(x)
        columns = min(padded_dim(x.shape[-1]), 1024)
        block = max(1, 4096 // columns)
        _launch(
            inverse_norm_kernel, _ceil(out.numel(), block), (x4, out),
            (*x4.stride()[:3], x4.shape[1], x4.shape[2], out.numel()),
            (x.shape[-1], block, columns, operands.align(x4)), (operands.accumulator(dtype),),
        )  # fmt: skip
    return out


def _through_norm(x: Tensor, inv: Tensor, g: Tensor) -> Tensor:
    """Gradient of the tokens x given that of their unit vectors; in the dtype of x."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x4 = _four(x)
    columns = padded_dim(x.shape[-1])
    block = max(1, 4096 // columns)
    _launch(
        through_norm_kernel, _ceil(inv.numel(), block), (x4, inv, g, out),
        (*x4.stride()[:3], x4.shape[1], x4.shape[2], inv.numel()), (x.shape[-1], block, columns),
        (operands.accumulator(g.dtype),),
    )  # fmt: skip
    return out


def _splits(programs: int, most: int) -> int:
    """Into how many parts a program's loop is cut so that the GPU is filled."""
    return max(1, min(most, ENOUGH_PROGRAMS // max(1, programs)))


def _add(parts: Tensor, b: Batch, block_q: int, out: Tensor) -> Tensor:
    """Sums of the parts of each query, in their order, in the dtype of ``out`` [n_q, n_d], which is filled."""
    q_offsets = b.q.offsets
    if q_offsets is None:
        return torch.sum(parts, 0, dtype=out.dtype, out=out)
    n_q, n_d = out.shape
    _launch(
        sum_slots_kernel, n_q * _ceil(n_d, 256), (parts, q_offsets, out), (n_q, n_d, b.q.length, len(parts)),
        (block_q, 256), (operands.accumulator(out.dtype),),
    )  # fmt: skip
    return out


def forward(b: Batch, launch: Launch, out: Outputs, reach: Tensor | None = None) -> PreparedLaunch | None:
    """Fills ``out``. Returns the prepared launch of a dense batch that takes one launch and nothing else.

    ``reach``: of bounds (triton_bounds), of which out is then (lower, upper), and weights are float64.
    """
    (scores, argmax), (tile, pack, norm) = out, launch
    n_q, n_d, l_q, l_d, dim, own = b.q.items, b.n_d, b.q.length, b.d.length, b.dim, b.own
    q_offsets, d_offsets, candidates, separate = b.q.offsets, b.d.offsets, b.candidates, b.d.separate
    if not scores.numel():
        return None
    given = b
    b = b._replace(q=_dense_dims(b.q), d=_dense_dims(b.d))
    q, d, dtype, d_mask, codes = b.q.tokens, b.d.tokens, b.dtype, b.d.mask, b.d.codes
    align, d_align = operands.align(q), 1 if separate is not None else operands.align(d)
    if separate is not None:
        # norms before would be numbered by token
        norm = min(norm, NORM_IN_TILE)
        d_mask = None if separate.masks is None else torch.empty_like(scores, dtype=torch.bool)
        d_align = operands.align(d.new_empty(1)) if separate.aligned else 1
    if codes is None:
        align = d_align = min(align, d_align)
    q_tiles, chunks = _ceil(n_q, pack), _ceil(l_q, tile.block_q)
    if q_offsets is not None:
        q_tiles, chunks = 1, l_q // tile.block_q + n_q
    with pointers.on(q.device):
        q_inv = d_inv = d_error = scores
        if codes is not None:
            d_inv = codes.scale
        if reach is not None:
            assert codes is not None and codes.error is not None
            q_inv, d_error = reach, codes.error
        elif b.q.codes is not None:
            q_inv = operands.code_factors(b.q, b.normalize)
        elif norm == NORM_BEFORE or (norm != NO_NORM and dim > tile.block_k):
            q_inv = _inverse_norms(q, dtype)
        if norm == NORM_BEFORE:
            d_inv = _inverse_norms(d, dtype)
        # a tensor that is not there is replaced by one that is: pointers of one build have one dtype and alignment
        sums, second = scores, scores if argmax is None else argmax
        if q_offsets is not None or chunks > 1:
            sums = scores.new_empty((chunks, n_d) if q_offsets is not None else (chunks, n_q, n_d))
            if reach is not None:
                second = torch.empty_like(sums)
            elif argmax is not None and q_offsets is not None:
                # no program owns the rows after the last offset
                argmax.fill_(-1)
        programs, types = q_tiles * chunks * n_d, (operands.of_products(b), operands.accumulator(dtype))
        numbers = (
            *_strides(b), n_d * l_d if own else 0, n_q, n_d, l_q, l_d, chunks, 0 if d_offsets is None else b.d.items,
        )  # fmt: skip
        constants = (
            dim, tile.block_q, tile.block_d, tile.block_k, pack, tile.swap, q_offsets is not None,
            d_offsets is not None, separate is not None, candidates is not None, b.q.mask is not None,
            d_mask is not None, tile.peel, norm, argmax is not None and reach is None, b.q.weights is not None, b.mean,
            align, operands.precision(dtype), d_align, operands.CODES["" if codes is None else codes.kind],
            b.q.codes is not None, operands.split(b), reach is not None,
        )  # fmt: skip
        table = None if separate is None else separate.table
        built = _launch(
            forward_kernel, programs,
            (q, d, scores if b.q.mask is None else b.q.mask, scores if d_mask is None else d_mask, q_inv, d_inv,
             sums, second, *(second if x is None else x for x in (q_offsets, d_offsets, candidates, table)),
             scores if b.q.weights is None else b.q.weights, d_error),
            (*numbers, b.empty_score), constants, types, tile.num_warps, tile.num_stages,
        )  # fmt: skip
        if sums is not scores:
            if reach is None:
                _add(sums, b, tile.block_q, scores)
            else:
                assert argmax is not None
                for parts, bound, sign in ((sums, scores, -1), (second, argmax, 1)):
                    # a part is outside by more than sums of float64 are off
                    total = _add(parts, b, tile.block_q, torch.empty_like(bound, dtype=torch.float64))
                    bound.copy_(rounded_up(total.mul_(sign))).mul_(sign)
    copied = q is not given.q.tokens or d is not given.d.tokens
    before = norm == NORM_BEFORE or (norm != NO_NORM and (b.q.codes is not None or dim > tile.block_k))
    if built is None or before or chunks > 1 or b.ragged or copied or reach is not None:
        return None
    return PreparedLaunch(built, programs, numbers, constants + types, out)


def backward(b: Batch, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
    if not g.numel() or not b.d.length or not b.q.length or not b.d.items:
        wanted = zip((b.q.tokens, b.d.tokens, b.q.weights), needs, strict=True)
        return Gradients(
            *(
                None if x is None or not needed else torch.zeros_like(x, memory_format=torch.contiguous_format)
                for x, needed in wanted
            )
        )
    b = b._replace(q=_dense_dims(b.q), d=_dense_dims(b.d))
    q, d, dtype = b.q.tokens, b.d.tokens, b.dtype
    grad_q = grad_d = grad_weights = None
    with pointers.on(q.device):
        q_inv, d_inv = (_inverse_norms(q, dtype), _inverse_norms(d, dtype)) if b.normalize else (g, g)
        if needs.q or needs.weights:
            grad_q, grad_weights = _grad_q(b, argmax, g, q_inv, d_inv, needs)
        if needs.d:
            grad_d = _grad_d(b, argmax, g, q_inv, d_inv)
    return Gradients(grad_q, grad_d, grad_weights)


def _grad_q(
    b: Batch, argmax: Tensor, g: Tensor, q_inv: Tensor, d_inv: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of q and of the weights, which both come from the sums of document tokens."""
    q, d, dtype, acc = b.q.tokens, b.d.tokens, b.dtype, b.score_dtype
    n_d, l_q, l_d, dim, q_offsets, d_offsets = b.n_d, b.q.length, b.d.length, b.dim, b.q.offsets, b.d.offsets
    columns = padded_dim(dim)
    # to a gather, ragged queries are one long query
    items = 1 if q_offsets is not None else b.q.items
    # 8 KB of rows a document, three documents in flight: 25 KB of shared memory a program. With 32 KB of them, float64
    # took 98 KB and 200 registers instead of 80.
    block = min(max(1, 8192 // (columns * d.element_size())), padded_dim(l_q))
    blocks = _ceil(l_q, block)
    splits = _splits(blocks * items, n_d)
    # always in the accumulation dtype, so that one build serves every number of splits
    parts = q.new_empty(splits, items, l_q, dim, dtype=acc)
    _launch(
        grad_q_kernel, blocks * items * splits,
        (d, d_inv, argmax, g, parts, argmax if q_offsets is None else _owners(q_offsets, l_q),
         *(argmax if x is None else x for x in (d_offsets, b.candidates))),
        (*_strides(b)[2:5], n_d * l_d if b.own else 0, *g.stride(), items, n_d, l_q, l_d, splits,
         0 if d_offsets is None else b.d.items),
        (dim, block, columns, q_offsets is not None, d_offsets is not None, b.candidates is not None, b.normalize,
         operands.align(q, d)),
        # With 128 registers four programs share a multiprocessor, and no more are launched. Without a limit ptxas took
        # 72 in some builds, so that seven fit, and spilled.
        (operands.accumulator(dtype),), registers=128,
    )  # fmt: skip
    grad = (parts[0] if splits == 1 else parts.sum(0)).view(q.shape)
    weights, grad_weights = b.q.weights, None
    if weights is not None:
        if needs.weights:
            grad_weights = (q * grad).sum(-1)
            if b.normalize:
                grad_weights *= q_inv.view_as(grad_weights)
        grad *= weights.unsqueeze(-1)
    if not needs.q:
        return None, grad_weights
    if b.normalize:
        grad = _through_norm(q, q_inv, grad)
    return grad.to(q.dtype), grad_weights


def _grad_d(b: Batch, argmax: Tensor, g: Tensor, q_inv: Tensor, d_inv: Tensor) -> Tensor:
    q, d, dtype, acc, normalize = b.q.tokens, b.d.tokens, b.dtype, b.score_dtype, b.normalize
    n_q, n_d, l_q, l_d, dim = b.q.items, b.n_d, b.q.length, b.d.length, b.dim
    q_offsets, d_offsets, weights = b.q.offsets, b.d.offsets, b.q.weights
    # what the rows of q are multiplied by
    scaled, factors = normalize or weights is not None, q_inv
    if weights is not None:
        factors = weights * q_inv.view_as(weights) if normalize else weights
    # scaled rows would round to half precision before the product, so they take the float32 path; TF32 holds a
    # half-precision row's digits, but where either side is float32 torch's own setting decides
    compute = acc if scaled or acc == torch.float64 else q.dtype
    precision = "tf32" if scaled and dtype.itemsize == 2 else operands.precision(compute)
    mean = l_q if q_offsets is None else _ceil(l_q, n_q)
    tile = backward_tile(dim, mean, compute.itemsize)
    column_blocks = _ceil(dim, tile.block_k)
    project = normalize and column_blocks == 1
    # rows outside every document belong to no program
    empty = torch.empty_like if d_offsets is None else torch.zeros_like
    grad = empty(d, dtype=acc if normalize and not project else d.dtype, memory_format=torch.contiguous_format)
    blocks = _ceil(l_d, tile.block_d) if d_offsets is None else l_d // tile.block_d + b.d.items
    documents = 1 if d_offsets is not None else n_d * (n_q if b.own else 1)
    pairs = starts = None
    if b.candidates is not None:
        # several queries may name a document: its program takes them in the order of their pairs
        pairs, starts = pairs_by_document(b.candidates, b.d.items)
        pairs = torch.stack((pairs // n_d, pairs % n_d), 1)
    _launch(
        grad_d_kernel, column_blocks * blocks * documents,
        (q, d, factors, d_inv, argmax, g, grad,
         *(argmax if x is None else x for x in (q_offsets, d_offsets, pairs, starts))),
        (*_strides(b)[:5], *g.stride(), n_q, n_d, l_q, l_d, blocks, b.d.items),
        (dim, tile.block_d, tile.block_r, tile.block_k, q_offsets is not None, d_offsets is not None,
         pairs is not None, b.own, scaled, project, operands.align(q, d), precision),
        (operands.compute(compute), operands.accumulator(dtype)), tile.num_warps, tile.num_stages,
    )  # fmt: skip
    return _through_norm(d, d_inv, grad) if normalize and not project else grad


def _owners(q_offsets: Tensor, t_q: int) -> Tensor:
    """The query of every token [t_q]. Tokens after the last offset count as the last query's: their argmax is -1."""
    tokens = torch.arange(t_q, device=q_offsets.device)
    return (torch.searchsorted(q_offsets, tokens, right=True) - 1).clamp_(0, len(q_offsets) - 2)
