"""The MaxSim functions of sentence-transformers (6.2.0): ``util`` and ``multi_vector_encoder.scoring``.

Its padding is exact already, so ``padding="host"`` differs in one case: a mask next to a list, see ``maxsim``.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latemax import maxsim as _maxsim
from latemax import maxsim_pairs as _maxsim_pairs
from latemax.compat._inputs import (
    Items,
    as_items,
    as_tensor,
    check_padding,
    device_of,
    nonzero_rows,
    readable,
    to_device,
    weighted,
)

__all__ = [
    "colbert_kd_scores", "colbert_scores", "colbert_scores_pairwise", "maxsim", "maxsim_pairwise",
    "mean_colbert_kd_scores", "mean_colbert_scores", "mean_colbert_scores_pairwise", "mean_maxsim",
    "mean_maxsim_pairwise",
]  # fmt: skip

# below any real score, and finite after a loss scales and squares it
EMPTY_DOCUMENT_SCORE = -1e9
# elements moved to another device at once, unless chunk_elements says otherwise
CHUNK_ELEMENTS = 100_000_000


def maxsim(
    a: Any,
    b: Any,
    a_mask: Any = None,
    b_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
    device: str | torch.device | None = None,
    *,
    padding: str = "exact",
) -> Tensor:
    """``sentence_transformers.util.maxsim``: every query of ``a`` against every document of ``b``.

    Args:
        a: queries: [n_a, l_a, dim], a list of [l_i, dim], or one [l_a, dim]: tensors, arrays or nested lists of any
            number type. The zero rows of an unmasked 3-D tensor are padding; in a list every row is a token.
        b: documents, likewise.
        a_mask: [n_a, max l_i], [1, max l_i], [l_a] next to one query, or a list of [l_i]; its values multiply the
            maxima.
        b_mask: likewise for ``b``; a token with 0 is excluded from the maximum.
        chunk_elements: how much of the documents is moved to ``device`` at once.
        length_normalize: divide by the number of query tokens: the mask's nonzero values, the length in a list, the
            nonzero rows of a tensor; at least 1.
        device: where to score; None: where the documents are (arrays: where the queries are).
        padding: a mask next to a list spans the padding too. "exact": it cannot unmask padding. "host": as
            sentence-transformers, padding with a nonzero mask is a token of zeros.

    Returns:
        float32 [n_a, n_b] on the documents' device, differentiable. A document without a token scores -1e9, with a
        warning, once.

    Raises:
        TypeError, ValueError: a mask of another type, width or, for queries, sign; also as ``latemax.maxsim``.
    """
    return _score(a, b, a_mask, b_mask, chunk_elements, length_normalize, device, padding, pairs=False)


def maxsim_pairwise(
    a: Any,
    b: Any,
    a_mask: Any = None,
    b_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
    device: str | torch.device | None = None,
    *,
    padding: str = "exact",
) -> Tensor:
    """``sentence_transformers.util.maxsim_pairwise``: query i against document i → float32 [n]. See ``maxsim``."""
    return _score(a, b, a_mask, b_mask, chunk_elements, length_normalize, device, padding, pairs=True)


def mean_maxsim(
    a: Any,
    b: Any,
    a_mask: Any = None,
    b_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = True,
    device: str | torch.device | None = None,
    *,
    padding: str = "exact",
) -> Tensor:
    """``sentence_transformers.util.mean_maxsim``: ``maxsim`` divided by the number of query tokens."""
    return maxsim(a, b, a_mask, b_mask, chunk_elements, length_normalize, device, padding=padding)


def mean_maxsim_pairwise(
    a: Any,
    b: Any,
    a_mask: Any = None,
    b_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = True,
    device: str | torch.device | None = None,
    *,
    padding: str = "exact",
) -> Tensor:
    """``sentence_transformers.util.mean_maxsim_pairwise``: ``maxsim_pairwise`` per query token."""
    return maxsim_pairwise(a, b, a_mask, b_mask, chunk_elements, length_normalize, device, padding=padding)


def colbert_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
    *,
    padding: str = "exact",
) -> Tensor:
    """``scoring.colbert_scores``: every query against every document of every group, for in-batch losses.

    Args:
        queries_embeddings: [n_q, l_q, dim].
        documents_embeddings: groups [g, n, l_d, dim]; documents_mask: [g, n, l_d].
        queries_mask, chunk_elements, length_normalize, padding: as in ``maxsim``.

    Returns:
        float32 [n_q, g · n]; document j of group i is in column ``i · n + j``.
    """
    documents, mask = _groups(documents_embeddings, documents_mask)
    mask = None if mask is None else mask.flatten(0, 1)
    return maxsim(
        as_tensor(queries_embeddings), documents.flatten(0, 1), queries_mask, mask, chunk_elements, length_normalize,
        padding=padding,
    )  # fmt: skip


def colbert_scores_pairwise(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
    *,
    padding: str = "exact",
) -> Tensor:
    """``scoring.colbert_scores_pairwise``: ``maxsim_pairwise`` with the losses' names of its arguments."""
    return maxsim_pairwise(
        queries_embeddings, documents_embeddings, queries_mask, documents_mask, chunk_elements, length_normalize,
        padding=padding,
    )  # fmt: skip


