"""Plots of the patches that a score comes from, drawn on the image as blocks of true patch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latemax.viz._style import COLORS, INK, MUTED, as_uint8, new_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

    from latemax.analysis import GroundingMap

Box = tuple[float, float, float, float]
# four numbers: a tuple, or a row of PatchTokens.crop
Crop = Any

# Hue changes from left to right, lightness falls from top to bottom: each can be read without the other.
_HUES = ((0, 114, 178), (110, 60, 160), (213, 94, 0), (240, 190, 20))


def position_colors(rows: int, cols: int) -> NDArray[Any]:
    """Returns one colour per cell of a grid, float [rows * cols, 3] in 0..1, row-major.

    From left to right the colours run from blue through purple and orange to yellow, from top to bottom from light to
    dark.
    """
    import numpy as np

    hues = np.array(_HUES) / 255
    x = np.linspace(0, 1, cols) if cols > 1 else np.array([0.5])
    stops = np.linspace(0, 1, len(hues))
    hue = np.stack([np.interp(x, stops, hues[:, channel]) for channel in range(3)], -1)
    lift = np.linspace(0.5, -0.5, rows)[:, None, None] if rows > 1 else np.zeros((1, 1, 1))
    return np.where(lift >= 0, hue + (1 - hue) * lift, hue * (1 + lift)).reshape(-1, 3)


def plot_grounding(
    image: Any,
    grounding: GroundingMap,
    *,
    crop: Crop | None = None,
    box: Box | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Plots the patches that a score comes from on the image, each as one block of true patch size.

    A stronger block contributes a larger part of the score.

    Args:
        image: [H, W, 3] or a PIL image: the whole upright image with ``crop``, else exactly the pixels that the encoder
            saw.
        grounding: result of `latemax.analysis.grounding_map` for one image.
        crop: the part of the image that the grid covers, (left, top, right, bottom) as fractions of its sides: a row of
            ``PatchTokens.crop``.
        box: (left, top, right, bottom) in pixels, drawn as an outline.
        title: None states the number of patches and the score.
        ax: axes to draw on; None makes a new figure.

    Returns:
        (fig, ax).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a grounding of several images, something that is not an image, or an image without ``crop`` whose
            aspect is not that of the grid.

    Example:
        >>> out = encoder.encode([photo])
        >>> grounding = latemax.analysis.grounding_map(query_tokens, out.tokens[0], out.grid)
        >>> latemax.viz.plot_grounding(photo, grounding, crop=out.crop[0])
    """
    import numpy as np

    if grounding.score.dim() != 0:
        raise ValueError(f"grounding must be of one image, got a batch of shape {list(grounding.score.shape)}")
    picture = as_uint8(image)
    extent = _extent(picture, grounding.grid, crop)
    total = grounding.total().float().cpu()
    share = (total.T if grounding.axes == "xy" else total).clamp(min=0).numpy()
    wins = grounding.wins().cpu().numpy()
    with style() as plt:
        fig, ax = new_axes(plt, ax, (5.4, 5.8))
        ax.imshow(_faded(picture))
        strength = share / share.max() if share.max() > 0 else share
        color = np.array(_rgb(COLORS["CLS"]))
        overlay = np.concatenate(
            [np.broadcast_to(color, (*share.shape, 3)), np.where(wins > 0, 0.25 + 0.6 * strength, 0)[..., None]], -1
        )
        _blocks(ax, picture, overlay, extent)
        _outline(plt, ax, box)
        patches = int((wins > 0).sum())
        ax.set_title(
            title or f"The score {float(grounding.score):.1f} comes from {patches} of {wins.size} patches", loc="left"
        )
        ax.set_xlabel("stronger: a larger part of the score", color=MUTED)
        _bare(ax)
    return fig, ax


