"""The public functions: arguments, shapes and errors. ``latemax.ops`` does the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latemax.arguments import codes
from latemax.arguments.batch import batch_of, corpus_batch, rerank_batch, varlen_batch
from latemax.arguments.check import check_options, check_tau
from latemax.ops import dispatch, operator, smooth
from latemax.ops.dispatch import Choice
from latemax.quantized import QuantizedTokens

__all__ = ["explain", "maxsim", "maxsim_pairs", "maxsim_varlen", "rerank", "smooth_maxsim"]

# an array is a tensor on the CPU
Array = Tensor | np.ndarray
# a dense or jagged tensor, codes, or a list of [l_i, dim]
Tokens = Array | QuantizedTokens | Sequence[Array] | Sequence[QuantizedTokens]
Masks = Array | Sequence[Array | None] | None
Weights = Array | Sequence[Array] | None
# a tensor; with return_argmax (scores, argmax). Not the union of both, which every caller would have to narrow
Scores = Any


def maxsim(
    q: Tokens,
    d: Tokens,
    q_mask: Masks = None,
    d_mask: Masks = None,
    *,
    normalize: bool = False,
    empty_score: float = -math.inf,
    return_argmax: bool = False,
    q_weights: Weights = None,
    reduce: str = "sum",
    backend: str = "auto",
) -> Scores:
    """Late interaction: ``score = Σ_{i valid} w_i max_{j valid} <q_i, d_j>``, with all w_i = 1 by default.

    The formula is ColBERT's (Khattab and Zaharia, SIGIR 2020, eq. 3). The [l_q, l_d] similarities are never written to
    memory. Differentiable once in q, d and q_weights; the gradient of every maximum goes to its recorded argmax.

    Args:
        q: query tokens [l_q, dim] or [n_q, l_q, dim]; or a list of n_q tensors [l_i, dim]; or a jagged nested tensor
            [n_q, l_i, dim]. Nothing is padded. On the CPU, the items of a list are scored in place, but concatenated
            for float64, for a gradient, and where torch compiles, traces or transforms. On a GPU, Triton scores the
            documents of a list in place, and queries are concatenated. A CUDA graph cannot capture lists.
        d: document (image patch) tokens [l_d, dim], [n_d, l_d, dim], or own candidates of every query
            [n_q, k, l_d, dim]; or a list of n_d tensors [l_j, dim]; or a jagged nested tensor. float16, bfloat16,
            float32 or float64, promoted together with q; both on one device. Every tensor on the CPU, also in a list,
            may be a numpy array (bfloat16 by ``ml_dtypes``), whose memory is used as it is; only negative strides and
            strides that are not a multiple of an element's size are copied. Or QuantizedTokens of any of these shapes,
            or a list of them: documents are read as codes, and only q has a gradient. q may then be QuantizedTokens of
            the same kind, which makes the products exact integers.
        q_mask: bool, int or float of shape ``q.shape[:-1]``; nonzero = keep. With a list or a nested tensor: a list of
            [l_i] or None.
        d_mask: likewise, of shape ``d.shape[:-1]``. Masked tokens influence nothing, whatever their values.
        normalize: score unit vectors: every token divided by ``max(‖token‖₂, 1e-12)``, in float32.
        empty_score: the score of a document without a valid token.
        return_argmax: also return the index of the best document token for each query token.
        q_weights: the factors w, float of any sign and of shape ``q.shape[:-1]``; with a list or a nested tensor a list
            of [l_i]. Computed with in the dtype of the scores. Those of masked tokens influence nothing.
        reduce: "sum", or "mean": the sum divided by the number of valid query tokens, whatever their weights.
        backend: "auto", "triton", "cuda", "cpu" or "reference". There is no silent fallback: see ``explain``.

    Returns:
        scores, float32 (float64 if the promoted dtype is): [n_q, n_d], or [n_q, k] for own candidates; the axis of a
        2-D side is dropped. With return_argmax also int32 [..., l_q]: ties go to the lowest index; -1 for masked query
        tokens, for documents without a valid token and after the end of a list's shorter queries. A query without a
        valid token scores 0. Weights and the mean do not apply to ``empty_score``.

    Raises:
        TypeError: q, d, a mask or weights are neither a tensor nor an array, or have an unsupported dtype, byte order
            or layout; an option of another type.
        ValueError: shapes, devices or dims that do not match; an unknown backend or reduction.
        RuntimeError: the backend asked for cannot run here (the message says why).

    Example:
        >>> scores = maxsim(query_tokens, page_tokens, d_mask=page_mask)  # [n_q, n_d]
        >>> best = scores.topk(5).indices
    """
    empty_score = check_options(
        normalize=normalize, empty_score=empty_score, return_argmax=return_argmax, backend=backend, reduce=reduce
    )
    if q_mask is None and d_mask is None and not return_argmax and q_weights is None and reduce == "sum":
        scores = operator.fast_path(q, d, normalize, empty_score, backend)
        if scores is not None:
            return scores
    batch, finish = batch_of(
        q, d, q_mask, d_mask, normalize=normalize, empty_score=empty_score, return_argmax=return_argmax,
        q_weights=q_weights, reduce=reduce,
    )  # fmt: skip
    return finish(operator.maxsim(batch, return_argmax, backend), return_argmax)


def maxsim_pairs(
    q: Tokens,
    d: Tokens,
    q_mask: Masks = None,
    d_mask: Masks = None,
    *,
    normalize: bool = False,
    empty_score: float = -math.inf,
    return_argmax: bool = False,
    q_weights: Weights = None,
    reduce: str = "sum",
    backend: str = "auto",
) -> Scores:
    """Row b of q against row b of d only: the diagonal of ``maxsim``, without the b × b product.

    Args:
        q: [b, l_q, dim], or a list of b tensors [l_i, dim], or a jagged nested tensor.
        d: [b, l_d, dim], or a list of b tensors [l_j, dim], or a jagged nested tensor; or QuantizedTokens.
        q_mask, d_mask, normalize, empty_score, return_argmax, q_weights, reduce, backend: as ``maxsim``.

    Returns:
        scores [b]; with return_argmax also int32 [b, l_q]. Dtypes and errors as ``maxsim``.
    """
    empty_score = check_options(
        normalize=normalize, empty_score=empty_score, return_argmax=return_argmax, backend=backend, reduce=reduce
    )
    batch, finish = batch_of(
        q, d, q_mask, d_mask, pairs=True, normalize=normalize, empty_score=empty_score, return_argmax=return_argmax,
        q_weights=q_weights, reduce=reduce,
    )  # fmt: skip
    return finish(operator.maxsim(batch, return_argmax, backend), return_argmax)


def maxsim_varlen(
    q: Array | QuantizedTokens,
    d: Array | QuantizedTokens,
    cu_seqlens_q: Array,
    cu_seqlens_d: Array,
    q_mask: Array | None = None,
    d_mask: Array | None = None,
    *,
    normalize: bool = False,
    empty_score: float = -math.inf,
    return_argmax: bool = False,
    q_weights: Weights = None,
    reduce: str = "sum",
    backend: str = "auto",
) -> Scores:
    """``maxsim`` of ragged queries and documents, concatenated in FlashAttention's convention.

    Nothing is padded: the cost follows the real tokens. Differentiable once in q, d and q_weights.

    Args:
        q: query tokens [t_q, dim]. Query a holds rows ``cu_seqlens_q[a]`` to ``cu_seqlens_q[a + 1]``.
        d: document tokens [t_d, dim]; document b likewise. QuantizedTokens as in ``maxsim``.
        cu_seqlens_q: int32 or int64 [n_q + 1], starting at 0, never falling, within q. Rows after the last offset
            belong to no query. An empty query scores 0, an empty document ``empty_score``.
        cu_seqlens_d: likewise [n_d + 1].
        q_mask: bool, int or float [t_q]; nonzero = keep. d_mask: [t_d].
        normalize, empty_score, reduce, backend: as ``maxsim``.
        return_argmax: also return the index of the best token in each document for each query token.
        q_weights: float [t_q], as in ``maxsim``.

    Returns:
        scores [n_q, n_d], float32 (float64 if the promoted dtype is). With return_argmax also int32 [t_q, n_d], counted
        from the document's first token; ties go to the lowest index, -1 for masked query tokens and empty documents.

    Raises:
        TypeError, ValueError, RuntimeError: as ``maxsim``; offsets of another dtype or shape; on the CPU also offsets
            that do not start at 0, fall, or leave the tokens. On a GPU reading them would need a device sync: there
            the kernel stays inside the tokens and treats such documents as truncated or empty.

    Example:
        >>> scores = maxsim_varlen(q, d, torch.tensor([0, 12, 40]), torch.tensor([0, 196, 452, 1476]))  # [2, 3]
    """
    empty_score = check_options(
        normalize=normalize, empty_score=empty_score, return_argmax=return_argmax, backend=backend, reduce=reduce
    )
    batch = varlen_batch(
        q, d, cu_seqlens_q, cu_seqlens_d, q_mask, d_mask, normalize=normalize, empty_score=empty_score,
        q_weights=q_weights, reduce=reduce,
    )  # fmt: skip
    scores, argmax = operator.maxsim(batch, return_argmax, backend)
    return (scores, argmax.T) if return_argmax and argmax is not None else scores


def rerank(
    q: Tokens,
    tokens: Tokens,
    offsets: Array | None,
    candidates: Array,
    q_mask: Masks = None,
    *,
    query_ids: Array | None = None,
    normalize: bool = False,
    empty_score: float = -math.inf,
    return_argmax: bool = False,
    q_weights: Weights = None,
    reduce: str = "sum",
    backend: str = "auto",
) -> Scores:
    """Score every query against its own candidates, in place in a ragged corpus: no document is gathered or copied.

    Args:
        q: query tokens [l_q, dim] or [n_q, l_q, dim]; or a list of n_q tensors [l_i, dim]; or a jagged nested tensor;
            or a tuple (tokens [t_q, dim], int32 or int64 offsets [n_q + 1]).
        tokens: the corpus [t_d, dim], documents concatenated; on the CPU it may be memory-mapped. Or, with offsets
            None, a list of n_d tensors [l_j, dim] or a jagged nested tensor. QuantizedTokens as in ``maxsim``.
        offsets: int32 or int64 [n_d + 1]: document b holds rows ``offsets[b]`` to ``offsets[b + 1]``.
        candidates: int32 or int64 [n_q, k] ([k] with a 2-D q): document numbers in any order, repeated or not; -1 is an
            empty slot and scores ``empty_score``.
        q_mask: as ``maxsim``; [t_q] with concatenated queries.
        query_ids: int32 or int64 [n]: row r of candidates, which is [n, k] then, is scored against query
            ``query_ids[r]``. A list of pairs has k = 1. The native CPU kernel reads each query in place; elsewhere, and
            for a gradient, the tokens of the queries are gathered, [n, l_q, dim]. Ragged queries on a GPU cost a device
            sync, but for a list.
        normalize, empty_score, q_weights, reduce, backend: as ``maxsim``; q_weights [t_q] with concatenated queries.
        return_argmax: also return the index of the best token in each document for each query token.

    Returns:
        scores [n_q, k], or [k] with a 2-D q, or [n, k] with query_ids; with return_argmax also int32 [..., l_q],
        counted from the document's first token. Dtypes and -1 as ``maxsim``. Differentiable once in q, tokens
        and q_weights.

    Raises:
        TypeError, ValueError, RuntimeError: as ``maxsim``; offsets or candidates of another dtype or shape; on the CPU
            also unsorted offsets, candidates that are not a document and query_ids that are not a query. On a GPU
            reading them would need a device sync: there an invalid candidate, and a row of an invalid query, score
            NaN.

    Example:
        >>> first = (corpus_means @ q.mean(0)).topk(1000).indices
        >>> scores = rerank(q, tokens, offsets, first)  # [1000]
        >>> pairs = rerank(queries, tokens, offsets, pages.unsqueeze(1), query_ids=asked)  # [n, 1]
    """
    empty_score = check_options(
        normalize=normalize, empty_score=empty_score, return_argmax=return_argmax, backend=backend, reduce=reduce
    )
    batch, finish = rerank_batch(
        q, tokens, offsets, candidates, q_mask, normalize=normalize, empty_score=empty_score,
        return_argmax=return_argmax, query_ids=query_ids, q_weights=q_weights, reduce=reduce,
    )  # fmt: skip
    return finish(operator.maxsim(batch, return_argmax, backend), return_argmax)


def smooth_maxsim(
    q: Tokens,
    d: Tokens,
    q_mask: Masks = None,
    d_mask: Masks = None,
    *,
    tau: float,
    normalize: bool = False,
    empty_score: float = -math.inf,
    backend: str = "auto",
) -> Tensor:
    """``maxsim`` with a smooth maximum: ``score = Σ_{i valid} m_i + tau · log Σ_{j valid} exp((s_ij - m_i) / tau)``.

    s_ij are the similarities and m_i their maxima. Every document token gets a gradient, by its softmax weight. The
    [l_q, l_d] similarities are never written to memory: they are computed in blocks, and again in the backward pass.
    Differentiable once in q and d. Lists are padded, a block at a time.

    Args:
        q, d, q_mask, d_mask, normalize, empty_score: as ``maxsim``, own candidates and lists included.
        tau: temperature, a Python float >= 1e-6. A score approaches that of ``maxsim`` from above as tau falls.
        backend: as ``maxsim``. "cpu" is blocked torch matmul, which "auto" also runs on CUDA where Triton cannot;
            "cuda" has no smooth maximum.

    Returns:
        scores, of the shapes and dtypes of ``maxsim``. A query token with only similarities of -inf makes the score
        -inf, and has no gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as ``maxsim``; a tau of another type, or below 1e-6, or not finite.

    Example:
        >>> loss = torch.nn.functional.cross_entropy(smooth_maxsim(q, d, tau=0.05), torch.arange(len(q)))
    """
    empty_score = check_options(normalize=normalize, empty_score=empty_score, return_argmax=False, backend=backend)
    tau = check_tau(tau)
    codes.refuse("smooth_maxsim", ("q", q), ("d", d))
    batch, finish = batch_of(q, d, q_mask, d_mask, normalize=normalize, empty_score=empty_score)
    return finish((smooth.smooth_maxsim(batch, tau, backend), None), False)


def explain(
    q: Tokens,
    d: Tokens,
    q_mask: Masks = None,
    d_mask: Masks = None,
    *,
    normalize: bool = False,
    return_argmax: bool = False,
    q_weights: Weights = None,
    reduce: str = "sum",
    bounds: bool = False,
    backend: str = "auto",
) -> Choice:
    """Which backend and tile ``maxsim`` would run for these arguments, and why. Runs nothing.

    bounds: of ``maxsim_bounds`` instead, which has no argmax.

    Returns:
        Choice(backend, why, tile, notes, native): tile is None outside the Triton backend; notes say why each other
        backend does not run.

    Raises:
        As ``maxsim``, or as ``maxsim_bounds``; ValueError: bounds with return_argmax.
    """
    check_options(normalize=normalize, empty_score=0.0, return_argmax=return_argmax, backend=backend, reduce=reduce)
    if bounds:
        if return_argmax:
            raise ValueError("bounds have no argmax: return_argmax must be False")
        codes.refuse("maxsim_bounds", ("q", q))
        codes.check_bounded(d)
    batch, _ = batch_of(q, d, q_mask, d_mask, normalize=normalize, q_weights=q_weights, reduce=reduce)
    if bounds:
        return dispatch.explain(batch, backend, argmax=False, bounds="exact")
    train = torch.is_grad_enabled() and operator.needs_gradient(batch)
    return dispatch.explain(batch, backend, argmax=return_argmax or train)


def score_corpus(
    q: Tokens, tokens: Tensor | QuantizedTokens, offsets: Tensor, q_mask: Masks = None, *, normalize: bool = False,
    empty_score: float = -math.inf, q_weights: Weights = None, reduce: str = "sum", backend: str = "auto",
) -> Tensor:  # fmt: skip
    """``maxsim`` of q, in any form, against ragged documents. Their offsets, int64 [n_d + 1], are known to be right."""
    batch, finish = corpus_batch(
        q, tokens, offsets, q_mask, normalize=normalize, empty_score=empty_score, q_weights=q_weights, reduce=reduce
    )
    return finish(operator.maxsim(batch, False, backend), False)
