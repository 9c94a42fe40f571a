"""The arguments of every public function → one ``Batch``, and a ``Finish`` for the outputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latemax.arguments import arrays, ragged
from latemax.arguments.check import (
    as_candidates,
    as_mask,
    as_offsets,
    as_query_ids,
    as_weights,
    check_together,
    check_tokens,
)
from latemax.ops.problem import Batch, Side, score_dtype


class Finish(NamedTuple):
    """From the canonical outputs to the caller's: drops the axis of a 2-D side, pads the argmax of ragged queries."""

    one_query: bool = False  # the caller's q had no n_q axis
    one_document: bool = False  # the caller's d had no n_d axis, or these are pairs
    q_offsets: Tensor | None = None  # of ragged queries: their argmax [n_d, t_q] is padded
    longest: int = 0  # to this many tokens
    numbered: bool = False  # rows name ragged queries: their argmax is padded already

    def __call__(
        self, out: tuple[Tensor, Tensor | None], return_argmax: bool
    ) -> Any:  # fmt: skip
        scores, argmax = out
        if self is AS_IT_IS and not return_argmax:
            return scores
        if not return_argmax or argmax is None:
            return self._squeeze(scores)
        if self.q_offsets is not None:
            argmax = ragged.pad_argmax(argmax, self.q_offsets, self.longest)
        elif self.numbered:
            argmax = argmax[..., : self.longest]
        return self._squeeze(scores), self._squeeze(argmax)

    def _squeeze(self, x: Tensor) -> Tensor:
        x = x.squeeze(1) if self.one_document else x
        return x.squeeze(0) if self.one_query else x


AS_IT_IS = Finish()


def batch_of(
    q: Any,
    d: Any,
    q_mask: Any,
    d_mask: Any,
    *,
    pairs: bool = False,
    normalize: bool = False,
    empty_score: float = -math.inf,
    return_argmax: bool = False,
    q_weights: Any = None,
    reduce: str = "sum",
) -> tuple[Batch, Finish]:
    """``maxsim`` and, with ``pairs``, ``maxsim_pairs``: row b of q meets only row b of d."""
    if type(q) is not Tensor or type(d) is not Tensor:
        q, d = arrays.as_tensor("q", q), arrays.as_tensor("d", d)
    queries = documents = candidates = None
    longest = 0
    if ragged.is_ragged(q):
        queries, longest = _ragged_queries(q, q_mask, d, return_argmax)
        q_dims = 3
    else:
        check_tokens("q", q, (3,) if pairs else (2, 3), "[b, l_q, dim]" if pairs else "[l_q, dim] or [n_q, l_q, dim]")
        q_dims = q.dim()
    if ragged.is_ragged(d):
        documents = ragged.as_side("d", d, d_mask, q if queries is None else queries.tokens)
        d_dims = 3
    else:
        shapes = "[b, l_d, dim]" if pairs else "[l_d, dim], [n_d, l_d, dim] or [n_q, k, l_d, dim]"
        check_tokens("d", d, (3,) if pairs else (2, 3, 4), shapes)
        d_dims = d.dim()
    check_together(q if queries is None else queries.tokens, d if documents is None else documents.tokens)
    if queries is None and not q.shape[-2]:
        raise ValueError(f"q must have at least one token (l_q >= 1); got q {list(q.shape)}")
    if pairs or d_dims == 4:
        _check_same_queries(q, d, queries, documents, pairs)
    if queries is None:
        queries = Side(q, None if q_mask is None else as_mask("q_mask", q_mask, "q", q))
        queries = queries if q_dims == 3 else _with_axis(queries, 0)
    if documents is None:
        documents = Side(d, None if d_mask is None else as_mask("d_mask", d_mask, "d", d))
        if pairs or d_dims == 2:
            documents = _with_axis(documents, 1 if pairs else 0)
    elif pairs:
        candidates = torch.arange(documents.items, device=documents.tokens.device).unsqueeze(1)
    if q_weights is not None:
        queries = _weighted(queries, q, q_weights, documents.tokens)
    batch = Batch(queries, documents, candidates, normalize, empty_score, mean=reduce == "mean")
    if q_dims > 2 and d_dims > 2 and not pairs and queries.offsets is None:
        return batch, AS_IT_IS
    return batch, Finish(q_dims == 2, d_dims == 2 or pairs, queries.offsets, longest)


