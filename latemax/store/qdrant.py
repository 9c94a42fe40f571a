"""Qdrant points with a multi-vector (``MultiVectorConfig(comparator=MAX_SIM)``) from and to documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def from_qdrant(
    points: Iterable, *, vector: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[list[int] | list[str], list[Tensor]]:
    """ids and documents [l_i, dim] of points that were read with their vectors.

    Args:
        points: records, scored points or point structs: anything with ``id`` and ``vector``.
        vector: the name of the multi-vector; None where the collection has one unnamed.
        dtype: of the documents; Qdrant's client hands float32 values over.

    Raises:
        ValueError: a point without that vector, or with one that is not a multi-vector; names the point.
    """
    ids, documents = [], []
    for point in points:
        value = point.vector
        if vector is not None:
            value = value.get(vector) if isinstance(value, dict) else None
        if value is None or isinstance(value, dict):
            had = sorted(point.vector) if isinstance(point.vector, dict) else "none"
            raise ValueError(
                f"point {point.id!r} brings no vector {vector or '(unnamed)'!r} (vectors: {had}); read points with "
                "with_vectors=True"
            )
        tokens = torch.tensor(value, dtype=dtype)
        if tokens.dim() != 2:
            raise ValueError(f"point {point.id!r}: vector must be a multi-vector [l, dim], got {list(tokens.shape)}")
        ids.append(point.id)
        documents.append(tokens)
    return ids, documents


def to_qdrant(documents: Iterable[Tensor], ids: Iterable[int | str], *, vector: str | None = None) -> Iterator:
    """PointStructs, one per document, made on demand: ``client.upload_points(name, to_qdrant(...))``.

    Args:
        documents: a PatchStore, or any iterable of tensors [l, dim]. ids: unsigned ints or UUID strings.
        vector: the name of the multi-vector; None where the collection has one unnamed.

    Raises:
        ImportError: qdrant-client is missing.
    """
    try:
        from qdrant_client.models import PointStruct
    except ImportError as error:
        raise ImportError("Qdrant points need qdrant-client: pip install qdrant-client") from error
    for id, tokens in zip(ids, documents, strict=True):
        values = tokens.float().tolist()
        yield PointStruct(id=id, vector=values if vector is None else {vector: values})
