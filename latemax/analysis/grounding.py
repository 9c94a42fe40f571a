"""The places in an image that a MaxSim score comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from latemax import maxsim
from latemax.analysis._groups import argmax_similarity
from latemax.arguments.arrays import as_tensor
from latemax.search import TopK
from latemax.store import PatchStore

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


@overload
def grounding_map(
    q: Tensor, d: Tensor, grid: tuple[int, int],
    *, q_mask: Tensor | None = ..., d_mask: Tensor | None = ..., normalize: bool = ..., axes: str = ...,
) -> GroundingMap: ...  # fmt: skip


@overload
def grounding_map(
    q: Tensor, d: TopK, grid: PatchStore,
    *, q_mask: Tensor | None = ..., d_mask: Tensor | None = ..., normalize: bool = ..., axes: str = ...,
) -> list[GroundingMap]: ...  # fmt: skip


def grounding_map(
    q: Tensor,
    d: Tensor | TopK,
    grid: tuple[int, int] | PatchStore,
    *,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    normalize: bool = False,
    axes: str = "yx",
) -> GroundingMap | list[GroundingMap]:
    """Maps each query token to its best patch, [l_q, rows, cols]; the cells sum to the MaxSim score.

    An image without a valid patch scores -inf and has an all-zero map; a query without a valid token scores 0.

    Args:
        q: [l_q, dim], one query.
        d: [rows * cols, dim] or [n_d, rows * cols, dim], patch tokens in row-major order without prefix tokens; or what
            ``topk`` found in a store for this query, a `TopK` of scores [k] (``found.row(i)`` of several queries).
        grid: (rows, cols); with a `TopK`, the store, which has tokens and grid of each document.
        q_mask: [l_q], True = keep.
        d_mask: [rows * cols] or [n_d, rows * cols], True = keep.
        normalize: score by cosine.
        axes: ``"yx"`` gives [..., l_q, rows, cols], as in sentence-transformers; ``"xy"`` gives [..., l_q, cols, rows],
            the [query, x, y] of colpali-engine.

    Returns:
        The map with its score, argmax and contributions; of a `TopK` a list of them, one per document, best first.

    Raises:
        TypeError: a `TopK` without its store.
        ValueError: a document that was stored without a grid; a grid that does not multiply to the number of patch
            tokens, a batched q, or unknown axes.

    Example:
        >>> out = encoder.encode(image)
        >>> grounding = grounding_map(query_tokens, out.tokens[0], out.grid)
        >>> latemax.viz.plot_grounding(image, grounding)
        >>> maps = grounding_map(query_tokens, latemax.topk(query_tokens, store, 3), store)
    """
    q = as_tensor("q", q)
    if isinstance(d, TopK):
        return _of_ranking(q, d, grid, q_mask=q_mask, d_mask=d_mask, normalize=normalize, axes=axes)
    if isinstance(grid, PatchStore):
        raise TypeError("grid must be (rows, cols) with patch tokens; a store goes with a TopK")
    tokens: Tensor = as_tensor("d", d)
    rows, cols = grid
    if q.dim() != 2:
        raise ValueError(f"q must be one query [l_q, dim], got shape {list(q.shape)}")
    if tokens.dim() not in (2, 3):
        raise ValueError(f"d must be [rows * cols, dim] or [n_d, rows * cols, dim], got shape {list(tokens.shape)}")
    if rows < 1 or cols < 1 or rows * cols != tokens.shape[-2]:
        raise ValueError(
            f"grid must multiply to the number of patch tokens, got {rows} x {cols} = {rows * cols} "
            f"for {tokens.shape[-2]} tokens; drop prefix and padding tokens first"
        )
    if axes not in _AXES:
        raise ValueError(f'axes must be "yx" or "xy", got {axes!r}')
    score, argmax = maxsim(q, tokens, q_mask, d_mask, normalize=normalize, return_argmax=True)
    contribution = argmax_similarity(q, tokens, argmax, normalize=normalize)
    flat = contribution.new_zeros(*argmax.shape, rows * cols)
    flat.scatter_(-1, argmax.long().clamp(min=0)[..., None], contribution[..., None])
    cells = flat.unflatten(-1, (rows, cols))
    if axes == "xy":
        cells = cells.transpose(-1, -2)
    return GroundingMap(cells, score, argmax, contribution, (rows, cols), axes)


def _of_ranking(q: Tensor, found: TopK, store: object, *, d_mask: Tensor | None, **options: Any) -> list[GroundingMap]:
    if not isinstance(store, PatchStore):
        raise TypeError(f"grid must be the PatchStore that d was found in, got {type(store).__name__}")
    if found.indices.dim() != 1:
        raise ValueError(
            f"d must be the ranking of one query, indices [k] (found.row(i)); got {list(found.indices.shape)}"
        )
    if d_mask is not None:
        raise ValueError("d_mask must be None with a TopK: a store holds only tokens that are kept")
    maps = []
    for i in found.indices.tolist():
        # the empty slots of two_stage are the last ones
        if i < 0:
            break
        grid = store.grid(i)
        if grid is None:
            raise ValueError(f"document {store.ids[i]!r} must be stored with a grid; it has none")
        maps.append(grounding_map(q, store.floats(i).to(q.device), grid, **options))
    return maps


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
