"""What the host modules share: arrays to tensors, masks, devices and the hosts' zero padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latemax import maxsim
from latemax.arguments import arrays
from latemax.arguments.rows import nonzero_rows, readable

Items = Tensor | list[Tensor]
# 512 KB of float32 at dim 128
BLOCK_ROWS = 1024
_F16, _F32 = np.dtype(np.float16), np.dtype(np.float32)
# A document without a token scores 0, as in the hosts that pad with zeros.
EMPTY_SCORE = 0.0


def check_padding(padding: str) -> None:
    if padding not in ("exact", "host"):
        raise ValueError(f"padding must be 'exact' or 'host'; got {padding!r}")


def as_tensor(x: Any) -> Tensor:
    """A tensor, an array, or nested lists of numbers or of equally shaped arrays → a floating-point tensor.

    Arrays are viewed, not copied, unless they have a negative stride. Integers and bools become float32.
    """
    if isinstance(x, np.ndarray):
        x = arrays.as_tensor("tokens", x)
    elif not isinstance(x, Tensor):
        in_list = isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], (Tensor, np.ndarray))
        x = torch.stack([as_tensor(item) for item in x]) if in_list else torch.tensor(x)
    return x if x.is_floating_point() else x.to(torch.float32)


def as_items(x: Any) -> list[Tensor]:
    """Items [l_i, dim] in any form → float tensors of one dtype, the promoted one."""
    items: list[Any] = list(x)
    items = arrays.plain_as_tensors(items) or items
    if {*map(type, items)} != {Tensor} or not all(map(Tensor.is_floating_point, items)):
        items = [as_tensor(item) for item in items]
    dtypes = {item.dtype for item in items}
    if len(dtypes) > 1:
        dtype = items[0].dtype
        for other in dtypes:
            dtype = torch.promote_types(dtype, other)
        items = [item.to(dtype) for item in items]
    return items


def as_scored(x: Any) -> list[Any]:
    """``as_items`` for ``maxsim``, which takes arrays of one float dtype as they are, at a quarter of the cost."""
    items = list(x)
    plain = {*map(type, items)} == {np.ndarray} and {item.dtype for item in items} in ({_F32}, {_F16})
    return items if plain else as_items(items)


def as_float32(items: list[Any]) -> list[Any]:
    """Items of one dtype with float64 tensors replaced: their scores are float64, at a tenth of the speed."""
    wide = bool(items) and isinstance(items[0], Tensor) and items[0].dtype == torch.float64
    return [item.to(torch.float32) for item in items] if wide else items


def weighted(q: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and the bool mask for a mask whose values multiply the maxima.

    ``max(m · s) = m · max(s)`` for ``m >= 0``, so scaling q is exact and differentiable in the mask. On the CPU the
    product is float32; elsewhere it is of q's dtype, since promoting q would copy every document.
    """
    if mask.dtype == torch.bool:
        return q, mask
    keep = mask != 0
    if readable(mask) and not mask.requires_grad:
        if bool((mask < 0).any()):
            raise ValueError("a query mask multiplies the maxima: it must be nonnegative; got a negative value")
        if bool((mask == keep).all()):
            return q, keep
        return q * mask.unsqueeze(-1).to(torch.promote_types(q.dtype, torch.float32)), keep
    return q * mask.unsqueeze(-1).to(q.dtype), keep


def device_of(x: Any) -> torch.device | None:
    """The device of tokens; None for arrays, nested lists and empty lists."""
    if isinstance(x, Tensor):
        return x.device
    return x[0].device if isinstance(x, (list, tuple)) and len(x) and isinstance(x[0], Tensor) else None


def to_device(x: Any, device: torch.device) -> Any:
    if x is None or device_of(x) == device:
        return x
    return x.to(device) if isinstance(x, Tensor) else [item.to(device) for item in x]


def with_zero_rows(items: Sequence[Tensor], longest: int | None = None) -> list[Tensor]:
    """A zero row after every item shorter than the longest: one row scores what a host's whole padding would."""
    longest = max((item.shape[0] for item in items), default=0) if longest is None else longest
    return [item if item.shape[0] >= longest else torch.cat([item, item.new_zeros(1, item.shape[1])]) for item in items]


def score_blocks(
    q: Items, d: Items, batch_size: int, device: torch.device, score: Callable[[Any, Any], Tensor], *, whole: bool
) -> Tensor:
    """``score`` of q against d as a matrix: in one call if all is on the device, else ``batch_size`` items at a time.

    Args:
        whole: one call is right if nothing has to be moved; False where a batch decides the padding.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an int >= 1, got {batch_size!r}")
    if whole and device_of(q) == device_of(d) == device:
        return score(q, d)
    rows = []
    for i in range(0, len(q), batch_size):
        a = to_device(q[i : i + batch_size], device)
        rows.append(
            torch.cat([score(a, to_device(d[j : j + batch_size], device)) for j in range(0, len(d), batch_size)], dim=1)
        )
    return torch.cat(rows)


def retrieval_scores(q: Items, d: Items, batch_size: int, device: torch.device, padding: str) -> Tensor:
    """[n_q, n_d] of the retrieval processors, which pad lists with zeros batch by batch and score the padding.

    ``exact``: every row of a list is a token; zero rows of a dense tensor are its padding. ``host``: zero rows are
    tokens, and a document shorter than the longest of its batch has one.
    """

    def score(a: Items, b: Items) -> Tensor:
        if padding == "host":
            b = b if isinstance(b, Tensor) else with_zero_rows(b)
            return maxsim(a, b, empty_score=EMPTY_SCORE)
        keep = nonzero_rows(b) if isinstance(b, Tensor) else None
        return maxsim(a, b, d_mask=keep, empty_score=EMPTY_SCORE)

    return score_blocks(q, d, batch_size, device, score, whole=padding == "exact" or isinstance(d, Tensor))
