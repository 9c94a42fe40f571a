"""Lists of tensors and jagged nested tensors → their tokens end to end and where each begins. Nothing is padded."""

from __future__ import annotations

from typing import NamedTuple

import torch

from latemax import _check


class Flat(NamedTuple):
    tokens: torch.Tensor  # [t, dim]
    mask: torch.Tensor | None  # bool [t]
    cu: torch.Tensor  # int64 [n + 1]


def is_ragged(x) -> bool:
    return isinstance(x, (list, tuple)) or (isinstance(x, torch.Tensor) and x.is_nested)


def flatten(name: str, x, mask, other) -> Flat:
    """``mask`` is None or a list of [l_i], one for each item, None among them; ``other`` tells dim, dtype and device
    where x is an empty list.

    A list is joined (its items lie apart); a jagged nested tensor is taken as it lies.
    """
    whole = isinstance(x, torch.Tensor) and x.layout == torch.jagged
    # with holes between them its items are joined as those of a list
    whole = whole and x.dim() == 3 and x._ragged_idx == 1 and x.lengths() is None
    if whole:
        tokens, cu = x.values(), x.offsets().to(torch.int64)
        _check.tokens(name, tokens, (2,), "[n, l_i, dim]")
        if mask is None:
            return Flat(tokens, None, cu)
    items = _items(name, x)
    if not items:
        if not isinstance(other, torch.Tensor):
            raise ValueError(f"{name} is an empty list and the other side is no tensor that could tell dim and dtype")
        return Flat(other.new_empty(0, other.shape[-1]), None, other.new_zeros(1, dtype=torch.int64))
    keep = None if mask is None else torch.cat(_masks(name, mask, items))
    if whole:
        return Flat(tokens, keep, cu)
    ends = [0]
    for item in items:
        ends.append(ends[-1] + len(item))
    return Flat(torch.cat(items), keep, torch.tensor(ends, dtype=torch.int64, device=items[0].device))


def longest(x) -> int:
    """Tokens of the longest item. Of a nested tensor on a GPU this waits for the device."""
    if isinstance(x, torch.Tensor):
        lengths = x.offsets().diff() if x.lengths() is None else x.lengths()
        return int(lengths.max()) if len(lengths) else 0
    return max([len(item) for item in x], default=0)


def pad_argmax(argmax: torch.Tensor, cu: torch.Tensor, length: int) -> torch.Tensor:
    """int32 [n_c, t_q] of query tokens end to end → [n_q, n_c, length], -1 behind each query."""
    n_q, t_q = len(cu) - 1, argmax.shape[1]
    if not t_q:
        return argmax.new_full((n_q, argmax.shape[0], length), -1)
    i = torch.arange(length, device=cu.device)
    at = cu[:-1, None] + i  # [n_q, length]
    padded = argmax[:, at.clamp(max=t_q - 1)].masked_fill(i >= cu.diff().unsqueeze(1), -1)  # [n_c, n_q, length]
    return padded.transpose(0, 1).contiguous()


def _items(name: str, x) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        if x.layout != torch.jagged:
            raise TypeError(f"{name} must be a dense tensor, a list or a jagged nested tensor, got layout {x.layout}")
        x = x.unbind()
        for i, item in enumerate(x):
            _check.tokens(f"{name}[{i}]", item, (2,), "[l_i, dim]")
        return list(x)
    for i, item in enumerate(x):
        _check.tokens(f"{name}[{i}]", item, (2,), "[l_i, dim]")
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


def _masks(name: str, mask, items: list[torch.Tensor]) -> list[torch.Tensor]:
    if not isinstance(mask, (list, tuple)) or len(mask) != len(items):
        came = f"a list of {len(mask)}" if isinstance(mask, (list, tuple)) else type(mask).__name__
        raise ValueError(f"{name}_mask must be a list of {len(items)} masks beside a list of {len(items)}; got {came}")
    return [
        _check.mask(f"{name}_mask[{i}]", m, f"{name}[{i}]", item)
        if m is not None
        else torch.ones(len(item), dtype=torch.bool, device=item.device)
        for i, (m, item) in enumerate(zip(mask, items, strict=True))
    ]