def colbert_kd_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
    *,
    padding: str = "exact",
) -> Tensor:
    """``scoring.colbert_kd_scores``: every query against its own documents [n_q, k, l_d, dim] → float32 [n_q, k].

    ``documents_mask`` is [n_q, k, l_d]; the other arguments are as in ``maxsim``.
    """
    check_padding(padding)
    documents, mask = _groups(documents_embeddings, documents_mask)
    a, a_mask, counts = _queries(queries_embeddings, queries_mask, length_normalize, padding)
    if len(a) != len(documents):
        raise ValueError(f"queries and their own documents must have one length, got {len(a)} and {len(documents)}")
    keep = nonzero_rows(documents) if mask is None else mask != 0
    scores = _maxsim(to_device(a, documents.device), documents, to_device(a_mask, documents.device), keep)
    empty = None if keep is None else ~keep.any(dim=-1)
    return _finish(scores, empty, counts, documents.device)


def mean_colbert_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = True,
    *,
    padding: str = "exact",
) -> Tensor:
    """``scoring.mean_colbert_scores``: ``colbert_scores`` divided by the number of query tokens."""
    return colbert_scores(
        queries_embeddings, documents_embeddings, queries_mask, documents_mask, chunk_elements, length_normalize,
        padding=padding,
    )  # fmt: skip


def mean_colbert_scores_pairwise(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = True,
    *,
    padding: str = "exact",
) -> Tensor:
    """``scoring.mean_colbert_scores_pairwise``: ``colbert_scores_pairwise`` divided by the number of query tokens."""
    return colbert_scores_pairwise(
        queries_embeddings, documents_embeddings, queries_mask, documents_mask, chunk_elements, length_normalize,
        padding=padding,
    )  # fmt: skip


def mean_colbert_kd_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = True,
    *,
    padding: str = "exact",
) -> Tensor:
    """``scoring.mean_colbert_kd_scores``: ``colbert_kd_scores`` divided by the number of query tokens."""
    return colbert_kd_scores(
        queries_embeddings, documents_embeddings, queries_mask, documents_mask, chunk_elements, length_normalize,
        padding=padding,
    )  # fmt: skip


class _Documents(NamedTuple):
    tokens: Items
    keep: Any  # None, a bool mask [.., l], or a list of [l_i]
    empty: Tensor | None  # bool [n]: without a token; None: there are none


