"""The arguments of every public function → one ``Batch``, and a ``Finish`` for the outputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latemax.arguments import arrays, codes, ragged
from latemax.arguments.check import (
    as_candidates,
    as_mask,
    as_offsets,
    as_query_ids,
    as_weights,
    check_together,
    check_tokens,
)
from latemax.ops.problem import Batch, Codes, Side


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
    queries = documents = candidates = q_codes = d_codes = None
    if type(q) is not Tensor or type(d) is not Tensor:
        (q, q_codes), (d, d_codes) = codes.split("q", q), codes.split("d", d)
    longest = 0
    if ragged.is_ragged(q):
        queries, longest = _ragged_queries(q, q_mask, d, return_argmax, q_codes, d_codes)
        q_dims = 3
    else:
        shapes = "[b, l_q, dim]" if pairs else "[l_q, dim] or [n_q, l_q, dim]"
        check_tokens("q", q, (3,) if pairs else (2, 3), shapes, q_codes)
        q_dims = q.dim()
    if ragged.is_ragged(d):
        d_codes = q_codes.each(lambda x: x.new_empty(0)) if q_codes is not None and not len(d) else d_codes
        documents = ragged.as_side("d", d, d_mask, q if queries is None else queries.tokens, d_codes)
        d_dims = 3
    else:
        shapes = "[b, l_d, dim]" if pairs else "[l_d, dim], [n_d, l_d, dim] or [n_q, k, l_d, dim]"
        check_tokens("d", d, (3,) if pairs else (2, 3, 4), shapes, d_codes)
        d_dims = d.dim()
    both = q if queries is None else queries.tokens, d if documents is None else documents.tokens
    check_together(*both, "d", q_codes, d_codes)
    if queries is None and not q.shape[-2]:
        raise ValueError(f"q must have at least one token (l_q >= 1); got q {list(q.shape)}")
    if pairs or d_dims == 4:
        _check_same_queries(q, d, queries, documents, pairs)
    if queries is None:
        queries = Side(q, None if q_mask is None else as_mask("q_mask", q_mask, "q", q), codes=q_codes)
        queries = queries if q_dims == 3 else _with_axis(queries, 0)
    if documents is None:
        documents = Side(d, None if d_mask is None else as_mask("d_mask", d_mask, "d", d), codes=d_codes)
        if pairs or d_dims == 2:
            documents = _with_axis(documents, 1 if pairs else 0)
    elif pairs:
        candidates = torch.arange(documents.items, device=documents.tokens.device).unsqueeze(1)
    batch = Batch(queries, documents, candidates, normalize, empty_score, mean=reduce == "mean")
    if q_weights is not None:
        batch = _weighted(batch, q, q_weights)
    if q_dims > 2 and d_dims > 2 and not pairs and queries.offsets is None:
        return batch, AS_IT_IS
    return batch, Finish(q_dims == 2, d_dims == 2 or pairs, queries.offsets, longest)


def varlen_batch(
    q: Any, d: Any, cu_seqlens_q: Any, cu_seqlens_d: Any, q_mask: Any, d_mask: Any, *, normalize: bool = False,
    empty_score: float = -math.inf, q_weights: Any = None, reduce: str = "sum",
) -> Batch:  # fmt: skip
    """``maxsim_varlen``: both sides concatenated by the caller."""
    q_codes = d_codes = None
    if type(q) is not Tensor or type(d) is not Tensor:
        (q, q_codes), (d, d_codes) = codes.split("q", q), codes.split("d", d)
    check_tokens("q", q, (2,), "[t_q, dim]", q_codes)
    check_tokens("d", d, (2,), "[t_d, dim]", d_codes)
    check_together(q, d, "d", q_codes, d_codes)
    q_offsets = as_offsets("cu_seqlens_q", cu_seqlens_q, "n_q", "q", q)
    d_offsets = as_offsets("cu_seqlens_d", cu_seqlens_d, "n_d", "d", d)
    queries = Side(q, as_mask("q_mask", q_mask, "q", q), q_offsets, codes=q_codes)
    documents = Side(d, as_mask("d_mask", d_mask, "d", d), d_offsets, codes=d_codes)
    batch = Batch(queries, documents, None, normalize, empty_score, mean=reduce == "mean")
    return batch if q_weights is None else _weighted(batch, q, q_weights)


def corpus_batch(
    q: Any, tokens: Any, offsets: Tensor, q_mask: Any, *, normalize: bool, empty_score: float, q_weights: Any,
    reduce: str,
) -> tuple[Batch, Finish]:  # fmt: skip
    """q, in any of its forms, against every document of a corpus whose offsets are known to be right."""
    (q, q_codes), (tokens, d_codes) = codes.split("q", q), codes.split("d", tokens)
    queries, longest = _queries(q, q_mask, tokens, "d", False, q_codes, d_codes)
    documents = Side(tokens, None, offsets.to(tokens.device), codes=d_codes)
    batch = Batch(queries, documents, None, normalize, empty_score, mean=reduce == "mean")
    if q_weights is not None:
        batch = _weighted(batch, q, q_weights)
    return batch, Finish(not ragged.is_ragged(q) and q.dim() == 2, False, queries.offsets, longest)


def rerank_batch(
    q: Any, tokens: Any, offsets: Any, candidates: Any, q_mask: Any, *, normalize: bool = False,
    empty_score: float = -math.inf, return_argmax: bool = False, query_ids: Any = None, q_weights: Any = None,
    reduce: str = "sum",
) -> tuple[Batch, Finish]:  # fmt: skip
    """``rerank``: the candidates of every query, where they are in a ragged corpus or a list."""
    pair, (tokens, d_codes) = _pair(q), codes.split("tokens", tokens)
    q, q_codes = codes.split("q", q) if pair is None else codes.split("q[0]", pair[0])
    documents = None
    if ragged.is_ragged(tokens):
        if offsets is not None:
            raise ValueError("offsets must be None where tokens are a list or a nested tensor")
        documents = ragged.as_side("tokens", tokens, None, q, d_codes)
        tokens = documents.tokens
    else:
        check_tokens("tokens", tokens, (2,), "[t_d, dim]", d_codes)
    padded = return_argmax or query_ids is not None
    if pair is None:
        queries, longest = _queries(q, q_mask, tokens, "tokens", padded, q_codes, d_codes)
    else:
        queries, longest = _concatenated_queries(q, pair[1], q_mask, tokens, padded, q_codes, d_codes)
    if documents is None:
        documents = Side(tokens, None, as_offsets("offsets", offsets, "n_d", "tokens", tokens), codes=d_codes)
    one_query = pair is None and not ragged.is_ragged(q) and q.dim() == 2 and query_ids is None
    shape = "[k]" if one_query else "[n_q, k]" if query_ids is None else "[n, k]"
    candidates = as_candidates(
        "candidates", candidates, (1,) if one_query else (2,), shape, documents.items, tokens
    )  # fmt: skip
    if one_query:
        candidates = candidates.unsqueeze(0)
    batch = Batch(queries, documents, candidates, normalize, empty_score, mean=reduce == "mean")
    if q_weights is not None:
        batch = _weighted(batch, q, q_weights)
    if query_ids is not None:
        query_ids = as_query_ids(query_ids, queries.items, tokens)
        if len(candidates) != len(query_ids):
            raise ValueError(
                f"candidates must be [n, k] with the n of query_ids, {len(query_ids)}; "
                f"got shape {list(candidates.shape)}"
            )
        batch = batch._replace(query_ids=query_ids, longest=max(1, longest))
        return batch, Finish(longest=longest, numbered=queries.offsets is not None)
    if len(candidates) != queries.items:
        raise ValueError(
            f"candidates must be [n_q, k] with the n_q of q, {queries.items}; got shape {list(candidates.shape)}"
        )
    return batch, Finish(one_query, False, queries.offsets, longest)


def _weighted(b: Batch, q: Any, q_weights: Any) -> Batch:
    """With the weights of the caller's q."""
    tokens, dtype = b.q.tokens, b.score_dtype
    if ragged.is_ragged(q):
        weights = ragged.as_weights("q_weights", q_weights, "q", q, tokens, dtype)
    else:
        weights = as_weights("q_weights", q_weights, "q", q, dtype).view(tokens.shape[:-1])
    return b._replace(q=b.q._replace(weights=weights))


