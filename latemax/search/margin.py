"""How far a computed score may be from the real number: what `topk` from codes allows for the scoring kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latemax.arguments import ragged

# Norms and sums of norms up to here: no product or sum of the kernels overflows, no square of a norm does.
LARGEST = 2.0**60


class Margin(NamedTuple):
    """``of(largest)`` bounds the rounding of scores of documents whose tokens are at most ``largest`` [n] long.

    A sum of products is off by at most ``operations · unit · ‖q_i‖ · ‖x_j‖`` in whatever order it is summed. ``least``
    covers numbers below 2^-126, which processors may flush to 0.
    """

    relative: Tensor  # float64 [n_q, 1]: of ‖x_j‖, or with normalize of 1
    least: Tensor  # float64 [n_q, 1]: of 1 + ‖x_j‖
    normalize: bool
    usable: bool  # q is finite, and small enough

    def of(self, largest: Tensor) -> Tensor:
        """float64 [n] → [n_q, n]."""
        return self.relative * (1.0 if self.normalize else largest) + self.least * (1 + largest)


def margin_of(
    q: Any, q_mask: Any, q_weights: Any, *, d_dtype: torch.dtype, normalize: bool, reduce: str
) -> Margin:  # fmt: skip
    """The margin of queries that were checked, for documents of ``d_dtype``."""
    parts = [_lengths(*part) for part in _queries(q, q_mask, q_weights)]
    lengths, longest, weight, count = (torch.cat([part[i] for part in parts]).unsqueeze(1) for i in range(4))
    first = q if isinstance(q, Tensor) else q[0]
    dim, l_q = first.shape[-1], ragged.longest(q) if ragged.is_ragged(q) else q.shape[-2]
    unit, once = _units(torch.promote_types(first.dtype, d_dtype), first.device)
    rounding = ((3 if normalize else 1) * dim + 2 * l_q + 64) * unit
    relative = rounding / max(1 - rounding, 0.5) + once
    # tokens of a norm of 1e-12 are multiplied by 1e12 on both sides
    least = (dim + 64) * 2.0 ** (-45 if normalize else -125) * (1 + longest) * weight
    divided = count if reduce == "mean" else torch.ones_like(count)
    usable = rounding < 0.5 and bool((torch.maximum(torch.maximum(lengths, longest), weight) < LARGEST).all())
    return Margin(relative * (weight if normalize else lengths) / divided, least / divided, normalize, usable)


def _units(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Relative error of an operation, and that of a product whose operands are rounded first.

    float32 on a CPU: half an ulp, 2^-24; 2^-23 where sums of bfloat16 pairs round otherwise. Tensor cores align the
    terms of a sum and cut them off: 2^-22 a term. Precision "high" cuts both operands to TF32, "medium" to bfloat16.
    """
    if dtype == torch.float64:
        return 2.0**-52, 0.0
    unit = 2.0**-22 if device.type != "cpu" else 2.0**-23 if dtype == torch.bfloat16 else 2.0**-24
    if dtype != torch.float32:
        return unit, 0.0
    return unit, {"highest": 0.0, "high": 2.0**-8}.get(torch.get_float32_matmul_precision(), 2.0**-5)


def _queries(q: Any, q_mask: Any, q_weights: Any) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    if isinstance(q, Tensor) and not q.is_nested:
        if q.dim() == 3:
            yield q, q_mask, q_weights
        else:
            yield (q[None], *(None if x is None else x[None] for x in (q_mask, q_weights)))
        return
    items = list(q) if isinstance(q, (list, tuple)) else list(q.unbind())
    for i, item in enumerate(items):
        yield (item[None], *(None if x is None or x[i] is None else x[i][None] for x in (q_mask, q_weights)))


def _lengths(q: Tensor, mask: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of queries [n, l, dim], float64 [n] each: Σ|w|·‖q_i‖, the longest ‖q_i‖, Σ|w|, the number of valid tokens."""
    keep = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask != 0
    norms = torch.linalg.vector_norm(q.detach().double(), dim=-1).masked_fill(~keep, 0.0)
    w = torch.ones_like(norms) if weights is None else weights.detach().double().abs()
    w = w.masked_fill(~keep, 0.0)
    up = 1 + 2.0**-20
    longest = norms.amax(-1) if q.shape[1] else norms.sum(-1)
    return (w * norms).sum(-1) * up, longest * up, w.sum(-1) * up, keep.sum(-1).clamp_min(1).double()


def largest_norms(scale: Tensor, error: Tensor, offsets: Tensor, dim: int) -> Tensor:
    """float64 [n]: at least the norm of every token of a document, infinity where one is unknown.

    Args:
        scale, error: float32 [t], of tokens that are 8-bit codes. offsets: int64 [n + 1] on the CPU.
    """
    factor = 127 * math.sqrt(dim) * (1 + 2.0**-20)
    if scale.device.type == "cpu":
        # numpy: torch would start threads for this, which compete with the one that reads
        with np.errstate(over="ignore"):
            reach, ends = scale.numpy() * np.float32(factor) + error.numpy(), offsets.numpy()
        full = ends[1:] > ends[:-1]
        found = np.zeros(len(full))
        if full.any():
            found[full] = np.maximum.reduceat(reach, ends[:-1][full])
        longest = torch.from_numpy(found)
    else:
        lengths = offsets.diff().to(scale.device)
        longest = torch.segment_reduce(scale * factor + error, "max", lengths=lengths, unsafe=True, initial=0.0)
    return longest.double() * (1 + 2.0**-20)
