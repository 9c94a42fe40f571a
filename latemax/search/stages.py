"""Two stages: candidates from something cheap, exact scores of those only, and what the first stage loses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latemax.api import Weights, rerank
from latemax.arguments import arrays, check
from latemax.ops.problem import score_dtype
from latemax.search import corpus as corpora
from latemax.search.exact import Within, topk
from latemax.search.first import FirstStage
from latemax.search.merge import TopK, best
from latemax.search.spaces import unwrapped

# A first stage: called with q [n_q, l_q, dim], its mask or None, and a number; or an object whose method ``first`` also
# takes ``within``, the documents to choose from.
First = Callable[[Tensor, Tensor | None, int], Tensor | np.ndarray]


def two_stage(
    q: Any,
    corpus: Any,
    k: int,
    first: First,
    q_mask: Tensor | np.ndarray | None = None,
    *,
    n_candidates: int = 1000,
    within: Within = None,
    normalize: bool = False,
    empty_score: float = -math.inf,
    return_argmax: bool = False,
    q_weights: Weights = None,
    reduce: str = "sum",
    backend: str = "auto",
) -> TopK:
    """The k best of the candidates that ``first`` names, by their exact scores.

    Candidates are scored on the corpus's device, a corpus in memory in place; of a store, only their tokens are read.

    Args:
        q: [l_q, dim] or [n_q, l_q, dim], or encoded tokens. corpus: as in `topk`, without a mask.
        k: how many; 1 <= k <= n_candidates.
        first: called as ``first(q [n_q, l_q, dim], q_mask or None, n)``, returns candidates int64 [n_q, n] in any
            order, -1 for none: a `FirstStage` of this corpus (`MeanPool`, `RowPool`, `BinaryScan`, `Muvera`, `Lemur`),
            or any search of yours. A candidate named twice counts once. If an object has a method ``first``, that is
            called, with ``within=`` (int64 indices) if two_stage was given it.
        n_candidates: how many to ask for; at most n_d are asked for.
        within: as in `topk`; candidates of a plain callable that are outside are dropped.
        q_mask, normalize, empty_score, q_weights, reduce, backend: as in `maxsim`; `first` is not given the weights.
        return_argmax: as in `topk`.

    Returns:
        TopK on q's device, in the order of `topk`. Where fewer than k candidates came, index -1 and ``empty_score``
        fill the end; argmax is -1 there.

    Raises:
        TypeError, ValueError: as `topk`; candidates of another shape, dtype or outside the corpus; a first stage of
            another generation of the store.
    """
    empty_score = check.check_options(
        normalize=normalize, empty_score=empty_score, return_argmax=return_argmax, backend=backend, reduce=reduce
    )
    q, q_mask = unwrapped(q, q_mask, corpus)
    q = arrays.as_tensor("q", q)
    check.check_tokens("q", q, (2, 3), "[l_q, dim] or [n_q, l_q, dim]")
    q_mask = check.as_mask("q_mask", q_mask, "q", q)
    found = corpora.of(corpus)
    if q.shape[-1] != found.dim:
        raise ValueError(f"q and corpus must have the same dim; got {q.shape[-1]} and {found.dim}")
    check.check_positive("k", k)
    check.check_positive("n_candidates", n_candidates)
    documents = corpora.chosen(within, found)
    corpora.at_most(k, found, documents)
    scores_in = score_dtype(q.dtype, found.dtype)
    if q_weights is not None:
        q_weights = check.as_weights("q_weights", q_weights, "q", q, scores_in).detach().to(found.device)
    n = min(n_candidates, len(found))
    if k > n:
        raise ValueError(f"k must be at most n_candidates and the number of documents, {n}; got {k}")
    one_query, device = q.dim() == 2, q.device
    if one_query:
        q, q_mask = q.unsqueeze(0), None if q_mask is None else q_mask.unsqueeze(0)
        q_weights = None if q_weights is None else q_weights.unsqueeze(0)
    candidates = _candidates(first, q, q_mask, n, found, documents).to(found.device)
    candidates = F.pad(candidates, (0, max(0, k - candidates.shape[1])), value=-1)
    q, q_mask = q.detach().to(found.device), None if q_mask is None else q_mask.to(found.device)

    # empty slots stay NaN, so that they rank last whatever empty_score is
    scores = torch.full(candidates.shape, math.nan, device=found.device, dtype=scores_in)
    argmax = None
    if return_argmax:
        argmax = torch.full((*candidates.shape, q.shape[1]), -1, device=found.device, dtype=torch.int32)
    options: dict[str, Any] = dict(
        normalize=normalize, empty_score=empty_score, q_weights=q_weights, reduce=reduce, backend=backend
    )
    for tokens, offsets, local in found.pieces(candidates):
        offsets = offsets.to(tokens.device)
        if argmax is None:
            piece = rerank(q, tokens, offsets, local, q_mask, **options)
        else:
            piece, tokens_of = rerank(q, tokens, offsets, local, q_mask, return_argmax=True, **options)
            argmax = torch.where((local >= 0).unsqueeze(-1), tokens_of, argmax)
        scores = torch.where(local >= 0, piece, scores)
    order = best(scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores), k)
    indices = candidates.gather(1, order.indices)
    if argmax is not None:
        argmax = argmax.gather(1, order.indices.unsqueeze(-1).expand(-1, -1, q.shape[1])).to(device)
    result = TopK(order.scores.masked_fill(indices < 0, empty_score).to(device), indices.to(device), argmax)
    return result.row(0) if one_query else result


def _candidates(
    first: First, q: Tensor, q_mask: Tensor | None, n: int, corpus: corpora.Corpus, within: Tensor | None = None
) -> Tensor:
    """What a first stage names, within ``within``: rising, each once, then -1."""
    if isinstance(first, FirstStage):
        first.check(corpus)
    n_d = len(corpus)
    if within is not None and hasattr(first, "first"):
        came = first.first(q, q_mask, min(n, len(within)), within=within)
    else:
        came = first.first(q, q_mask, n) if hasattr(first, "first") else first(q, q_mask, n)
    came = arrays.as_tensor("candidates", came)
    if not isinstance(came, Tensor) or came.dtype not in (torch.int32, torch.int64):
        what = came.dtype if isinstance(came, Tensor) else type(came).__name__
        raise TypeError(f"first must return an int32 or int64 tensor of candidates, got {what}")
    if came.dim() != 2 or len(came) != len(q):
        raise ValueError(f"first must return candidates [n_q, n] with n_q {len(q)}, got shape {list(came.shape)}")
    if came.numel() and (came.min() < -1 or came.max() >= n_d):
        raise ValueError(f"candidates must lie in -1..{n_d - 1}, got {int(came.min())} to {int(came.max())}")
    last = torch.iinfo(torch.int64).max
    rising = came.to(torch.int64)
    rising = rising.masked_fill(rising < 0, last)
    if within is not None:
        rising = rising.masked_fill(~torch.isin(rising, within.to(rising.device)), last)
    rising = rising.sort(dim=1).values
    rising[:, 1:].masked_fill_(rising[:, 1:] == rising[:, :-1], last)
    rising = rising.sort(dim=1).values
    return rising.masked_fill(rising == last, -1)


class Recall(NamedTuple):
    """How much of the exact top k the first stage kept.

    Attributes:
        mean: over the queries.
        per_query: float32 [n_q], the share of each query's exact top k that is among its candidates.
    """

    mean: float
    per_query: Tensor


def first_stage_recall(
    q: Tensor | np.ndarray,
    corpus: Any,
    k: int,
    first: First,
    q_mask: Tensor | np.ndarray | None = None,
    *,
    n_candidates: int = 1000,
    within: Within = None,
    **options: Any,
) -> Recall:
    """The share of the exact top k (by `topk`, over the whole corpus) that is among the first stage's candidates.

    Args:
        q: [n_q, l_q, dim]. corpus, k, first, q_mask, n_candidates, within: as in `two_stage`.
        options: of `topk`.

    Raises:
        TypeError, ValueError: as `topk` and `two_stage`.
    """
    q = arrays.as_tensor("q", q)
    check.check_tokens("q", q, (3,), "[n_q, l_q, dim]")
    exact = topk(q, corpus, k, q_mask, within=within, **options).indices.cpu()
    found = corpora.of(corpus)
    mask, documents = check.as_mask("q_mask", q_mask, "q", q), corpora.chosen(within, found)
    candidates = _candidates(first, q, mask, min(n_candidates, len(found)), found, documents).cpu()
    share = (exact.unsqueeze(-1) == candidates.unsqueeze(1)).any(-1).float().mean(-1)
    return Recall(float(share.mean()), share)