def _pair(q: Any) -> tuple[Any, Any] | None:
    """(tokens [t_q, dim], offsets [n_q + 1]), which no list of two queries looks like."""
    if not (isinstance(q, tuple) and len(q) == 2):
        return None
    offsets = arrays.as_tensor("q[1]", q[1])
    return (q[0], offsets) if isinstance(offsets, Tensor) and offsets.dim() == 1 else None


def _concatenated_queries(
    tokens: Any, offsets: Any, q_mask: Any, d: Tensor, padded: bool, q_codes: Codes | None, d_codes: Codes | None
) -> tuple[Side, int]:
    """As ``_queries``. The longest of offsets on a GPU costs a device sync."""
    check_tokens("q[0]", tokens, (2,), "[t_q, dim]", q_codes)
    check_together(tokens, d, "tokens", q_codes, d_codes)
    offsets = as_offsets("q[1]", offsets, "n_q", "q[0]", tokens)
    side = Side(tokens, as_mask("q_mask", q_mask, "q[0]", tokens), offsets, codes=q_codes)
    return side, int(offsets.diff().max()) if padded and len(offsets) > 1 else 0


def _queries(
    q: Any, q_mask: Any, d: Tensor, d_name: str, return_argmax: bool, q_codes: Codes | None, d_codes: Codes | None
) -> tuple[Side, int]:
    """Queries in any form, and the length of the longest where argmax must be padded to it."""
    if ragged.is_ragged(q):
        side, longest = _ragged_queries(q, q_mask, d, return_argmax, q_codes, d_codes)
        check_together(side.tokens, d, d_name, q_codes, d_codes)
        return side, longest
    check_tokens("q", q, (2, 3), "[l_q, dim] or [n_q, l_q, dim]", q_codes)
    check_together(q, d, d_name, q_codes, d_codes)
    if q.shape[-2] < 1:
        raise ValueError(f"q must have at least one token (l_q >= 1); got q {list(q.shape)}")
    side = Side(q, as_mask("q_mask", q_mask, "q", q), codes=q_codes)
    return _with_axis(side, 0) if q.dim() == 2 else side, 0


def _ragged_queries(
    q: Any, q_mask: Any, other: Any, return_argmax: bool, q_codes: Codes | None, d_codes: Codes | None
) -> tuple[Side, int]:
    if d_codes is not None and isinstance(other, Tensor) and not len(q):
        other = other.new_empty(0, d_codes.dim, dtype=torch.float32)
    return ragged.as_side("q", q, q_mask, other, q_codes), ragged.longest(q) if return_argmax else 0


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
    mask = None if s.mask is None else s.mask.unsqueeze(axis)
    meaning = None if s.codes is None else s.codes.each(lambda x: x.unsqueeze(axis))
    return s._replace(tokens=s.tokens.unsqueeze(axis), mask=mask, codes=meaning)
