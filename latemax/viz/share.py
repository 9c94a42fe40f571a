"""Plots of argmax shares compared with chance, and of similarity distributions by token type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from latemax.viz._style import INK, MUTED, color_of, new_axes, number, percent, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from latemax.analysis import ArgmaxShare, SimilarityDistribution


def plot_argmax_share(
    shares: Mapping[str, ArgmaxShare], *, group: str = "CLS", title: str | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Plots how often ``group`` holds the maximum: one row per condition, a stem from chance to the share.

    The log scale shows shares far below chance and near 1 in one plot; a share of 0 ends in an open dot at the left
    edge.

    Args:
        shares: condition -> result of `latemax.analysis.argmax_share`.
        group: the group of tokens to show.
        title: None states the largest share.
        ax: axes to draw on; None makes a new figure.

    Returns:
        (fig, ax).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no condition.
    """
    if not shares:
        raise ValueError("shares must hold at least one condition, got an empty mapping")
    rows = [(label, share[group], share.total) for label, share in shares.items()]
    positive = [v for _, r, _ in rows for v in (r["share"], r["chance"]) if v > 0]
    low = min(positive, default=0.01) / 4
    with style() as plt:
        fig, ax = new_axes(plt, ax, (9.6, 1.7 + 0.58 * len(rows)))
        color = color_of(group, 0)
        for y, (_, row, total) in enumerate(rows):
            share, chance = max(row["share"], low), max(row["chance"], low)
            ax.plot([chance, share], [y, y], color=color, linewidth=7, solid_capstyle="butt", alpha=0.35)
            ax.plot(share, y, "o", color=color, markersize=10, markerfacecolor=color if row["share"] else "white")
            ax.plot([chance] * 2, [y - 0.32, y + 0.32], color=INK, linewidth=1.6, solid_capstyle="butt")
            ax.annotate(
                f"{percent(row['share'])}  ({row['wins']:,} of {total:,}; {_times(row['lift'])} chance)",
                (max(share, chance), y), (11, 0), textcoords="offset points", va="center",
            )  # fmt: skip
        first = max(rows[0][1]["chance"], low)
        ax.annotate(f"chance {percent(rows[0][1]['chance'])}", (first, -0.42), color=MUTED, ha="center", va="bottom")
        ax.set_xscale("log")
        ax.set_xlim(low, 30)
        ticks = [t for t in (0.0001, 0.001, 0.01, 0.1, 1) if t >= low]
        ax.set_xticks(ticks, [f"{100 * t:g} %" for t in ticks])
        ax.minorticks_off()
        ax.spines["bottom"].set_bounds(low, 1)
        ax.spines["left"].set_visible(False)
        ax.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        ax.set_ylim(len(rows) - 0.45, -0.95)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(f"query tokens whose maximum is {group} (log scale)", loc="left")
        best = max(rows, key=lambda r: r[1]["share"])
        heading = title or f"{group} holds at most {percent(best[1]['share'])} of the maxima: {best[0]}"
        fig.suptitle(heading, x=0.01, ha="left", fontweight="bold", fontsize=11.5)
    return fig, ax


def _times(lift: float) -> str:
    return f"{lift:.1f}x" if lift < 10 else f"{lift:.0f}x"


def plot_similarity_distribution(
    distribution: SimilarityDistribution, *, title: str | None = None, bins: int = 90
) -> tuple[Figure, NDArray[Any]]:
    """Plots one ridge per token type, raw dot products left and cosines right, with the mean marked.

    Each ridge has its own scale, since there are many more patches than CLS tokens.

    Args:
        distribution: result of `latemax.analysis.similarity_distribution`.
        title: None states the mean cosines.
        bins: number of bins.

    Returns:
        (fig, axes [2]).

    Raises:
        ImportError: matplotlib is missing.
    """
    with style() as plt:
        names = list(distribution.raw)
        fig, axes = plt.subplots(1, 2, figsize=(10.4, 1.5 + 0.95 * len(names)), layout="constrained", sharey=True)
        panels = (
            ("raw dot product", distribution.raw, distribution.raw_mean),
            ("cosine (L2-normalised)", distribution.cosine, distribution.cosine_mean),
        )
        for ax, (label, values, means) in zip(axes, panels, strict=True):
            _ridges(ax, names, values, means, bins)
            ax.set_xlabel(label)
        labels = {"maximum": "best match\nof the query token"}
        axes[0].set_yticks([row - 0.3 for row in range(len(names))], [labels.get(n, n) for n in names])
        axes[0].set_ylim(len(names) - 0.9, -1.05)
        fig.suptitle(title or _distribution_title(distribution), x=0.01, ha="left", fontweight="bold", fontsize=11.5)
    return fig, axes


def _ridges(ax: Any, names: list[str], values: Mapping[str, Any], means: Mapping[str, float], bins: int) -> None:
    import numpy as np

    arrays = [values[name].numpy() for name in names]
    low = min((a.min() for a in arrays if a.size), default=0.0)
    high = max((a.max() for a in arrays if a.size), default=1.0)
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    for row, (name, array) in enumerate(zip(names, arrays, strict=True)):
        if not array.size:
            continue
        count, _ = np.histogram(array, edges)
        top = row - 0.82 * count / count.max()
        ax.fill_between(edges, np.append(top, top[-1]), row, step="post", color=color_of(name, row), alpha=0.85, lw=0)
        late = means[name] > edges[0] + 0.75 * (edges[-1] - edges[0])
        ax.plot([means[name]] * 2, [row, row - 0.88], color=INK, linewidth=1.2)
        ax.annotate(
            f"mean {number(means[name])}", (means[name], row - 0.88), (-4 if late else 4, 0),
            textcoords="offset points", va="center", ha="right" if late else "left", fontsize=9.5,
            bbox={"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 0.8},
        )  # fmt: skip
    ax.grid(axis="x")
    ax.locator_params(axis="x", nbins=6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _distribution_title(distribution: SimilarityDistribution) -> str:
    mean = distribution.cosine_mean
    others = [f"{name} {mean[name]:.2f}" for name in distribution.cosine if name != "maximum"]
    return f"Mean cosine with a query token: {', '.join(others)}; its best match {mean['maximum']:.2f}"
