"""``maxsim_bounds``: bounds of the scores of tokens, from their 8-bit codes."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from latemax.api import Masks, Tokens, Weights
from latemax.arguments import codes
from latemax.arguments.batch import Finish, batch_of, corpus_batch
from latemax.arguments.check import check_options
from latemax.ops import bounds
from latemax.ops.problem import Batch
from latemax.quantized import QuantizedTokens

__all__ = ["maxsim_bounds"]


def maxsim_bounds(
    q: Tokens,
    d: Any,
    q_mask: Masks = None,
    d_mask: Masks = None,
    *,
    normalize: bool = False,
    q_weights: Weights = None,
    reduce: str = "sum",
    empty_score: float = -math.inf,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Bounds of ``maxsim`` of the tokens that d was made of, from their codes and errors alone.

    ``lower <= score <= upper`` holds for the score in real numbers, always: every rounding of the bounds' own
    computation is part of them.

    Args:
        q: query tokens as in ``maxsim``; no QuantizedTokens.
        d: QuantizedTokens of kind "int8" [l_d, dim], [n_d, l_d, dim] or [n_q, k, l_d, dim], or a list of [l_j, dim].
        q_mask, d_mask, normalize, q_weights, reduce, empty_score: as ``maxsim``. Weights are first cast to the
            dtype of the scores.
        backend: "auto", "triton", "cpu" or "reference"; the CUDA kernels have no bounds.

    Returns:
        (lower, upper), each of the shape and dtype of the scores. Both are NaN for a query with NaN in a valid token,
        -inf and inf for one with infinity (whose score may be NaN), with a weight that is not finite, or with a number
        beyond 2^850; ``empty_score`` for a document without a valid token, 0 for a query without one. An error of inf
        makes the upper bound inf. No gradient.

    Raises:
        TypeError: d is not QuantizedTokens of kind "int8", or q is; else as ``maxsim``.
        ValueError: as ``maxsim``.
        RuntimeError: a backend that cannot run, or has no bounds.

    Example:
        >>> lower, upper = maxsim_bounds(q, quantize(pages))
        >>> survivors = upper >= lower.topk(10).values[..., -1:]  # no other page is among the best 10
    """
    empty_score = check_options(
        normalize=normalize, empty_score=empty_score, return_argmax=False, backend=backend, reduce=reduce
    )
    codes.refuse("maxsim_bounds", ("q", q))
    codes.check_bounded(d)
    made = batch_of(
        q, d, q_mask, d_mask, normalize=normalize, empty_score=empty_score, q_weights=q_weights, reduce=reduce
    )
    return _finished(*made, backend, False)


def bound_corpus(
    q: Tokens, tokens: QuantizedTokens, offsets: Tensor, q_mask: Masks = None, *, normalize: bool = False,
    empty_score: float = -math.inf, q_weights: Weights = None, reduce: str = "sum", backend: str = "auto",
    coarse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``maxsim_bounds`` against ragged documents. Their offsets, int64 [n_d + 1], are known to be right.

    coarse: q may be rounded to 8 bits, which is faster and loosens the bounds.
    """
    made = corpus_batch(
        q, tokens, offsets, q_mask, normalize=normalize, empty_score=empty_score, q_weights=q_weights, reduce=reduce
    )
    return _finished(*made, backend, coarse)


def _finished(batch: Batch, finish: Finish, backend: str, coarse: bool) -> tuple[Tensor, Tensor]:
    lower, upper = bounds.maxsim_bounds(batch, backend, coarse=coarse)
    return finish((lower, None), False), finish((upper, None), False)