def _score(
    a: Any, b: Any, a_mask: Any, b_mask: Any, chunk_elements: int | None, length_normalize: bool,
    device: str | torch.device | None, padding: str, *, pairs: bool,
) -> Tensor:  # fmt: skip
    check_padding(padding)
    a, b = _with_batch_axis(a), _with_batch_axis(b)
    if pairs and len(a) != len(b):
        raise ValueError(
            f"`a` and `b` must hold the same number of items to score as pairs, got {len(a)} and {len(b)}."
        )
    home = device_of(b) or device_of(a)
    if len(a) == 0 or len(b) == 0:
        shape = (0,) if pairs else (len(a), len(b))
        return torch.zeros(*shape, dtype=torch.float32, device=home)
    home = home or torch.device("cpu")
    where = home if device is None else torch.device(device)
    q, q_mask, counts = _queries(a, a_mask, length_normalize, padding)
    documents, mask = _side(b, b_mask, "b_mask", padding)
    q, q_mask = (to_device(x, where) for x in (q, q_mask)) if not pairs else (q, q_mask)
    step = len(documents)
    if device_of(documents) != where:
        longest = max(1, max(len(item) for item in documents) * documents[0].shape[-1])
        step = max(1, (chunk_elements or CHUNK_ELEMENTS) // longest)
    chunks = []
    for start in range(0, len(documents), step):
        rows = slice(start, start + step)
        d = _documents(to_device(documents[rows], where), None if mask is None else mask[rows].to(where))
        if pairs:
            own_mask = None if q_mask is None else to_device(q_mask[rows], where)
            scores = _maxsim_pairs(to_device(q[rows], where), d.tokens, own_mask, d.keep)
        else:
            scores = _maxsim(q, d.tokens, q_mask, d.keep)
        chunks.append(_finish(scores, d.empty, None, home))
    scores = torch.cat(chunks, dim=-1)
    if counts is None:
        return scores
    return scores / (counts if pairs else counts.unsqueeze(1)).to(home, scores.dtype)


def _finish(scores: Tensor, empty: Tensor | None, counts: Tensor | None, home: torch.device) -> Tensor:
    """The document rule wins over the query rule: an empty query scores -1e9 against an empty document."""
    scores = scores.float()
    if empty is not None:
        if readable(empty) and bool(empty.any()):
            _warn_empty_documents()
        scores = scores.masked_fill(empty, EMPTY_DOCUMENT_SCORE)
    scores = scores.to(home)
    return scores if counts is None else scores / counts.unsqueeze(1).to(home, scores.dtype)


@functools.cache
def _warn_empty_documents() -> None:
    logging.getLogger("sentence_transformers.util.similarity").warning(
        "Documents without a token to score: they score about %.0e (before any normalization), below every real "
        "document. A mask excludes all of their tokens, or all of their rows are zero.",
        EMPTY_DOCUMENT_SCORE,
    )


def _queries(a: Any, a_mask: Any, length_normalize: bool, padding: str) -> tuple[Items, Any, Tensor | None]:
    """Tokens, their mask and, to normalize by, how many tokens each query has."""
    q, mask = _side(a, a_mask, "a_mask", padding)
    counts = _token_counts(q, mask) if length_normalize else None
    if isinstance(q, Tensor) and q.shape[1] == 0:
        return list(q), None, counts  # a list may hold queries without a token
    if mask is None:
        return q, None, counts
    if isinstance(q, Tensor):
        return *weighted(q, mask), counts
    both = [weighted(item, row[: len(item)]) for item, row in zip(q, mask, strict=True)]
    return as_items([item for item, _ in both]), [keep for _, keep in both], counts


def _token_counts(q: Items, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return (mask != 0).sum(dim=-1).clamp(min=1)
    if not isinstance(q, Tensor):
        return torch.tensor([max(len(item), 1) for item in q])
    keep = nonzero_rows(q)
    if keep is None:
        return torch.full((len(q),), max(q.shape[1], 1), device=q.device)
    return keep.sum(dim=-1).clamp(min=1)


def _documents(d: Items, mask: Tensor | None) -> _Documents:
    if isinstance(d, Tensor):
        if d.shape[1] == 0:
            return _Documents(d, None, torch.ones(len(d), dtype=torch.bool, device=d.device))
        keep = nonzero_rows(d) if mask is None else mask != 0
        return _Documents(d, keep, None if keep is None else ~keep.any(dim=-1))
    lengths = [item.shape[0] for item in d]  # len(item) takes 1 µs
    if mask is None:
        empty = torch.tensor([n == 0 for n in lengths], device=d[0].device) if 0 in lengths else None
        return _Documents(d, None, empty)
    keep = mask != 0
    inside = torch.arange(mask.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    empty = ~(keep & inside.to(keep.device)).any(dim=-1)
    return _Documents(d, [row[:n] for row, n in zip(keep, lengths, strict=True)], empty)


def _side(x: Any, mask: Any, name: str, padding: str) -> tuple[Items, Tensor | None]:
    """Tokens as a 3-D tensor or a list, and a mask [n, width] in any form that sentence-transformers takes."""
    single = _is_single(x)
    x = _with_batch_axis(x)
    tokens: Items = as_items(x) if isinstance(x, (list, tuple)) else as_tensor(x)
    if mask is None:
        return tokens, None
    if isinstance(mask, (list, tuple)):
        mask = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(m) for m in mask], batch_first=True)
    elif isinstance(mask, np.ndarray):
        mask = torch.as_tensor(mask)
    elif not isinstance(mask, Tensor):
        raise TypeError(
            f"`{name}` must be a tensor, an ndarray, or a list of per-item masks, not {type(mask).__name__}."
        )
    if single and mask.dim() == 1:
        mask = mask.unsqueeze(0)
    width = tokens.shape[1] if isinstance(tokens, Tensor) else max(len(item) for item in tokens)
    if mask.shape[-1] != width:
        raise ValueError(f"`{name}` covers {mask.shape[-1]} tokens, but the padded embeddings have {width}.")
    mask = mask.to(tokens[0].device).expand(len(tokens), -1)
    if padding == "host" and isinstance(tokens, list):
        tokens = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    return tokens, mask


def _is_single(x: Any) -> bool:
    return isinstance(x, (Tensor, np.ndarray)) and x.ndim == 2


def _with_batch_axis(x: Any) -> Any:
    return x[None] if _is_single(x) else x


def _groups(documents: Any, mask: Any) -> tuple[Tensor, Tensor | None]:
    """Documents [g, n, l_d, dim] and a mask expanded to [g, n, l_d]."""
    documents = as_tensor(documents)
    if documents.dim() != 4:
        raise ValueError(f"documents must be [n_q, n, l_d, dim], got shape {list(documents.shape)}")
    if mask is None:
        return documents, None
    mask = torch.as_tensor(mask)
    if mask.shape[-1] != documents.shape[2]:
        raise ValueError(
            f"`b_mask` covers {mask.shape[-1]} tokens, but the padded embeddings have {documents.shape[2]}."
        )
    return documents, mask.to(documents.device).expand(documents.shape[:3])
