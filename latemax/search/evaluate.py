"""What a compressed or approximate search keeps of the exact ranking, and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latemax.search import corpus as corpora
from latemax.search.binary import BinaryScan, encoded
from latemax.search.exact import topk
from latemax.search.first import FirstStage
from latemax.search.lemur import Lemur
from latemax.search.muvera import Muvera
from latemax.search.pooled import MeanPool, RowPool
from latemax.search.stages import two_stage

STAGES: dict[str, tuple[str, type[FirstStage]]] = {
    "binary": ("one bit", BinaryScan),
    "mean": ("mean pool", MeanPool),
    "row": ("row pool", RowPool),
    "muvera": ("Muvera", Muvera),
    "lemur": ("Lemur", Lemur),
}


class Quality(NamedTuple):
    """One way to search, measured.

    Attributes:
        method: its name.
        overlap: share of the exact k best that are among its k best, the mean of all queries.
        ndcg: nDCG at k, where the exact ranking says what is relevant: its first document gains k, its last one 1.
        bytes: of a document, in what is kept to be searched.
        ms: milliseconds per query.
        indices: int64 [n_q, k], its ranking.
    """

    method: str
    overlap: float
    ndcg: float
    bytes: float
    ms: float
    indices: Tensor


def overlap(found: Tensor, exact: Tensor) -> Tensor:
    """The share of every row of exact int64 [n_q, k] that found int64 [n_q, n] holds: float32 [n_q]."""
    return (exact.unsqueeze(-1) == found.unsqueeze(1)).any(-1).float().mean(-1)


def ndcg(found: Tensor, gains: Sequence[Mapping[int, float]], k: int) -> Tensor:
    """nDCG at k of rankings int64 [n_q, n]: float64 [n_q]; NaN for a query without a gain above 0.

    Args:
        found: documents, best first; -1 gains nothing.
        gains: of every query, document → gain; others gain 0. Discounts are 1 / log2(rank + 1).
    """
    values = []
    for row, of in zip(found.tolist(), gains, strict=True):
        best = sorted((gain for gain in of.values() if gain > 0), reverse=True)
        ideal = _discounted(best[:k])
        values.append(_discounted([of.get(i, 0.0) for i in row[:k]]) / ideal if ideal else math.nan)
    return torch.tensor(values, dtype=torch.float64)


def _discounted(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))


def exact_gains(exact: Tensor) -> list[dict[int, float]]:
    """The gains of an exact ranking int64 [n_q, k]: k for its first document, 1 for its last."""
    k = exact.shape[1]
    return [{i: float(k - rank) for rank, i in enumerate(row)} for row in exact.tolist()]


def retention(
    q: Tensor,
    corpus: Any,
    k: int,
    q_mask: Tensor | None = None,
    *,
    n_candidates: int = 50,
    stages: Sequence[str] = ("binary", "mean"),
    normalize: bool = False,
    memory: int = 1 << 30,
    progress: bool = False,
) -> list[Quality]:
    """Compares 8-bit codes and first stages, each alone and with its candidates rescored, with the exact ranking.

    Args:
        q: [n_q, l_q, dim]. q_mask: [n_q, l_q] or None. corpus, normalize, memory, progress: as in `topk`. The codes of
            a store are used as they are; where it has none, they are made in memory.
        k: documents that count. n_candidates: of a first stage.
        stages: of "binary" (`BinaryScan`), "mean" (`MeanPool`), "row" (`RowPool`), "muvera" (`Muvera`) and "lemur"
            (`Lemur`), each with its defaults.

    Returns:
        The exact search first, whose ranking is the truth; then the others. Times are the best of two runs.

    Raises:
        TypeError, ValueError: as `topk`; an unknown stage; a token with NaN or infinity, where codes or a stage are
            made of it.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"stages must be of {', '.join(STAGES)}; got {unknown[0]!r}")
    found = corpora.of(corpus)
    k, n = min(k, len(found)), min(max(k, n_candidates), len(found))
    documents = len(found)
    whole, per = found.token_bytes * int(found.offsets[-1]) / documents, int(found.offsets[-1]) / documents
    options: dict[str, Any] = dict(normalize=normalize, memory=memory)
    exact, ms = _timed(lambda: topk(q, found, k, q_mask, codes="off", **options).indices, len(q))
    truth = exact_gains(exact)
    rows = [Quality("exact", 1.0, 1.0, whole, ms, exact)]

    def add(method: str, size: float, search: Callable[[], Tensor]) -> None:
        indices, ms = _timed(search, len(q))
        shared, gained = float(overlap(indices, exact).mean()), float(ndcg(indices, truth, k).mean())
        rows.append(Quality(method, shared, gained, size, ms, indices))

    codes: Any = found.codes
    if codes is not None:
        size = whole + codes.token_bytes * per
        add("exact, from codes", size, lambda: topk(q, found, k, q_mask, **options).indices)
    else:
        codes = encoded(found, "int8", memory, progress)
    add("int8", (found.dim + 8) * per, lambda: topk(q, codes, k, q_mask, **options).indices)
    made = {}
    for stage in stages:
        name, kind = STAGES[stage]
        # MeanPool ranks by cosine whatever the search does
        settings = {} if kind is MeanPool else {"normalize": normalize}
        made[name] = first = kind(found, memory=memory, progress=progress, **settings)
        add(name, first.bytes_per_document, lambda first=first: first.first(q, q_mask, k))
    for name, first in made.items():

        def search(first: Any = first) -> Tensor:
            return two_stage(q, found, k, first, q_mask, n_candidates=n, normalize=normalize).indices

        add(f"{name}, {n} rescored", first.bytes_per_document + whole, search)
    return rows


def _timed(search: Callable[[], Tensor], n_q: int) -> tuple[Tensor, float]:
    """What a search finds, on the CPU, and its milliseconds per query: the best of two runs."""
    best, found = math.inf, None
    for _ in range(2):
        start = time.perf_counter()
        found = search().cpu()
        best = min(best, time.perf_counter() - start)
    assert found is not None
    return found, best * 1e3 / n_q
