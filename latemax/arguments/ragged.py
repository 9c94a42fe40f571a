"""Lists of tensors and jagged nested tensors → a ``Side`` with offsets: the tokens concatenated, without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latemax.arguments import check
from latemax.ops.problem import Side


def is_ragged(x: Any) -> bool:
    if type(x) is Tensor:  # 0.2 µs less than asking isinstance first
        return x.is_nested
    return isinstance(x, (list, tuple)) or (isinstance(x, Tensor) and x.is_nested)


def as_side(name: str, x: Any, mask: Any, other: Any) -> Side:
    """The items of a list are concatenated; those of a jagged nested tensor are contiguous already.

    Args:
        mask: None, or a list with a mask [l_i] or None for each item.
        other: the other side's tokens: their dim, dtype and device if x is an empty list.
    """
    jagged = isinstance(x, Tensor) and x.layout == torch.jagged
    # items with holes between them are concatenated as those of a list
    contiguous = jagged and x.dim() == 3 and x._ragged_idx == 1 and x.lengths() is None
    if contiguous:
        tokens, offsets = x.values(), x.offsets().to(torch.int64)
        check.check_tokens(name, tokens, (2,), "[n, l_i, dim]")
        if mask is None:
            return Side(tokens, None, offsets)
    items = _items(name, x)
    if not items:
        if not isinstance(other, Tensor):
            raise ValueError(f"{name} is an empty list, and the other side is no tensor to take dim and dtype from")
        return Side(other.new_empty(0, other.shape[-1]), None, other.new_zeros(1, dtype=torch.int64))
    keep = None if mask is None else torch.cat(_masks(name, mask, items))
    if contiguous:
        return Side(tokens, keep, offsets)
    ends = [0]
    for item in items:
        ends.append(ends[-1] + len(item))
    return Side(torch.cat(items), keep, torch.tensor(ends, dtype=torch.int64, device=items[0].device))


def longest(x: Any) -> int:
    """Tokens of the longest item. A nested tensor on a GPU costs a device sync."""
    if not isinstance(x, (list, tuple)):
        lengths = x.offsets().diff() if x.lengths() is None else x.lengths()
        return int(lengths.max()) if len(lengths) else 0
    return max([len(item) for item in x], default=0)


def pad_argmax(argmax: Tensor, offsets: Tensor, length: int) -> Tensor:
    """int32 [n_d, t_q] of ragged queries → [n_q, n_d, length], -1 after the end of each query."""
    n_q, t_q = len(offsets) - 1, argmax.shape[1]
    if not t_q:
        return argmax.new_full((n_q, argmax.shape[0], length), -1)
    i = torch.arange(length, device=offsets.device)
    at = offsets[:-1, None] + i  # [n_q, length]
    padded = argmax[:, at.clamp(max=t_q - 1)].masked_fill(i >= offsets.diff().unsqueeze(1), -1)  # [n_d, n_q, length]
    return padded.transpose(0, 1).contiguous()


def _items(name: str, x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        if x.layout != torch.jagged:
            raise TypeError(f"{name} must be a dense tensor, a list or a jagged nested tensor, got layout {x.layout}")
        x = x.unbind()
        for i, item in enumerate(x):
            check.check_tokens(f"{name}[{i}]", item, (2,), "[l_i, dim]")
        return list(x)
    for i, item in enumerate(x):
        check.check_tokens(f"{name}[{i}]", item, (2,), "[l_i, dim]")
        for what in ("dtype", "device"):
            if getattr(item, what) != getattr(x[0], what):
                raise ValueError(
                    f"all tensors of {name} must have one {what}; {name}[0] has {getattr(x[0], what)}, "
                    f"{name}[{i}] has {getattr(item, what)}"
                )
        if item.shape[1] != x[0].shape[1]:
            raise ValueError(
                f"all tensors of {name} must have one dim; "
                f"{name}[0] is {list(x[0].shape)}, {name}[{i}] is {list(item.shape)}"
            )
    return list(x)


def _masks(name: str, mask: Any, items: list[Tensor]) -> list[Tensor]:
    if not isinstance(mask, (list, tuple)) or len(mask) != len(items):
        came = f"a list of {len(mask)}" if isinstance(mask, (list, tuple)) else type(mask).__name__
        raise ValueError(f"{name}_mask must be a list of {len(items)} masks for a list of {len(items)}; got {came}")
    keeps = []
    for i, (m, item) in enumerate(zip(mask, items, strict=True)):
        keep = check.as_mask(f"{name}_mask[{i}]", m, f"{name}[{i}]", item)
        keeps.append(torch.ones(len(item), dtype=torch.bool, device=item.device) if keep is None else keep)
    return keeps
