"""Draws the results of ``train_grounding.py``: what points where after which training.

python examples/train_grounding.py --json result.json
python examples/grounding_plots.py result.json --out plots

Needs ``pip install "latemax[demo]"``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from train_grounding import compose

from latemax.demo.photos import load_photos

INK, MUTED, CLS, PATCH = "#222222", "#6B6B6B", "#D55E00", "#0072B2"
NAMES = {
    "pooled": "one pooled vector\n(CLS), CLIP-style",
    "kept": "MaxSim,\nCLS kept",
    "dropped": "MaxSim,\nCLS dropped",
}
SCORINGS = (
    ("p_at_1_pooled", "pooled CLS", MUTED),
    ("p_at_1_kept", "MaxSim, CLS kept", CLS),
    ("p_at_1_dropped", "MaxSim, CLS dropped", PATCH),
)


def dots(result: dict[str, Any]) -> Figure:
    """Plots retrieval, pointing and CLS wins by training and LoRA; a small dot is a seed, a large one the mean."""
    fig, axes = plt.subplots(1, 3, figsize=(11, 4.6), layout="constrained", sharey=True, width_ratios=(1.25, 1, 0.9))
    pointing = [
        (f"pointing_{how}", label, color)
        for (_, label, color), how in zip(SCORINGS[1:], ("kept", "dropped"), strict=True)
    ]
    panels = (
        ("Retrieval: P@1", SCORINGS, "p_at_1"),
        ("Pointing accuracy", pointing, "pointing"),
        ("Names whose argmax is CLS", (("cls_wins", "MaxSim, CLS kept", CLS),), "cls_wins"),
    )
    for ax, (title, series, chance) in zip(axes, panels, strict=True):
        for y, row in enumerate(result["summary"]):
            mine = [r for r in result["rows"] if (r["trained"], r["lora"]) == (row["trained"], row["lora"])]
            for k, (metric, label, color) in enumerate(series):
                at = y + y // 2 * 0.45 + (k - (len(series) - 1) / 2) * 0.2
                ax.plot([r[metric] for r in mine], [at] * len(mine), "o", color=color, ms=3.5, alpha=0.5, mew=0)
                ax.plot(row["mean"][metric], at, "o", color=color, ms=8, label=label if y == 0 else None)
        ax.axvline(result["chance"][chance], color=INK, lw=1, ls="--")
        ax.annotate(
            "chance", (result["chance"][chance], -0.5), (4, 0), textcoords="offset points", color=MUTED, fontsize=9
        )
        ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color="#D9D9D9", lw=0.6)
        ax.set_axisbelow(True)
    axes[0].set_xlim(-0.02, 1.02)
    axes[1].set_xlim(-0.02, 1.02)
    axes[2].set_xlim(-0.01, 1.15 * max(row["cls_wins"] for row in result["rows"]) + 0.01)
    axes[2].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ticks = [y + y // 2 * 0.45 for y in range(6)]
    axes[0].set_yticks(ticks, ["frozen ViT", "+ LoRA"] * 3)
    axes[0].set_ylim(6.4, -0.8)
    for how, y in zip(NAMES, ticks[::2], strict=True):
        axes[0].annotate(
            f"trained by\n{NAMES[how]}", (-0.02, y + 0.5), (-190, 0), textcoords="offset points",
            xycoords=("axes fraction", "data"), va="center", fontweight="bold", fontsize=9.5,
        )  # fmt: skip
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, [f"scored by {label}" for label in labels], loc="outside lower center", ncols=3, frameon=False,
               handletextpad=0.1)  # fmt: skip
    return fig


def canvases(result: dict[str, Any], lora: bool = True) -> Figure:
    """Plots the first held-out canvases of the first seed in grey; closer patches are stronger, a ring is the argmax.

    Raises:
        ValueError: the installed photos are not those of the results.
    """
    first = {(r["trained"], r["lora"]): r["maps"] for r in result["rows"] if "maps" in r}
    maps = {how: first[how, lora] for how in NAMES}
    n, size, (rows, cols) = len(maps["pooled"]), result["settings"]["size"], result["grid"]
    photos = load_photos()
    if [photo.name for photo in photos] != result["photos"]:
        raise ValueError("the photos installed here are not those of the results")
    images, _ = compose(photos, n, size, 2 * result["seeds"][0] + 1)
    fig, axes = plt.subplots(1 + len(NAMES), n, figsize=(2.35 * n + 1.6, 2.45 * (1 + len(NAMES))), layout="constrained")
    for column, image in enumerate(images):
        axes[0, column].imshow(image)
        axes[0, column].set_title(f"“{result['photos'][maps['pooled'][column]['photo']]}”", fontsize=12)
        grey = np.asarray(image.convert("L")) / 255
        for ax, how in zip(axes[1:, column], NAMES, strict=True):
            ax.imshow(0.55 + 0.45 * grey, cmap="gray", vmin=0, vmax=1)
            overlay(ax, maps[how][column], size, rows, cols)
    for ax, name in zip(axes[:, 0], ("held-out canvas", *NAMES.values()), strict=True):
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10.5, labelpad=8)
    fig.suptitle("Which patch answers the name? Stronger blue is closer to it, the ring is the closest patch,\n"
                 "the frame is the photo that the name means", x=0.01, ha="left", fontweight="bold",
                 fontsize=11.5)  # fmt: skip
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    return fig


def overlay(ax: Axes, entry: dict[str, Any], size: int, rows: int, cols: int) -> None:
    """Draws the cosines of one canvas, the right quadrant, the argmax patch and a verdict."""
    cls, patches = entry["cosines"][0], np.array(entry["cosines"][1:]).reshape(rows, cols)
    top, height, width = patches.max(), size / rows, size / cols
    strength = np.clip((patches - patches.mean()) / (top - patches.mean()), 0, 1)
    colour = np.zeros((rows, cols, 4))
    colour[..., :3] = (0.0, 0.447, 0.698)
    colour[..., 3] = 0.85 * strength
    ax.imshow(colour, extent=(-0.5, size - 0.5, size - 0.5, -0.5), interpolation="nearest")
    half = size / 2
    corner = (entry["quadrant"] % 2 * half - 0.5, entry["quadrant"] // 2 * half - 0.5)
    ax.add_patch(Rectangle(corner, half, half, fill=False, ec=INK, lw=2))
    row, col = np.unravel_index(patches.argmax(), patches.shape)
    inside = (row * 2 // rows) * 2 + col * 2 // cols == entry["quadrant"]
    ring = Rectangle(
        (col * width - 0.5, row * height - 0.5), width, height, fill=False, ec="#009E73" if inside else CLS, lw=2.6
    )
    ax.add_patch(ring)
    verdict = "argmax is CLS" if cls > top else ("right" if inside else "wrong place")
    color = "#00795A" if verdict == "right" else CLS
    ax.set_xlabel(f"{verdict} (patch {top:.2f}, CLS {cls:.2f})", fontsize=9, color=color)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Draw the results of train_grounding.py.")
    parser.add_argument("result", type=Path, help="the file that train_grounding.py --json wrote")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the PNGs (default: %(default)s)")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("train-grounding.png", dots), ("train-canvases.png", canvases)):
        draw(result).savefig(options.out / name, dpi=130, facecolor="white")
        print(options.out / name)


if __name__ == "__main__":
    main()
