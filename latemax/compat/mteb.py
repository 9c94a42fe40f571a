"""The MaxSim functions of mteb (2.26.24): ``mteb.similarity_functions``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latemax import maxsim, maxsim_pairs
from latemax.compat._inputs import (
    EMPTY_SCORE,
    Items,
    as_items,
    as_tensor,
    check_padding,
    device_of,
    nonzero_rows,
    score_blocks,
    with_zero_rows,
)

__all__ = ["max_sim", "pairwise_max_sim"]

# mteb pads all items of a list together, unless that makes more than this many times the real pairs of tokens; then it
# pads groups of similar length, of at most so many padded tokens.
PADDING_OVERHEAD = 2
GROUP_TOKENS = math.isqrt(100_000_000)


def max_sim(a: Any, b: Any, batch_size: int = 128, *, padding: str = "exact") -> Tensor:
    """``mteb.similarity_functions.max_sim``: every query of ``a`` against every document of ``b``.

    Args:
        a: queries: [n_a, l_a, dim], a list of [l_i, dim], or one [l_a, dim]: tensors, arrays or nested lists.
        b: documents, likewise.
        batch_size: how many queries and documents are moved to the device at once.
        padding: "exact": every row of a list is a token, and the zero rows of a 3-D tensor are padding. "host": as
            mteb, which pads lists with zeros and lets them win.

    Returns:
        scores [n_a, n_b] on the device of ``a``; float32, or float64 if a tensor is. Computed on the device of ``a``,
        or of ``b`` if ``a`` is on the CPU, or on CUDA if both are and there is one. A document without a token
        scores 0.

    Raises:
        ValueError: an unknown ``padding``, or a ``batch_size`` below 1; also as ``latemax.maxsim``.

    Example:
        >>> scores = max_sim(query_embeddings, corpus_embeddings)
    """
    check_padding(padding)
    q, d = _side(a), _side(b)
    home = device_of(q) or torch.device("cpu")
    if len(q) == 0 or len(d) == 0:
        return torch.zeros(len(q), len(d), device=home)
    if padding == "host" and not (isinstance(q, Tensor) and isinstance(d, Tensor)):
        q, d = list(q), _padded_as_host(list(q), list(d))
    masked = padding == "exact" and isinstance(d, Tensor)

    def score(x: Items, y: Items) -> Tensor:
        keep = nonzero_rows(y) if masked and isinstance(y, Tensor) else None
        return maxsim(x, y, d_mask=keep, empty_score=EMPTY_SCORE)

    return score_blocks(q, d, batch_size, _best_device(q, d), score, whole=True).to(home)


def pairwise_max_sim(queries_embeddings: Any, documents_embeddings: Any, *, padding: str = "exact") -> Tensor:
    """``mteb.similarity_functions.pairwise_max_sim``: query i against document i.

    Args:
        queries_embeddings: as ``a`` of ``max_sim``, as many as documents.
        documents_embeddings: as ``b`` of ``max_sim``.
        padding: as in ``max_sim``; mteb pads nothing here.

    Returns:
        scores [n], where ``queries_embeddings`` are.

    Raises:
        ValueError: two lengths, or an unknown ``padding``; also as ``latemax.maxsim_pairs``.
    """
    check_padding(padding)
    if len(queries_embeddings) != len(documents_embeddings):
        raise ValueError(
            "queries and documents must be as many, to score them as pairs; got "
            f"{len(queries_embeddings)} and {len(documents_embeddings)}"
        )
    q, d = _side(queries_embeddings, one=False), _side(documents_embeddings, one=False)
    if len(q) == 0:
        return torch.zeros(0)
    keep = nonzero_rows(d) if padding == "exact" and isinstance(d, Tensor) else None
    return maxsim_pairs(q, d, d_mask=keep, empty_score=EMPTY_SCORE)


def _side(x: Any, *, one: bool = True) -> Items:
    """A 3-D tensor or a list of float tensors [l_i, dim]. Arrays and numbers of float64 become float32, as in mteb."""
    if isinstance(x, (list, tuple)) and len(x) and getattr(x[0], "ndim", None) == 2:
        return as_items([_single(item) for item in x])
    x = _single(x)
    return x[None] if one and x.dim() == 2 else x


def _single(x: Any) -> Tensor:
    tensor = as_tensor(x)
    return tensor if isinstance(x, Tensor) or tensor.dtype != torch.float64 else tensor.to(torch.float32)


def _best_device(q: Items, d: Items) -> torch.device:
    for side in (q, d):
        if side[0].device.type != "cpu":
            return side[0].device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _padded_as_host(q: list[Tensor], d: list[Tensor]) -> list[Tensor]:
    """Documents with a zero row where mteb would have padded them."""
    lengths, q_lengths = [len(item) for item in d], [len(item) for item in q]
    padded = len(q) * max(q_lengths) * len(d) * max(lengths)
    if padded <= PADDING_OVERHEAD * sum(q_lengths) * sum(lengths):
        return with_zero_rows(d)
    documents = list(d)
    for group in _groups(lengths):
        for i, item in zip(group, with_zero_rows([d[i] for i in group]), strict=True):
            documents[i] = item
    return documents


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the documents, shortest first, cut where a group padded to its longest exceeds ``GROUP_TOKENS``."""
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[i] > GROUP_TOKENS:
            groups.append([])
        groups[-1].append(i)
    return groups
