"""The places in an image that a MaxSim score comes from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latemax import maxsim
from latemax.analysis._groups import argmax_similarity

_AXES = ("yx", "xy")


@dataclass(frozen=True)
class GroundingMap:
    """The best patch of every query token, for one query and one image or a batch of images.

    Attributes:
        map: [..., l_q, rows, cols] (or [..., l_q, cols, rows] with ``axes="xy"``). Each query token's similarity is in
            the cell of its best patch and every other cell is 0, so the whole map sums to the score.
        score: [...].
        argmax: int32 [..., l_q], the flat patch index ``row * cols + col``; -1 for masked query tokens.
        contribution: [..., l_q], the similarity that each query token adds to the score.
        grid: (rows, cols).
        axes: ``"yx"`` or ``"xy"``.
    """

    map: Tensor
    score: Tensor
    argmax: Tensor
    contribution: Tensor
    grid: tuple[int, int]
    axes: str

    def total(self) -> Tensor:
        """Sums the contributions of all query tokens per patch: [..., rows, cols] (or [..., cols, rows])."""
        return self.map.sum(-3)

    def wins(self) -> Tensor:
        """Counts the query tokens whose best patch each patch is: int64 [..., rows, cols], also with axes "xy"."""
        rows, cols = self.grid
        flat = torch.zeros(*self.argmax.shape[:-1], rows * cols, dtype=torch.int64, device=self.argmax.device)
        flat.scatter_add_(-1, self.argmax.long().clamp(min=0), (self.argmax >= 0).long())
        return flat.unflatten(-1, (rows, cols))


def grounding_map(
    q: Tensor,
    d: Tensor,
    grid: tuple[int, int],
    *,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    normalize: bool = False,
    axes: str = "yx",
) -> GroundingMap:
    """Maps each query token to its best patch, [l_q, rows, cols]; the cells sum to the MaxSim score.

    An image without a valid patch scores -inf and has an all-zero map; a query without a valid token scores 0.

    Args:
        q: [l_q, dim], one query.
        d: [rows * cols, dim] or [n_d, rows * cols, dim], patch tokens in row-major order without prefix tokens.
        grid: (rows, cols).
        q_mask: [l_q], True = keep.
        d_mask: [rows * cols] or [n_d, rows * cols], True = keep.
        normalize: score by cosine.
        axes: ``"yx"`` gives [..., l_q, rows, cols], as in sentence-transformers; ``"xy"`` gives [..., l_q, cols, rows],
            the [query, x, y] of colpali-engine.

    Returns:
        The map with its score, argmax and contributions.

    Raises:
        ValueError: a grid that does not multiply to the number of patch tokens, a batched q, or unknown axes.

    Example:
        >>> out = encoder.encode(image)
        >>> grounding = grounding_map(query_tokens, out.tokens[0], out.grid)
        >>> latemax.viz.plot_grounding(image, grounding)
    """
    rows, cols = grid
    if q.dim() != 2:
        raise ValueError(f"q must be one query [l_q, dim], got shape {list(q.shape)}")
    if d.dim() not in (2, 3):
        raise ValueError(f"d must be [rows * cols, dim] or [n_d, rows * cols, dim], got shape {list(d.shape)}")
    if rows < 1 or cols < 1 or rows * cols != d.shape[-2]:
        raise ValueError(
            f"grid must multiply to the number of patch tokens, got {rows} x {cols} = {rows * cols} "
            f"for {d.shape[-2]} tokens; drop prefix and padding tokens first"
        )
    if axes not in _AXES:
        raise ValueError(f'axes must be "yx" or "xy", got {axes!r}')
    score, argmax = maxsim(q, d, q_mask, d_mask, normalize=normalize, return_argmax=True)
    contribution = argmax_similarity(q, d, argmax, normalize=normalize)
    flat = contribution.new_zeros(*argmax.shape, rows * cols)
    flat.scatter_(-1, argmax.long().clamp(min=0)[..., None], contribution[..., None])
    cells = flat.unflatten(-1, (rows, cols))
    if axes == "xy":
        cells = cells.transpose(-1, -2)
    return GroundingMap(cells, score, argmax, contribution, (rows, cols), axes)


def convert_axes(maps: Tensor, *, source: str, target: str) -> Tensor:
    """Turns [..., rows, cols] ("yx", sentence-transformers) into [..., x, y] ("xy", colpali-engine) or back.

    Args:
        maps: at least two axes.
        source: ``"yx"`` or ``"xy"``, the axes of ``maps``.
        target: ``"yx"`` or ``"xy"``, the axes of the result.

    Returns:
        A view of ``maps``.

    Raises:
        ValueError: unknown axes, or fewer than two dimensions.
    """
    for name, value in (("source", source), ("target", target)):
        if value not in _AXES:
            raise ValueError(f'{name} must be "yx" or "xy", got {value!r}')
    if maps.dim() < 2:
        raise ValueError(f"maps must have at least the two grid axes, got shape {list(maps.shape)}")
    return maps if source == target else maps.transpose(-1, -2)


def to_colpali(maps: Tensor) -> Tensor:
    """Turns [..., rows, cols] into colpali-engine's [..., x, y]; a view."""
    return convert_axes(maps, source="yx", target="xy")


def from_colpali(maps: Tensor) -> Tensor:
    """Turns colpali-engine's [..., x, y] into [..., rows, cols], as in sentence-transformers; a view."""
    return convert_axes(maps, source="xy", target="yx")
