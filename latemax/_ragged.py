"""Lists of tensors and jagged nested tensors → one padded tensor and its mask."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence

from latemax import _check


def is_ragged(x) -> bool:
    return isinstance(x, (list, tuple)) or (isinstance(x, torch.Tensor) and x.is_nested)


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


def pad(name: str, x, mask, other) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n, longest, dim] and mask [n, longest] of a ragged side; ``other`` tells dim and dtype where n is 0.

    ``mask`` is None or a list of [l_i], one for each item.
    """
    items = _items(name, x)
    if not items:
        if not isinstance(other, torch.Tensor):
            raise ValueError(f"{name} is an empty list and the other side is no tensor that could tell dim and dtype")
        empty = other.new_empty(0, 1, other.shape[-1])
        return empty, torch.ones(0, 1, dtype=torch.bool, device=other.device)
    lengths = [len(item) for item in items]
    if mask is None:
        keeps = [torch.ones(length, dtype=torch.bool, device=items[0].device) for length in lengths]
    else:
        if not isinstance(mask, (list, tuple)) or len(mask) != len(items):
            came = f"a list of {len(mask)}" if isinstance(mask, (list, tuple)) else type(mask).__name__
            raise ValueError(
                f"{name}_mask must be a list of {len(items)} masks beside a list of {len(items)}; got {came}"
            )
        keeps = [
            _check.mask(f"{name}_mask[{i}]", m, f"{name}[{i}]", item)
            if m is not None
            else torch.ones(len(item), dtype=torch.bool, device=item.device)
            for i, (m, item) in enumerate(zip(mask, items, strict=True))
        ]
    tokens, keep = pad_sequence(items, batch_first=True), pad_sequence(keeps, batch_first=True)
    if not tokens.shape[1]:
        tokens, keep = tokens.new_zeros(len(items), 1, tokens.shape[2]), keep.new_zeros(len(items), 1)
    return tokens, keep