def plot_correspondence(
    image: Any,
    argmax: Tensor,
    grid: tuple[int, int],
    query_grid: tuple[int, int],
    *,
    crop: Crop | None = None,
    box: Box | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Plots each argmax patch on the image in the colour of its query patch (`position_colors`).

    A patch that is the argmax of several query patches takes the mean of their colours.

    Args:
        image: as in `plot_grounding`.
        argmax: int [rows * cols of ``query_grid``], flat indices into ``grid``; -1 draws nothing.
        grid: (rows, cols) of the image.
        query_grid: (rows, cols) of the query image.
        crop: as in `plot_grounding`.
        box: (left, top, right, bottom) in pixels, drawn as an outline.
        title: of the axes.
        ax: axes to draw on; None makes a new figure.

    Returns:
        (fig, ax).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: an argmax that does not fill ``query_grid``, or an image as in `plot_grounding`.
    """
    import numpy as np

    if argmax.shape != (query_grid[0] * query_grid[1],):
        raise ValueError(f"argmax must be [{query_grid[0] * query_grid[1]}] for query_grid {query_grid}, "
                         f"got {list(argmax.shape)}")  # fmt: skip
    picture = as_uint8(image)
    extent = _extent(picture, grid, crop)
    patch = argmax.long().cpu().numpy()
    colors, keep = position_colors(*query_grid), patch >= 0
    total = np.zeros((grid[0] * grid[1], 4))
    np.add.at(total[:, :3], patch[keep], colors[keep])
    np.add.at(total[:, 3], patch[keep], 1.0)
    count = total[:, 3:]
    overlay = np.concatenate([total[:, :3] / np.maximum(count, 1), 1.0 * (count > 0)], -1).reshape(*grid, 4)
    with style() as plt:
        fig, ax = new_axes(plt, ax, (5.4, 5.8))
        ax.imshow(_faded(picture))
        _blocks(ax, picture, overlay, extent)
        _outline(plt, ax, box)
        if title:
            ax.set_title(title)
        _bare(ax)
    return fig, ax


def plot_ranking(
    query: Any,
    query_grid: tuple[int, int],
    images: Sequence[Any],
    names: Sequence[str],
    scores: Sequence[float],
    argmax: Tensor,
    grid: tuple[int, int],
    *,
    crops: Sequence[Crop] | None = None,
    ranks: Sequence[int] | None = None,
    own: int | None = None,
    box: Box | None = None,
    title: str | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """Plots a query crop, its best images with their scores, and the argmax patches in each image.

    The colour of an argmax patch is that of its query patch.

    Args:
        query: [h, w, 3], exactly the pixels that the encoder saw.
        query_grid: (rows, cols) of the query.
        images: k images, best first, as in `plot_grounding`.
        names: k names.
        scores: k scores.
        argmax: int [k, l_q], flat indices into ``grid``.
        grid: (rows, cols) of the images.
        crops: k crops as in `plot_grounding`.
        ranks: k ranks; None is 1..k.
        own: which of the k images is the right one.
        box: (left, top, right, bottom) of the crop in the pixels of the right image.
        title: of the figure.

    Returns:
        (fig, axes [2, 1 + k]).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: images, names, scores, argmax or crops of different lengths, or images as in `plot_grounding`.
    """
    k = len(images)
    if not (len(names) == len(scores) == len(argmax) == k):
        raise ValueError(f"images, names, scores and argmax must have one length, "
                         f"got {k}, {len(names)}, {len(scores)} and {len(argmax)}")  # fmt: skip
    import torch

    if crops is not None and len(crops) != k:
        raise ValueError(f"crops must hold one of each image, {k}; got {len(crops)}")
    ranks = range(1, k + 1) if ranks is None else ranks
    with style() as plt:
        fig, axes = plt.subplots(
            2, 1 + k, figsize=(2.15 * (1 + k), 5.4), layout="constrained",
        )  # fmt: skip
        fig.get_layout_engine().set(h_pad=0.1)
        axes[0, 0].imshow(as_uint8(query, "query"))
        axes[0, 0].set_title("query crop")
        plot_correspondence(query, torch.arange(argmax.shape[1]), query_grid, query_grid, ax=axes[1, 0])
        axes[1, 0].set_xlabel(
            "each patch of the crop has\na colour; its best match in\neach photo has the same", color=MUTED
        )
        for at, (image, name, score) in enumerate(zip(images, names, scores, strict=True)):
            right = at == own
            color = COLORS["registers"] if right else INK
            top, bottom = axes[0, at + 1], axes[1, at + 1]
            top.imshow(as_uint8(image))
            top.set_title(f"{ranks[at]}. {name}", color=color, fontweight="bold" if right else "normal")
            top.set_xlabel(f"score {score:.2f}", color=color, fontweight="bold" if right else "normal")
            crop = None if crops is None else crops[at]
            plot_correspondence(image, argmax[at], grid, query_grid, crop=crop, box=box if right else None, ax=bottom)
            if right:
                _outline(plt, top, box)
                bottom.set_xlabel("the right photo,\nframe: where the\ncrop was cut", color=color)
        for ax in axes.flat:
            _bare(ax)
        if title:
            fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    return fig, axes


def _faded(picture: Any) -> Any:
    """Returns the picture grey and light, so that coloured blocks are prominent and the subject stays readable."""
    import numpy as np

    grey = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.repeat((90 + grey * 0.62).clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def _extent(picture: Any, grid: tuple[int, int], crop: Crop | None) -> tuple[float, float, float, float]:
    """Returns the place of a grid on the picture in matplotlib's order: left, right, bottom, top in pixels."""
    height, width = picture.shape[:2]
    rows, cols = grid
    if crop is None:
        # blocks are square patches: a stretch of up to half a block over the whole image is rounding
        stretch = abs(width * rows / (height * cols) - 1)
        if stretch * max(rows, cols) > 0.5:
            raise ValueError(
                f"image must be the pixels that the encoder saw, got {width} x {height} for a grid of {cols} x {rows} "
                f"patches; pass crop= (a row of PatchTokens.crop) to draw on the whole image"
            )
        crop = (0.0, 0.0, 1.0, 1.0)
    left, top, right, bottom = (float(side) for side in crop)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"crop must be (left, top, right, bottom) as fractions of the image, got {tuple(crop)}")
    return left * width - 0.5, right * width - 0.5, bottom * height - 0.5, top * height - 0.5


def _blocks(ax: Any, picture: Any, overlay: Any, extent: tuple[float, float, float, float]) -> None:
    height, width = picture.shape[:2]
    ax.imshow(overlay, extent=extent, interpolation="nearest")
    # imshow shows the extent only
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _outline(plt: Any, ax: Any, box: Box | None) -> None:
    if box is None:
        return
    left, top, right, bottom = box
    for width, color in ((3.4, "white"), (1.8, INK)):
        ax.add_patch(plt.Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, lw=width, ec=color))


def _rgb(code: str) -> tuple[float, ...]:
    return tuple(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _bare(ax: Any) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
