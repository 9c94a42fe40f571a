"""Exact MaxSim over multivector columns of LanceDB (0.40.0), scored in Arrow's memory: a scan and a reranker.

LanceDB's engine is Rust, so ``patch`` has nothing to replace. Its multivector distance is ``n_q - score``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latemax import maxsim_varlen
from latemax.compat._inputs import as_tensor

if TYPE_CHECKING:
    import lancedb.rerankers
    import pyarrow

__all__ = ["maxsim_reranker", "scan", "scores"]

SCORE = "_relevance_score"  # LanceDB's name for it


def scores(query: Any, column: pyarrow.Array | pyarrow.ChunkedArray, *, normalize: bool = True) -> Tensor:
    """The score of every row of a column. No token is copied.

    Args:
        query: tokens [l_q, dim]: a tensor, an array or nested lists. A float32 query of a float16 column converts the
            column, which copies it; pass a float16 one.
        column: Arrow of type list<fixed_size_list<float16 | float32>[dim]>.
        normalize: scale tokens to length 1: LanceDB's "cosine".

    Returns:
        float32 [n]. An empty list scores -inf.

    Raises:
        TypeError: another type of column. ValueError: a null; also as ``latemax.maxsim_varlen``.
        ImportError: pyarrow is missing.
    """
    from latemax.store import from_arrow

    q = as_tensor(query)
    q = q.to(torch.float32) if q.dtype == torch.float64 else q
    if q.dim() != 2:
        raise ValueError(f"query must be [l_q, dim], got shape {list(q.shape)}")
    q_offsets = torch.tensor([0, len(q)])
    found = [torch.empty(0)]
    for chunk in column.chunks if hasattr(column, "chunks") else [column]:
        tokens, offsets = from_arrow(chunk)
        found.append(maxsim_varlen(q, tokens, q_offsets, offsets, normalize=normalize)[0])
    return torch.cat(found)


def scan(
    rows: pyarrow.Table | Iterable[pyarrow.RecordBatch],
    query: Any,
    k: int = 10,
    *,
    column: str = "vector",
    normalize: bool = True,
) -> pyarrow.Table:
    """The k best rows of all, without an index.

    Args:
        rows: a table, or its batches one after another: ``table.search().where("year > 2020").to_batches()``. Only one
            batch and the best rows are held in memory.
        query, normalize: as in ``scores``.
        k: how many rows, at least 1.
        column: the multivector column.

    Returns:
        the rows with a float32 column ``_relevance_score``, best first; equal scores keep the order of ``rows``.

    Raises:
        ValueError: k below 1, no rows at all to take columns from; also as ``scores``.

    Example:
        >>> best = scan(db.open_table("pages").to_arrow(), query_tokens, k=5)
    """
    import pyarrow as pa

    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an int >= 1, got {k!r}")
    q, best = as_tensor(query), None
    for batch in rows.to_batches() if isinstance(rows, pa.Table) else rows:
        part = _with_scores(pa.Table.from_batches([batch]), q, column, normalize, k)
        best = part if best is None else _best(pa.concat_tables([best, part]), k)
    if best is not None:
        return best
    if not isinstance(rows, pa.Table):
        raise ValueError("rows must hold a batch, to take columns from")
    return _with_scores(rows, q, column, normalize, k)


def maxsim_reranker(
    query: Any | Callable[[str], Any],
    *,
    column: str = "vector",
    normalize: bool = True,
    return_score: str = "relevance",
) -> lancedb.rerankers.Reranker:
    """A ``lancedb.rerankers.Reranker`` by the exact score, for vector, full-text and hybrid search.

    Args:
        query: tokens [l_q, dim], or a function that makes them of the query's text; LanceDB passes only the text.
        column: the multivector column; the search must return it.
        normalize: as in ``scores``.
        return_score: "relevance": without ``_distance`` and ``_score``; "all": with them.

    Returns:
        the reranker. Its tables are best first.

    Raises:
        ImportError: lancedb is missing. ValueError: another ``return_score``.

    Example:
        >>> table.search(pooled).limit(100).rerank(maxsim_reranker(tokens), query_string="a red bus").to_arrow()
    """
    try:
        import pyarrow.compute as pc
        from lancedb.rerankers import Reranker
    except ImportError as error:
        raise ImportError("a reranker of LanceDB needs lancedb: pip install lancedb") from error

    class MaxSimReranker(Reranker):
        def rerank_vector(self, query: str, vector_results: pyarrow.Table) -> pyarrow.Table:
            return self._rerank(query, vector_results)

        def rerank_fts(self, query: str, fts_results: pyarrow.Table) -> pyarrow.Table:
            return self._rerank(query, fts_results)

        def rerank_hybrid(self, query: str, vector_results: pyarrow.Table, fts_results: pyarrow.Table) -> pyarrow.Table:
            merged = self.merge_results(vector_results, fts_results)
            if self.score == "all" and "_score" in fts_results.column_names:
                # a row that both found is the vector search's, without a text score
                found = pc.index_in(merged["_rowid"], fts_results["_rowid"])
                place = merged.column_names.index("_score")
                merged = merged.set_column(place, "_score", pc.take(fts_results["_score"], found))
            return self._rerank(query, merged)

        def _rerank(self, text: str, results: pyarrow.Table) -> pyarrow.Table:
            tokens = encode(text) if callable(encode) else encode
            results = _with_scores(results, as_tensor(tokens), column, normalize, len(results))
            return self._keep_relevance_score(results)

    encode = query
    return MaxSimReranker(return_score)


def _with_scores(rows: pyarrow.Table, q: Tensor, column: str, normalize: bool, k: int) -> pyarrow.Table:
    """The k best rows, with their scores."""
    import pyarrow as pa

    if column not in rows.column_names:
        raise ValueError(f"rows must have the column {column!r}; they have {', '.join(rows.column_names)}")
    found = scores(q, rows[column], normalize=normalize).float()
    rows = rows.drop_columns([SCORE]) if SCORE in rows.column_names else rows
    order = found.sort(descending=True, stable=True).indices[:k]
    return rows.take(pa.array(order.numpy())).append_column(SCORE, pa.array(found[order].numpy()))


def _best(rows: pyarrow.Table, k: int) -> pyarrow.Table:
    import pyarrow as pa

    order = torch.from_numpy(rows[SCORE].to_numpy().copy()).sort(descending=True, stable=True).indices[:k]
    return rows.take(pa.array(order.numpy()))
