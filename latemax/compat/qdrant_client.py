"""Multivector scores of qdrant-client's local mode (1.20.0): ``local.multi_distances``."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from latemax import maxsim
from latemax.compat._inputs import as_float32, as_scored, as_tensor, check_padding

__all__ = ["calculate_multi_distance_core"]


def calculate_multi_distance_core(
    query_matrix: np.ndarray, matrices: list[np.ndarray], distance_type: Any, *, padding: str = "exact"
) -> np.ndarray:
    """``local.multi_distances.calculate_multi_distance_core``: one query against the matrix of every point.

    The matrices are scored where they are; nothing is copied or kept.

    Args:
        query_matrix: [l_q, dim].
        matrices: an array [l_i, dim] for every point.
        distance_type: ``models.Distance`` or its value: "Cosine" and "Dot" are scored by latemax, "Euclid" and
            "Manhattan" by qdrant-client.
        padding: nothing is padded. "exact": float32 scores, also of a float64 query. "host": in the dtype of numpy.

    Returns:
        float64 [n]. A point without a token scores -inf.

    Raises:
        ValueError: NaN in the query, an unknown distance or ``padding``; also as ``latemax.maxsim``.
        ImportError: "Euclid" or "Manhattan" without qdrant-client.
    """
    check_padding(padding)
    distance = getattr(distance_type, "value", distance_type)
    if distance in ("Euclid", "Manhattan"):
        from qdrant_client.local import multi_distances

        # the host's own function, also where ours replaces it
        host = inspect.unwrap(multi_distances.calculate_multi_distance_core)
        return host(query_matrix, matrices, distance_type)
    if distance not in ("Cosine", "Dot"):
        raise ValueError(f"distance_type must be Cosine, Dot, Euclid or Manhattan; got {distance_type!r}")
    if np.isnan(query_matrix).any():
        raise ValueError("Query vector must not contain NaN")
    if not len(matrices):
        return np.empty(0)
    q, points = as_tensor(query_matrix), as_scored(matrices)
    if padding == "exact":
        # qdrant-client makes float64 arrays of lists of numbers: of a query, and of points loaded from a disk
        q, points = q.to(torch.float32), as_float32(points)
    return maxsim(q, points, normalize=distance == "Cosine").double().numpy()
