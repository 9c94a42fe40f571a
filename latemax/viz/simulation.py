"""Plots of the simulation in which CLS can become the argmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from latemax.viz._style import COLORS, CYCLE, MUTED, new_axes, percent, spread_labels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from latemax.analysis import ClsSimulation

_KNOB_LABELS = {
    "absorbed": "absorbed: cosine of CLS with the sum of the patches",
    "alignment": "alignment: part of a query token that points at the pooled image",
    "shared": "shared: part of a patch that all patches share",
    "norm_ratio": "norm ratio: |CLS| / |patch|",
    "noise": "noise: |noise| / |content| of patches and query tokens",
    "n_patches": "patches in the image",
}


def plot_simulation(
    simulations: Mapping[str, ClsSimulation], *, title: str | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Plots the CLS win rate against one knob: one curve per setting, and the chance line 1 / (n_patches + 1).

    Curves are means over trials; bands span the smallest to the largest trial.

    Args:
        simulations: label -> result of `latemax.analysis.simulate_cls_dominance`, all of one knob.
        title: None states the largest win rate.
        ax: axes to draw on; None makes a new figure.

    Returns:
        (fig, ax).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: simulations of several knobs.
    """
    knob = _one_knob(simulations)
    with style() as plt:
        fig, ax = new_axes(plt, ax, (6.4, 4.2))
        ends = {}
        for at, (label, sim) in enumerate(simulations.items()):
            _band(ax, sim.values, sim.win_rate, CYCLE[at % len(CYCLE)])
            ends[label] = (float(sim.win_rate[:, -1].mean()), CYCLE[at % len(CYCLE)])
        sim = next(iter(simulations.values()))
        ax.plot(sim.values, sim.chance, color=MUTED, linewidth=1.4, linestyle=(0, (4, 2)))
        ends[f"chance {percent(float(sim.chance[-1]))}"] = (float(sim.chance[-1]), MUTED)
        _finish(ax, knob, ends, "query tokens whose maximum is CLS")
        ax.set_title(title or f"CLS holds up to {percent(float(sim.win_rate.mean(0).max()))} of the maxima")
    return fig, ax


def plot_dropping(
    simulation: ClsSimulation, *, measure: str = "pointing", title: str | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Plots accuracy with CLS kept and with CLS dropped against one knob, and the chance line.

    Args:
        simulation: result of `latemax.analysis.simulate_cls_dominance`.
        measure: ``"pointing"`` or ``"retrieval"``.
        title: None states the largest difference.
        ax: axes to draw on; None makes a new figure.

    Returns:
        (fig, ax).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: another measure.
    """
    if measure not in ("pointing", "retrieval"):
        raise ValueError(f'measure must be "pointing" or "retrieval", got {measure!r}')
    kept, dropped = getattr(simulation, f"{measure}_kept"), getattr(simulation, f"{measure}_dropped")
    chance = getattr(simulation, f"{measure}_chance")
    chance = float(chance[-1]) if measure == "pointing" else float(chance)
    with style() as plt:
        fig, ax = new_axes(plt, ax, (6.4, 4.2))
        ends = {}
        for label, values, color in (
            ("CLS dropped", dropped, COLORS["patches"]),
            ("CLS kept", kept, COLORS["CLS"]),
        ):
            _band(ax, simulation.values, values, color)
            ends[label] = (float(values[:, -1].mean()), color)
        ax.axhline(chance, color=MUTED, linewidth=1.4, linestyle=(0, (4, 2)))
        ends[f"chance {percent(chance)}"] = (chance, MUTED)
        _finish(ax, simulation.knob, ends, f"{measure} accuracy")
        at = int((dropped - kept).mean(0).abs().argmax())
        before, after = (percent(float(v.mean(0)[at])) for v in (kept, dropped))
        where = f"{simulation.knob} {float(simulation.values[at]):g}"
        ax.set_title(title or f"Dropping CLS: {measure} {before} to {after}\nat {where}")
    return fig, ax


def plot_simulation_panels(
    panels: Mapping[str, Mapping[str, ClsSimulation] | ClsSimulation],
    *,
    titles: Mapping[str, str] | None = None,
    title: str | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """Plots several sweeps, two per row.

    Args:
        panels: name -> what `plot_simulation` takes; under the names "pointing" and "retrieval", one simulation for
            `plot_dropping`.
        titles: name -> title of that panel.
        title: of the figure.

    Returns:
        (fig, axes [rows, 2]).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a panel with simulations of several knobs.
    """
    rows = -(-len(panels) // 2)
    with style() as plt:
        fig, axes = plt.subplots(rows, 2, figsize=(12.4, 3.9 * rows + 0.5), layout="constrained", squeeze=False)
        fig.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for ax, (name, content) in zip(axes.flat, panels.items(), strict=False):
            heading = (titles or {}).get(name)
            if isinstance(content, Mapping):
                plot_simulation(content, title=heading, ax=ax)
            else:
                plot_dropping(content, measure=name, title=heading, ax=ax)
        for ax in list(axes.flat)[len(panels) :]:
            ax.remove()
        if title:
            fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=14)
    return fig, axes


def _one_knob(simulations: Mapping[str, ClsSimulation]) -> str:
    knobs = {sim.knob for sim in simulations.values()}
    if len(knobs) != 1:
        raise ValueError(f"simulations must sweep one knob, got {sorted(knobs)}")
    return knobs.pop()


def _band(ax: Any, x: Any, values: Any, color: str) -> None:
    ax.fill_between(x, values.min(0).values, values.max(0).values, color=color, alpha=0.16, linewidth=0)
    ax.plot(x, values.mean(0), color=color, linewidth=2, marker="o", markersize=3.5)


def _finish(ax: Any, knob: str, ends: Mapping[str, tuple[float, str]], ylabel: str) -> None:
    ax.set_ylim(-0.03, 1.04)
    ax.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
    ax.set_ylabel(ylabel)
    ax.set_xlabel(_KNOB_LABELS[knob])
    ax.grid(axis="y")
    line = ax.lines[0].get_xdata()
    if knob == "n_patches":
        ax.set_xscale("log", base=2)
        ax.set_xticks(line, [f"{v:.0f}" for v in line])
        ax.minorticks_off()
    heights = spread_labels([value for value, _ in ends.values()], 0.075, 0.0, 1.0)
    for (label, (_, color)), height in zip(ends.items(), heights, strict=True):
        ax.annotate(
            label, (1.015, height), xycoords=("axes fraction", "data"), color=color, va="center", annotation_clip=False
        )