def varlen_batch(
    q: Any, d: Any, cu_seqlens_q: Any, cu_seqlens_d: Any, q_mask: Any, d_mask: Any, *, normalize: bool = False,
    empty_score: float = -math.inf, q_weights: Any = None, reduce: str = "sum",
) -> Batch:  # fmt: skip
    """``maxsim_varlen``: both sides concatenated by the caller."""
    if type(q) is not Tensor or type(d) is not Tensor:
        q, d = arrays.as_tensor("q", q), arrays.as_tensor("d", d)
    check_tokens("q", q, (2,), "[t_q, dim]")
    check_tokens("d", d, (2,), "[t_d, dim]")
    check_together(q, d)
    q_offsets = as_offsets("cu_seqlens_q", cu_seqlens_q, "n_q", "q", q)
    d_offsets = as_offsets("cu_seqlens_d", cu_seqlens_d, "n_d", "d", d)
    queries = Side(q, as_mask("q_mask", q_mask, "q", q), q_offsets)
    documents = Side(d, as_mask("d_mask", d_mask, "d", d), d_offsets)
    if q_weights is not None:
        queries = _weighted(queries, q, q_weights, d)
    return Batch(queries, documents, None, normalize, empty_score, mean=reduce == "mean")


def corpus_batch(
    q: Any, tokens: Tensor, offsets: Tensor, q_mask: Any, *, normalize: bool, empty_score: float, q_weights: Any,
    reduce: str,
) -> tuple[Batch, Finish]:  # fmt: skip
    """q, in any of its forms, against every document of a corpus whose offsets are known to be right."""
    q = arrays.as_tensor("q", q)
    queries, longest = _queries(q, q_mask, tokens, "d", False)
    documents = Side(tokens, None, offsets.to(tokens.device))
    if q_weights is not None:
        queries = _weighted(queries, q, q_weights, tokens)
    return (
        Batch(queries, documents, None, normalize, empty_score, mean=reduce == "mean"),
        Finish(not ragged.is_ragged(q) and q.dim() == 2, False, queries.offsets, longest),
    )


def rerank_batch(
    q: Any, tokens: Any, offsets: Any, candidates: Any, q_mask: Any, *, normalize: bool = False,
    empty_score: float = -math.inf, return_argmax: bool = False, query_ids: Any = None, q_weights: Any = None,
    reduce: str = "sum",
) -> tuple[Batch, Finish]:  # fmt: skip
    """``rerank``: the candidates of every query, where they are in a ragged corpus or a list."""
    q, tokens = arrays.as_tensor("q", q), arrays.as_tensor("tokens", tokens)
    pair = _pair(q)
    documents = None
    if ragged.is_ragged(tokens):
        if offsets is not None:
            raise ValueError("offsets must be None where tokens are a list or a nested tensor")
        documents = ragged.as_side("tokens", tokens, None, q if pair is None else pair[0])
        tokens = documents.tokens
    else:
        check_tokens("tokens", tokens, (2,), "[t_d, dim]")
    padded = return_argmax or query_ids is not None
    if pair is None:
        queries, longest = _queries(q, q_mask, tokens, "tokens", padded)
    else:
        queries, longest = _concatenated_queries(*pair, q_mask, tokens, padded)
    if documents is None:
        documents = Side(tokens, None, as_offsets("offsets", offsets, "n_d", "tokens", tokens))
    one_query = not ragged.is_ragged(q) and q.dim() == 2 and query_ids is None
    shape = "[k]" if one_query else "[n_q, k]" if query_ids is None else "[n, k]"
    candidates = as_candidates(
        "candidates", candidates, (1,) if one_query else (2,), shape, documents.items, tokens
    )  # fmt: skip
    if one_query:
        candidates = candidates.unsqueeze(0)
    if q_weights is not None:
        queries = _weighted(queries, q if pair is None else pair[0], q_weights, tokens)
    mean = reduce == "mean"
    if query_ids is not None:
        query_ids = as_query_ids(query_ids, queries.items, tokens)
        if len(candidates) != len(query_ids):
            raise ValueError(
                f"candidates must be [n, k] with the n of query_ids, {len(query_ids)}; "
                f"got shape {list(candidates.shape)}"
            )
        batch = Batch(queries, documents, candidates, normalize, empty_score, query_ids, max(1, longest), mean)
        return batch, Finish(longest=longest, numbered=queries.offsets is not None)
    if len(candidates) != queries.items:
        raise ValueError(
            f"candidates must be [n_q, k] with the n_q of q, {queries.items}; got shape {list(candidates.shape)}"
        )
    batch = Batch(queries, documents, candidates, normalize, empty_score, mean=mean)
    return batch, Finish(one_query, False, queries.offsets, longest)


