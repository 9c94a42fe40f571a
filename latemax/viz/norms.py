"""Plots of token norms before and after the final norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latemax.viz._style import COLORS, INK, as_uint8, color_of, number, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from latemax.analysis import TokenNorms


def plot_token_norms(
    norms: TokenNorms, *, patches: str = "patches", title: str | None = None, bins: int = 60
) -> tuple[Figure, NDArray[Any]]:
    """Plots histograms of token norms before and after the final norm, by token type.

    The histogram counts the patches; below it, each token of the other types and each flagged patch is one tick.

    Args:
        norms: result of `latemax.analysis.token_norms`.
        patches: the group of the patches.
        title: None states the largest norm and the number of flagged patches.
        bins: number of bins.

    Returns:
        (fig, axes [1 or 2]).

    Raises:
        ImportError: matplotlib is missing.
    """
    import numpy as np

    panels = [("before the final norm", norms.before)]
    if norms.after is not None:
        panels.append(("after the final norm", norms.after))
    with style() as plt:
        fig, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.9), layout="constrained", squeeze=False)
        axes = axes[0]
        for ax, (label, groups) in zip(axes, panels, strict=True):
            values = groups[patches].flatten().numpy()
            count, _, _ = ax.hist(values, bins=bins, color=COLORS["patches"], alpha=0.85)
            top = count.max()
            ax.annotate(
                f"{patches}: median {number(float(np.median(values)))}, largest {number(values.max())}", (0.02, 0.985),
                xycoords="axes fraction", color=COLORS["patches"], va="top",
            )  # fmt: skip
            ticks = [(name, groups[name].flatten().numpy(), color_of(name, 1)) for name in groups if name != patches]
            if norms.outlier.any():
                ticks.append(("flagged", groups[patches][norms.outlier].numpy(), INK))
            for row, (name, tokens, color) in enumerate(ticks):
                y = -top * (0.09 + 0.14 * row)
                ax.plot(tokens, np.full_like(tokens, y), "|", color=color, markersize=11, markeredgewidth=1.4)
                ax.annotate(
                    f"{name}: median {number(float(np.median(tokens)))}", (tokens.max(), y), (7, 0),
                    textcoords="offset points", color=color, va="center",
                )  # fmt: skip
            left, right = ax.get_xlim()
            ax.set_xlim(left, right + 0.28 * (right - left))
            ax.set_ylim(-top * (0.04 + 0.14 * len(ticks)), top * 1.16)
            ax.set_yticks([t for t in ax.get_yticks() if 0 <= t <= top])
            ax.axhline(0, color=INK, linewidth=0.6)
            ax.set_xlabel(f"token norm {label}")
        axes[0].set_ylabel(f"{patches} per bin")
        fig.suptitle(
            title or f"The largest patch norm is {norms.largest_ratio:.1f}x its image's median; "
            f"{int(norms.outlier.sum())} of {norms.outlier.numel():,} patches exceed median + {norms.k:g} MAD",
            x=0.01, ha="left", fontweight="bold", fontsize=11.5,
        )  # fmt: skip
    return fig, axes


def plot_norm_maps(
    images: Sequence[Any],
    norms: TokenNorms,
    grid: tuple[int, int],
    *,
    patches: str = "patches",
    title: str | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """Plots each image above the map of its patch norms before the final norm, with flagged patches outlined.

    Args:
        images: b images [H, W, 3].
        norms: of the same b images in the same order.
        grid: (rows, cols) of the patches.
        patches: the group of the patches.
        title: None takes a general one.

    Returns:
        (fig, axes [2, b]).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: another number of images than ``norms`` has, or a grid that does not fit.
    """
    rows, cols = grid
    maps = norms.before[patches]
    if len(images) != len(maps):
        raise ValueError(f"images must be as many as norms has, {len(maps)}, got {len(images)}")
    if rows * cols != maps.shape[1]:
        raise ValueError(f"grid must multiply to {maps.shape[1]} patches, got {rows} x {cols}")
    with style() as plt:
        fig, axes = plt.subplots(
            2, len(images), figsize=(2.1 * len(images) + 0.9, 4.9), layout="constrained", squeeze=False
        )
        shown = None
        for at, image in enumerate(images):
            axes[0, at].imshow(as_uint8(image))
            shown = axes[1, at].imshow(
                maps[at].view(rows, cols).numpy(), cmap="cividis", vmin=float(maps.min()), vmax=float(maps.max()),
                interpolation="nearest",
            )  # fmt: skip
            for flat in norms.outlier[at].nonzero()[:, 0].tolist():
                axes[1, at].add_patch(
                    plt.Rectangle((flat % cols - 0.5, flat // cols - 0.5), 1, 1, fill=False, ec=COLORS["CLS"], lw=2)
                )
            flagged = int(norms.outlier[at].sum())
            axes[1, at].set_xlabel(f"{flagged} flagged" if flagged else "none flagged")
        for ax in axes.flat:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
        fig.colorbar(shown, ax=axes[1].tolist(), label="norm before the final norm", shrink=0.9, pad=0.02)
        fig.suptitle(
            title or "Patch norms before the final norm, outliers outlined",
            x=0.01, ha="left", fontweight="bold", fontsize=11.5,
        )  # fmt: skip
    return fig, axes
