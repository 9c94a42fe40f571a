"""Exact top-k over a corpus of any size, in chunks, with the copies of the next chunk under the scoring of this one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latemax._progress import Bar
from latemax.api import maxsim, score_corpus
from latemax.arguments import check, ragged
from latemax.search import corpus as corpora
from latemax.search import stream
from latemax.search.merge import TopK, merge

# Of a chunk's scores, at once: the scores, their keys, the order as int64, a sort's copy of both, and the indices.
SCORE_BYTES = 48


def topk(
    q,
    corpus,
    k: int,
    q_mask=None,
    *,
    d_mask=None,
    normalize: bool = False,
    empty_score: float = -math.inf,
    memory: int = 1 << 30,
    device: torch.device | str | None = None,
    progress: bool = False,
    backend: str = "auto",
) -> TopK:
    """The k documents of a corpus that score highest for every query: exactly what `maxsim` on all of them would rank.

    The corpus is scored in chunks; the k best so far stay on the device. A store is read from the disk, and a corpus in
    host memory is copied to a GPU, while the chunk before is scored. No gradients.

    Order: scores falling; equal scores by rising index; NaN behind everything, −inf too (a document with a NaN token
    must not lead the list). A document without a valid token scores ``empty_score``.

    Args:
        q: query tokens [l_q, dim], [n_q, l_q, dim], a list of n_q tensors [l_i, dim], or a jagged nested tensor.
        corpus: [n_d, l_d, dim]; a list of [l_i, dim]; a jagged nested tensor; (tokens [t_d, dim], offsets [n_d + 1]);
            or a `PatchStore`. On the CPU, or where the scoring runs.
        k: how many, 1 <= k <= n_d, as in torch.topk.
        q_mask: as in `maxsim`. d_mask: [n_d, l_d], beside a dense corpus alone.
        normalize, empty_score, backend: as in `maxsim`.
        memory: bytes that chunks of tokens, their scores and what sorts them may take together, on the host and on the
            device each. Queries, results and corpora that are in memory already are not counted.
        device: where to score; None is where q is. q goes there too.
        progress: a bar on stderr.

    Returns:
        TopK(scores [n_q, k] float32 (float64 if the promoted dtype is), indices [n_q, k] int64), on the device; [k]
        each for q [l_q, dim].

    Raises:
        TypeError, ValueError: as `maxsim`; k out of range; a document that ``memory`` cannot hold, named.

    Example:
        >>> scores, indices = latemax.topk(query_tokens, PatchStore("pages"), 10)
    """
    empty_score = check.check_options(
        normalize=normalize, empty_score=empty_score, return_argmax=False, backend=backend
    )
    check.check_positive("k", k)
    check.check_positive("memory", memory)
    found = corpora.of(corpus, d_mask)
    if k > len(found):
        raise ValueError(f"k must be at most the number of documents, {len(found)}; got {k}")
    q, q_mask = on_device(q, q_mask, device)
    one = q if isinstance(q, Tensor) else q[0]
    one_query = isinstance(q, Tensor) and not q.is_nested and q.dim() == 2
    n_q = 1 if one_query else len(q)
    if found.device.type != "cpu" and found.device != one.device:
        raise ValueError(f"corpus must be on the CPU or where q is scored, {one.device}; got {found.device}")
    if one.shape[-1] != found.dim:
        raise ValueError(f"q and corpus must have the same dim; got {one.shape[-1]} and {found.dim}")

    moves = found.device != one.device
    copied = moves or not found.resident or isinstance(found, corpora.Items)
    row = found.dim * found.dtype.itemsize * (2 if moves or not found.resident else 1) if copied else 0
    merging = 2 * n_q * k * SCORE_BYTES
    if memory <= merging:
        raise ValueError(f"memory must hold the {k} best of {n_q} queries, {merging} bytes; got {memory}")
    runs = corpora.runs(found, memory - merging, row, n_q * SCORE_BYTES)
    options = dict(normalize=normalize, empty_score=empty_score, backend=backend)
    kept, bar = None, Bar(len(found), "searching ") if progress else None
    with torch.no_grad():
        for (a, b), tokens in stream.chunks(found, runs, one.device):
            scores = _score(q, q_mask, found, a, b, tokens, options)
            scores = scores.unsqueeze(0) if one_query else scores
            if kept is None:
                kept = TopK(scores[:, :0], torch.empty(n_q, 0, dtype=torch.int64, device=scores.device))
            kept = merge(kept, scores, a, k)
            if bar is not None:
                bar.tick(b - a)
    return TopK(kept.scores[0], kept.indices[0]) if one_query else kept


def _score(q, q_mask, found: corpora.Corpus, a: int, b: int, tokens: Tensor, options: dict) -> Tensor:
    keep = found.keep(a, b)
    if keep is None:
        return score_corpus(q, tokens, found.offsets[a : b + 1] - found.offsets[a], q_mask, **options)
    return maxsim(q, tokens.view(b - a, -1, found.dim), q_mask, keep.to(tokens.device), **options)


def on_device(q, q_mask, device: torch.device | str | None):
    """q and its mask, checked, where the scoring is to run."""
    if not ragged.is_ragged(q):
        check.check_tokens("q", q, (2, 3), "[l_q, dim] or [n_q, l_q, dim]")
    elif isinstance(q, (list, tuple)):
        if not len(q):
            raise ValueError("q must hold at least one query, got an empty list")
        for i, item in enumerate(q):
            check.check_tokens(f"q[{i}]", item, (2,), "[l_i, dim]")
    if device is None:
        return q, q_mask

    def move(x):
        if isinstance(x, (list, tuple)):
            return [None if item is None else item.to(device) for item in x]
        return x if x is None else x.to(device)

    return move(q), move(q_mask)
