"""Quality of searches against the bytes that they keep of a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latemax.viz._style import CYCLE, MUTED, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# more points than this would hide each other's numbers
LABELLED = 7
AXES = {"bytes": "bytes of a document", "ms": "ms per query"}


def plot_quality(
    rows: Sequence[Any],
    *,
    value: str = "overlap",
    over: Sequence[str] = ("bytes",),
    label: str | None = None,
    title: str | None = None,
) -> Figure:
    """Plots what each search keeps of the exact ranking over what it costs, on logarithmic axes.

    Args:
        rows: what `latemax.search.retention` returned, or objects with ``method``, ``value`` and those of ``over``.
        value: the attribute to plot, from 0 to 1. label: what it is called.
        over: a panel for each: "bytes" of a document, "ms" a query.
        title: of the plot.

    Raises:
        ImportError: matplotlib is missing.
    """
    label = label or {"overlap": "share of the exact k best", "ndcg": "nDCG against the exact ranking"}.get(
        value, value
    )
    with style() as plt:
        figure, axes = plt.subplots(
            1, len(over), figsize=(6.4 * len(over), 4.4), layout="constrained", sharey=True, squeeze=False
        )
        for axis, cost in zip(axes[0], over, strict=True):
            for i, row in enumerate(rows):
                x, height = getattr(row, cost), getattr(row, value)
                marker = "osD^"[i // len(CYCLE) % 4]
                axis.scatter(x, height, s=46, color=CYCLE[i % len(CYCLE)], marker=marker, zorder=3, label=row.method)
                if len(rows) > LABELLED:
                    continue
                axis.annotate(f"{height:.3f}", (x, height), (0, -13), textcoords="offset points", ha="center",
                              fontsize=8, color=MUTED)  # fmt: skip
            axis.set_xscale("log")
            axis.set_xlabel(AXES[cost])
            axis.grid(True)
        axes[0][0].set_ylabel(label)
        low = min(getattr(row, value) for row in rows)
        axes[0][0].set_ylim(max(min(0.0, low), low - 0.4 * (1 - low) - 0.02), 1.02 + 0.05 * (1 - low))
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5,
                      frameon=False)  # fmt: skip
        if title:
            axes[0][0].set_title(title)
    return figure
