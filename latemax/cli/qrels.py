"""Judgements of documents in TREC's format, and nDCG, recall and MRR of rankings by ir-measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Judgements = dict[str, dict[str, int]]


def measuring() -> Any:
    """The module ir_measures.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError('--qrels needs ir-measures: pip install "latemax[eval]"') from error
    return ir_measures


def read(path: str) -> Judgements:
    """Query → document → relevance, of lines ``query 0 document relevance`` or ``query document relevance``.

    Columns are separated by tabs where a line has one, else by spaces; empty lines are skipped.

    Raises:
        OSError: the file cannot be read. ValueError: naming a line that is neither, or no judgement.
    """
    found: Judgements = {}
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            parts = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
            if not line.strip():
                continue
            try:
                relevance = int(parts[-1])
            except ValueError:
                relevance = None
            if len(parts) not in (3, 4) or relevance is None:
                raise ValueError(f"{path}, line {number} must be: query 0 document relevance; got {line.strip()!r}")
            found.setdefault(parts[0], {})[parts[-2]] = relevance
    if not found:
        raise ValueError(f"{path} holds no judgement")
    return found


def judged(queries: Sequence[str], qrels: Judgements) -> list[str]:
    """The queries that have judgements.

    Raises:
        ValueError: none has, or two of one name have.
    """
    found = [query for query in queries if query in qrels]
    if not found:
        raise ValueError(f"no query has judgements: queries are {queries[0]!r}, …; judgements {next(iter(qrels))!r}, …")
    if len(set(found)) != len(found):
        twice = next(query for query in found if found.count(query) > 1)
        raise ValueError(f"queries with judgements must have names of their own; {twice!r} is the name of two")
    return found


def measure(rankings: Tensor, queries: Sequence[str], ids: Sequence[object], qrels: Judgements) -> dict[str, float]:
    """nDCG, recall and MRR at k, the mean of the queries that have judgements.

    Args:
        rankings: int64 [n_q, k], best first, -1 for none. queries: their names. ids: of the store's documents.
        qrels: of `read`.

    Returns:
        ``{"ndcg": …, "recall": …, "mrr": …}``.
    """
    measures, k = measuring(), rankings.shape[1]
    wanted = set(judged(queries, qrels))
    run = [
        # by rank, so that equal scores stay in our order
        measures.ScoredDoc(query, str(ids[i]), float(-rank))
        for query, row in zip(queries, rankings.tolist(), strict=True)
        if query in wanted
        for rank, i in enumerate(row)
        if i >= 0
    ]
    truth = [
        measures.Qrel(query, document, relevance)
        for query in sorted(wanted)
        for document, relevance in qrels[query].items()
    ]
    names = {"ndcg": measures.nDCG @ k, "recall": measures.R @ k, "mrr": measures.RR @ k}
    found = measures.calc_aggregate(list(names.values()), truth, run)
    return {name: float(found[one]) for name, one in names.items()}