def _weighted(queries: Side, q: Any, q_weights: Any, d: Tensor) -> Side:
    """The side of the caller's q with its weights."""
    tokens, dtype = queries.tokens, score_dtype(queries.tokens.dtype, d.dtype)
    if ragged.is_ragged(q):
        weights = ragged.as_weights("q_weights", q_weights, "q", q, tokens, dtype)
    else:
        weights = as_weights("q_weights", q_weights, "q", q, dtype).view(tokens.shape[:-1])
    return queries._replace(weights=weights)


def _pair(q: Any) -> tuple[Any, Any] | None:
    """(tokens [t_q, dim], offsets [n_q + 1]), which no list of two queries looks like."""
    if not (isinstance(q, tuple) and len(q) == 2):
        return None
    tokens, offsets = arrays.as_tensor("q[0]", q[0]), arrays.as_tensor("q[1]", q[1])
    return (tokens, offsets) if isinstance(offsets, Tensor) and offsets.dim() == 1 else None


def _concatenated_queries(tokens: Any, offsets: Any, q_mask: Any, d: Tensor, padded: bool) -> tuple[Side, int]:
    """As ``_queries``. The longest of offsets on a GPU costs a device sync."""
    check_tokens("q[0]", tokens, (2,), "[t_q, dim]")
    check_together(tokens, d, "tokens")
    offsets = as_offsets("q[1]", offsets, "n_q", "q[0]", tokens)
    side = Side(tokens, as_mask("q_mask", q_mask, "q[0]", tokens), offsets)
    return side, int(offsets.diff().max()) if padded and len(offsets) > 1 else 0


def _queries(q: Any, q_mask: Any, d: Tensor, d_name: str, return_argmax: bool) -> tuple[Side, int]:
    """Queries in any form, and the length of the longest where argmax must be padded to it."""
    if ragged.is_ragged(q):
        side, longest = _ragged_queries(q, q_mask, d, return_argmax)
        check_together(side.tokens, d, d_name)
        return side, longest
    check_tokens("q", q, (2, 3), "[l_q, dim] or [n_q, l_q, dim]")
    check_together(q, d, d_name)
    if q.shape[-2] < 1:
        raise ValueError(f"q must have at least one token (l_q >= 1); got q {list(q.shape)}")
    side = Side(q, as_mask("q_mask", q_mask, "q", q))
    return _with_axis(side, 0) if q.dim() == 2 else side, 0


def _ragged_queries(q: Any, q_mask: Any, other: Any, return_argmax: bool) -> tuple[Side, int]:
    return ragged.as_side("q", q, q_mask, other), ragged.longest(q) if return_argmax else 0


def _check_same_queries(q: Any, d: Any, queries: Side | None, documents: Side | None, pairs: bool) -> None:
    n_q = queries.items if queries is not None else len(q) if q.dim() == 3 else None
    n_d = documents.items if documents is not None else len(d)
    if n_q == n_d:
        return
    if pairs:
        raise ValueError(f"pairs need q and d with the same b (first axis or length of a list); got {n_q} and {n_d}")
    came = f"a list of {n_q}" if queries is not None else list(q.shape)
    raise ValueError(
        "own candidates d [n_q, k, l_d, dim] need q [n_q, l_q, dim] with the same n_q; "
        f"got q {came} and d {list(d.shape)}"
    )


def _with_axis(s: Side, axis: int) -> Side:
    return s._replace(tokens=s.tokens.unsqueeze(axis), mask=None if s.mask is None else s.mask.unsqueeze(axis))
