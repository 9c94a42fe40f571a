"""Which tokens of a retriever's image side show a part of the image, and which part."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapters.base import Grid
from .pixels import Box

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Layout(NamedTuple):
    """The tokens of one image.

    Attributes:
        is_patch: Bool ``[l]``.
        regions: Float32 ``[l, 4]``, fractions of the image (left, top, right, bottom); NaN where ``is_patch`` is False.
        grid: (rows, cols) of the patches; None where they are no single grid (tiles).
    """

    is_patch: Tensor
    regions: Tensor
    grid: Grid | None


class Parts(NamedTuple):
    """What a family says of its image tokens: their boxes ``[n, 4]`` in order, and their grid if they are one."""

    boxes: Tensor
    grid: Grid | None


def cells(grid: Grid, box: Box = WHOLE) -> Tensor:
    """Boxes ``[rows * cols, 4]`` of a row-major grid over ``box``."""
    rows, cols = grid
    left, top, right, bottom = box
    x = torch.linspace(left, right, cols + 1, dtype=torch.float64)
    y = torch.linspace(top, bottom, rows + 1, dtype=torch.float64)
    corners = (x[:-1].expand(rows, -1), y[:-1, None].expand(-1, cols), x[1:].expand(rows, -1), y[1:, None])
    return torch.stack([corner.expand(rows, cols) for corner in corners], -1).reshape(-1, 4).float()


def layout_of(processor: Any, ids: Tensor, features: Mapping[str, Any], index: int, size: Grid) -> Layout:
    """The layout of one image.

    Args:
        processor: The host's processor.
        ids: Int64 ``[l]``, the tokens of the image that are scored.
        features: What the processor made of the batch.
        index: Of the image in the batch.
        size: (height, width) of the image in pixels.

    Raises:
        ValueError: A processor that is not known here, or image tokens that do not fit its grid.
    """
    row = next((row for row in LAYOUTS if row.matches(processor)), None)
    if row is None:
        raise ValueError(
            f"processor: {type(processor).__name__} has no image layout known here: "
            f"{', '.join(row.name for row in LAYOUTS)}"
        )
    at = (ids == _image_token(processor)).nonzero().flatten()[row.markers :]
    parts = row.parts(processor, ids, features, index, size, len(at))
    if len(parts.boxes) != len(at):
        raise ValueError(
            f"{type(processor).__name__}: image {index} has {len(at)} image tokens, but its {row.name} layout has "
            f"{len(parts.boxes)}; another release of the host may arrange them in another way"
        )
    is_patch = torch.zeros(len(ids), dtype=torch.bool)
    is_patch[at] = True
    regions = torch.full((len(ids), 4), math.nan)
    regions[at] = parts.boxes
    return Layout(is_patch, regions, parts.grid)


def _image_token(processor: Any) -> int:
    token = getattr(processor, "image_token", None) or processor.tokenizer.image_token
    return processor.tokenizer.convert_tokens_to_ids(str(token))


def _square(processor: Any, ids: Tensor, features: Mapping[str, Any], index: int, size: Grid, n: int) -> Parts:
    """PaliGemma: the image squashed to a square, one token a patch."""
    side = math.isqrt(n)
    return Parts(cells((side, side)), (side, side))


def _merged(processor: Any, ids: Tensor, features: Mapping[str, Any], index: int, size: Grid, n: int) -> Parts:
    """Qwen2-VL: the image at about its own size; a token for ``merge_size`` x ``merge_size`` patches."""
    _, rows, cols = features["image_grid_thw"][index].tolist()
    merge = processor.image_processor.merge_size
    grid = (rows // merge, cols // merge)
    return Parts(cells(grid), grid)


def _tiles(processor: Any, ids: Tensor, features: Mapping[str, Any], index: int, size: Grid, n: int) -> Parts:
    """Idefics3: rows of square tiles, then a view of the whole image; each the same square of tokens."""
    side = math.isqrt(processor.image_seq_len)
    square, (_, rows, cols) = (side, side), processor.image_processor.get_number_of_image_patches(*size, {})
    tiles = [cells(square, (*box,)) for box in cells((rows, cols)).tolist()] if rows else []
    return Parts(torch.cat([*tiles, cells(square)]), None if tiles else square)


def _rows(processor: Any, ids: Tensor, features: Mapping[str, Any], index: int, size: Grid, n: int) -> Parts:
    """NeoMME: a token after every row of patches; the image is padded to whole patches at the right and the bottom."""
    rows = int((ids == processor.tokenizer.row_token_id).sum())
    grid = (rows, n // max(rows, 1))
    images = processor.image_processor
    resized = importlib.import_module(type(images).__module__).get_resize_output_size
    height, width = resized(*size, images.max_side, images.size)
    box = (0.0, 0.0, grid[1] * images.patch_size / width, grid[0] * images.patch_size / height)
    return Parts(cells(grid, box).clamp(max=1), grid)


class Row(NamedTuple):
    """One arrangement of image tokens.

    Attributes:
        name: In messages.
        matches: Whether a processor makes it.
        parts: The boxes of the image tokens.
        markers: How many leading image tokens are not patches.
    """

    name: str
    matches: Callable[[Any], bool]
    parts: Callable[[Any, Tensor, Mapping[str, Any], int, Grid, int], Parts]
    markers: int = 0


LAYOUTS = (
    Row("row-marked", lambda p: hasattr(p.tokenizer, "row_token_id"), _rows, markers=1),
    Row("merged", lambda p: hasattr(p.image_processor, "merge_size"), _merged),
    Row("tiled", lambda p: hasattr(p.image_processor, "max_image_size"), _tiles),
    Row("square", lambda p: hasattr(p, "image_seq_length"), _square),
)
