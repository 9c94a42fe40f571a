"""Lists of tensors and jagged nested tensors → a ``Side`` with offsets: ragged items, without padding.

The items of a list are scored where they are. They are concatenated for a gradient and where torch compiles, traces or
transforms, and so are queries on a GPU.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from latemax.arguments import arrays, check
from latemax.ops import operator
from latemax.ops.backends import native, pointers
from latemax.ops.problem import Codes, Separate, Side

_requires_grad = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def is_ragged(x: Any) -> bool:
    if type(x) is Tensor:  # 0.2 µs less than asking isinstance first
        return x.is_nested
    return isinstance(x, (list, tuple)) or (isinstance(x, Tensor) and x.is_nested)


def as_side(name: str, x: Any, mask: Any, other: Any, codes: Codes | None = None) -> Side:
    """The items of a list stay where they are; those of a jagged nested tensor are contiguous already.

    Args:
        mask: None, or a list with a mask [l_i] or None for each item.
        other: the other side's tokens: their dim, dtype and device if x is an empty list.
        codes: what the items mean if they are codes.
    """
    if isinstance(x, Tensor) and x.layout != torch.jagged:
        raise TypeError(f"{name} must be a dense tensor, a list or a jagged nested tensor, got layout {x.layout}")
    # items with holes between them are those of a list
    nested: Any = x if isinstance(x, Tensor) else None
    contiguous = nested is not None and nested.dim() == 3 and nested._ragged_idx == 1 and nested.lengths() is None
    if contiguous:
        tokens, offsets = x.values(), x.offsets().to(torch.int64)
        check.check_tokens(name, tokens, (2,), "[n, l_i, dim]")
        if mask is None:
            return Side(tokens, None, offsets)
    items: list[Any] = list(x.unbind()) if isinstance(x, Tensor) else list(x)
    known = None
    if mask is None and _eager() and {*map(type, items)} == {np.ndarray}:
        known = native.read_items(items, arrays=True)
    if known is None:
        items = arrays.all_as_tensors(name, items)
        known = native.read_items(items) if not contiguous and _in_place(items) else None
    if known is None:
        items = _checked(name, items, codes)
    if not items:
        if not isinstance(other, Tensor):
            raise ValueError(f"{name} is an empty list, and the other side is no tensor to take dim and dtype from")
        return Side(other.new_empty(0, other.shape[-1]), None, other.new_zeros(1, dtype=torch.int64), codes=codes)
    masks = None if mask is None else _masks(name, mask, items)
    if contiguous:
        return Side(tokens, None if masks is None else torch.cat(masks), offsets)
    first = arrays.as_tensor(name, items[0])
    in_place = known is not None or ((first.is_cpu or first.is_cuda) and _in_place(items))
    if first.is_cuda:
        _refuse_capture(name)
        in_place = in_place and name != "q"
    if not in_place:
        keep = None if masks is None else torch.cat(masks)
        ends = list(itertools.accumulate((item.shape[0] for item in items), initial=0))
        offsets = _sent(torch.tensor(ends, dtype=torch.int64, device="cpu"), first.device)
        return Side(torch.cat(items), keep, offsets, codes=codes)
    if known is None:
        items = [_contiguous_dims(item) for item in items]
        known = pointers.item_table(items)
    table, offsets = known
    if masks is not None:
        masks = [m.contiguous() for m in masks]
        pointers.set_masks(table, masks)
    dim = first.shape[1]
    tokens = first.new_full((dim,), math.nan if codes is None else 0).expand(int(offsets[-1]), dim)
    aligned = False
    if tokens.is_cuda:
        aligned = not bool(((table[:, 0] | table[:, 2] * tokens.element_size()) & 15).any())
        numbers = _sent(torch.cat([table.view(-1), offsets]), tokens.device)
        table, offsets = numbers[: table.numel()].view(-1, 3), numbers[table.numel() :]
    return Side(tokens, None, offsets, Separate(items, masks, table, aligned), codes=codes)


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers on the device. A copy from pinned memory does not wait for it."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not operator.no_mode():
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


def _refuse_capture(name: str) -> None:
    if not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} is a list, which a CUDA graph cannot capture: its lengths are copied from host memory, and a "
            "replay would copy what is there by then. Pass concatenated tokens and offsets (maxsim_varlen, rerank)"
        )


def _in_place(items: list[Any]) -> bool:
    """Whether items on the CPU are scored where they are: eager mode, ordinary tensors, no gradient or tangent."""
    return (
        {*map(type, items)} <= {Tensor, torch.nn.Parameter}
        and _eager()
        and not (torch.is_grad_enabled() and True in map(_requires_grad, items))
    )


def _eager() -> bool:
    return not torch.compiler.is_compiling() and operator.no_mode() and forward_ad._current_level < 0


def _contiguous_dims(x: Tensor) -> Tensor:
    # a lazy negation (a view of a conjugate) is a flag that an address does not carry
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def longest(x: Any) -> int:
    """Tokens of the longest item. A nested tensor on a GPU costs a device sync."""
    if not isinstance(x, (list, tuple)):
        lengths = x.offsets().diff() if x.lengths() is None else x.lengths()
        return int(lengths.max()) if len(lengths) else 0
    return max([item.shape[0] for item in x], default=0)  # len(item) takes 1 µs


def as_weights(name: str, weights: Any, of: str, x: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """A list of weights [l_i] of ragged items x, whose side has these tokens → [t], in the dtype of the scores."""
    items = x.unbind() if isinstance(x, Tensor) else x
    _check_list(name, weights, "weights", len(items))
    pairs = enumerate(zip(weights, items, strict=True))
    found = [check.as_weights(f"{name}[{i}]", w, f"{of}[{i}]", item, dtype) for i, (w, item) in pairs]
    return torch.cat(found) if found else tokens.new_empty(0, dtype=dtype)


def pad_argmax(argmax: Tensor, offsets: Tensor, length: int) -> Tensor:
    """int32 [n_d, t_q] of ragged queries → [n_q, n_d, length], -1 after the end of each query."""
    n_q, t_q = len(offsets) - 1, argmax.shape[1]
    if not t_q:
        return argmax.new_full((n_q, argmax.shape[0], length), -1)
    i = torch.arange(length, device=offsets.device)
    at = offsets[:-1, None] + i  # [n_q, length]
    padded = argmax[:, at.clamp(max=t_q - 1)].masked_fill(i >= offsets.diff().unsqueeze(1), -1)  # [n_d, n_q, length]
    return padded.transpose(0, 1).contiguous()


def _checked(name: str, items: list[Any], codes: Codes | None) -> list[Tensor]:
    for i, item in enumerate(items):
        check.check_tokens(f"{name}[{i}]", item, (2,), "[l_i, dim]", codes)
        for what in ("dtype", "device"):
            if getattr(item, what) != getattr(items[0], what):
                raise ValueError(
                    f"all tensors of {name} must have one {what}; {name}[0] has {getattr(items[0], what)}, "
                    f"{name}[{i}] has {getattr(item, what)}"
                )
        if item.shape[1] != items[0].shape[1]:
            raise ValueError(
                f"all tensors of {name} must have one dim; "
                f"{name}[0] is {list(items[0].shape)}, {name}[{i}] is {list(item.shape)}"
            )
    return items


def _masks(name: str, mask: Any, items: list[Tensor]) -> list[Tensor]:
    """A bool mask for each item; None keeps all its tokens."""
    _check_list(f"{name}_mask", mask, "masks", len(items))
    pairs = enumerate(zip(mask, items, strict=True))
    masks = [check.as_mask(f"{name}_mask[{i}]", m, f"{name}[{i}]", item) for i, (m, item) in pairs]
    keep = items[0].new_ones(longest(items) if any(m is None for m in mask) else 0, dtype=torch.bool)
    return [keep[: item.shape[0]] if m is None else m for m, item in zip(masks, items, strict=True)]


def _check_list(name: str, x: Any, what: str, n: int) -> None:
    if not isinstance(x, (list, tuple)) or len(x) != n:
        came = f"a list of {len(x)}" if isinstance(x, (list, tuple)) else type(x).__name__
        raise ValueError(f"{name} must be a list of {n} {what} for a list of {n}; got {came}")
