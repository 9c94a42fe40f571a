"""Crops as queries against photos: encoding, scoring, ranking and pointing."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from latemax import explain, maxsim
from latemax.demo.photos import Crop, Photo

if TYPE_CHECKING:
    from latemax import PatchEncoder

Grid = tuple[int, int]

# Multiples of 14 and of 16: 256 and 64 patches at patch size 14, 196 and 49 at 16.
PHOTO_SIZE, CROP_SIZE = 224, 112


@dataclass(frozen=True)
class Encoded:
    """Tokens after the final norm and before L2 normalization.

    Attributes:
        d: [n_d, l_d, dim], patches of the photos.
        d_prefix: [n_d, p, dim].
        d_before: [n_d, p + l_d, dim], the whole sequences of the photos before the final norm.
        grid: (rows, cols) of a photo.
        q: [n_q, l_q, dim], patches of the crops.
        q_prefix: [n_q, p, dim].
        q_grid: (rows, cols) of a crop.
    """

    d: Tensor
    d_prefix: Tensor
    d_before: Tensor
    grid: Grid
    q: Tensor
    q_prefix: Tensor
    q_grid: Grid


def encode(
    encoder: PatchEncoder, before_norm: PatchEncoder, photos: list[Photo], crops: list[Crop], *, progress: bool
) -> Encoded:
    """Encodes photos and crops.

    Args:
        encoder: with ``normalize=False``.
        before_norm: an encoder of the same model, also with ``final_norm=None``.
        photos: the documents.
        crops: the queries.
        progress: draw progress bars.
    """
    photo_size, crop_size = (PHOTO_SIZE, PHOTO_SIZE), (CROP_SIZE, CROP_SIZE)
    options: dict[str, Any] = {"return_prefix": True, "progress": progress, "batch_size": 16}
    before = before_norm.encode([p.image for p in photos], size=photo_size, **options)
    norm = encoder.adapter.norm or torch.nn.Identity()
    with torch.no_grad():
        d, d_prefix = norm(before.tokens), norm(before.prefix)
    q = encoder.encode([c.image for c in crops], size=crop_size, **options)
    # fixed sizes: one grid for all photos and one for all crops, never a list of them
    d_grid, q_grid = cast(Grid, before.grid), cast(Grid, q.grid)
    return Encoded(d, d_prefix, torch.cat([before.prefix, before.tokens], 1), d_grid, q.tokens, q.prefix, q_grid)


def recall_at_1(scores: Tensor, owner: Tensor) -> float:
    """Returns the share of queries whose own photo scores highest, from scores [n_q, n_d] and owner [n_q]."""
    return float((scores.argmax(1) == owner).double().mean())


def rankings(encoded: Encoded, owner: Tensor) -> dict[str, float]:
    """Returns R@1 of several kinds of scoring, none of them trained; owner [n_q] is each query's own photo."""
    q, d = encoded.q, encoded.d
    scores = {
        "maxsim, patches, cosine": maxsim(q, d, normalize=True),
        "maxsim, patches, raw dot product": maxsim(q, d),
    }
    if encoded.d_prefix.shape[1]:
        everything = torch.cat([encoded.d_prefix, d], 1)
        scores["maxsim, CLS kept, cosine"] = maxsim(q, everything, normalize=True)
        scores["maxsim, CLS kept, raw dot product"] = maxsim(q, everything)
        cls = F.normalize(encoded.q_prefix[:, 0], dim=-1), F.normalize(encoded.d_prefix[:, 0], dim=-1)
        scores["one vector: CLS, cosine"] = cls[0] @ cls[1].T
    pooled = F.normalize(q.mean(1), dim=-1), F.normalize(d.mean(1), dim=-1)
    scores["one vector: mean patch, cosine"] = pooled[0] @ pooled[1].T
    return {name: recall_at_1(value, owner) for name, value in scores.items()}


def pointing(argmax: Tensor, crops: list[Crop], grid: Grid, q_grid: Grid) -> dict[str, Any]:
    """Measures whether the argmax patches on the right photo are where the crop was cut.

    Args:
        argmax: int [n_q, l_q], on each query's own photo.
        crops: the queries.
        grid: (rows, cols) of a photo.
        q_grid: (rows, cols) of a crop.

    Returns:
        ``in_box``: the share of argmax patches whose centre is inside the crop's box; its chance is the box's share of
        the patch centres. ``near``: the share whose centre is within 1.5 patches of the true place of the query patch's
        centre; its chance is the share of patches that are so near. Both with ``_chance``, ``in_box`` also
        ``_per_query``.
    """
    rows, cols = grid
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(cols) + 0.5) / cols, indexing="ij")
    centre = torch.stack([x.flatten(), y.flatten()], -1)
    v, u = torch.meshgrid(
        (torch.arange(q_grid[0]) + 0.5) / q_grid[0], (torch.arange(q_grid[1]) + 0.5) / q_grid[1], indexing="ij"
    )
    inside_query = torch.stack([u.flatten(), v.flatten()], -1)
    box = torch.tensor([c.box for c in crops])
    low, high = box[:, None, :2], box[:, None, 2:]
    in_box = ((centre >= low) & (centre <= high)).all(-1)
    truth = low + inside_query * (high - low)
    distance = ((centre[None, None] - truth[:, :, None]) * torch.tensor([cols, rows])).norm(dim=-1)
    near = distance <= 1.5
    patch = argmax.long()
    return {
        "in_box": float(in_box.gather(1, patch).double().mean()),
        "in_box_chance": float(in_box.double().mean()),
        "near": float(near.gather(2, patch[..., None]).double().mean()),
        "near_chance": float(near.double().mean()),
        "in_box_per_query": in_box.gather(1, patch).double().mean(1).tolist(),
        "in_box_chance_per_query": in_box.double().mean(1).tolist(),
    }


def time_scoring(q: Tensor, d: Tensor, repeats: int = 5) -> dict[str, float | int | str]:
    """Times one `maxsim` call over all pairs, after a warm-up call.

    Returns:
        ``median_ms`` and ``fastest_ms`` of ``repeats`` calls, with the sizes, threads and backend.
    """
    maxsim(q, d, normalize=True)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        maxsim(q, d, normalize=True)
        if q.is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return {
        "median_ms": statistics.median(times),
        "fastest_ms": min(times),
        "repeats": repeats,
        "n_q": q.shape[0],
        "l_q": q.shape[1],
        "n_d": d.shape[0],
        "l_d": d.shape[1],
        "dim": q.shape[2],
        "threads": torch.get_num_threads(),
        "backend": explain(q, d, normalize=True).backend,
    }
