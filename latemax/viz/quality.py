"""Quality of searches against the bytes that they keep of a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latemax.viz._style import CYCLE, MUTED, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_quality(rows: Sequence[Any], *, value: str = "overlap", title: str | None = None) -> Figure:
    """Plots what each search keeps of the exact ranking over the bytes of a document, on a logarithmic axis.

    Args:
        rows: what `latemax.search.retention` returned, or objects with ``method``, ``bytes`` and ``value``.
        value: the attribute to plot, from 0 to 1.
        title: of the plot.

    Raises:
        ImportError: matplotlib is missing.
    """
    with style() as plt:
        figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        for i, row in enumerate(rows):
            height = getattr(row, value)
            axis.scatter(row.bytes, height, s=46, color=CYCLE[i % len(CYCLE)], zorder=3, label=row.method)
            axis.annotate(f"{height:.3f}", (row.bytes, height), (0, -13), textcoords="offset points", ha="center",
                          fontsize=8, color=MUTED)  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("bytes of a document")
        axis.set_ylabel(
            {"overlap": "share of the exact k best", "ndcg": "nDCG against the exact ranking"}.get(value, value)
        )
        axis.set_ylim(min(0.0, *(getattr(row, value) for row in rows)), 1.05)
        axis.grid(True)
        axis.legend(loc="lower right", fontsize=8.5, frameon=False)
        if title:
            axis.set_title(title)
    return figure
