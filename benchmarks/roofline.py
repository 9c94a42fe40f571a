"""Attained FLOP/s against FLOPs a byte, under the measured limits, from benchmarks/results/bench-NAME.json.

python -m benchmarks.roofline NAME      draws docs/img/roofline-NAME.png
"""

from __future__ import annotations

import argparse
import json
import pathlib

from benchmarks import harness


def draw(result: dict, path: pathlib.Path) -> None:
    """One dot for each contender and shape, one panel for each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "wall" in row and not row["train"]]
    dtypes = list(dict.fromkeys(row["shape"]["dtype"] for row in rows))
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(5.4 * len(dtypes), 4.2), squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        peak, read = result["limits"][f"matmul_{dtype}_tflops"], result["limits"]["read_gbs"]
        here = [row for row in rows if row["shape"]["dtype"] == dtype]
        intensity = sorted(row["flops"] / row["bytes"] for row in here)
        xs = sorted([intensity[0] / 2, peak * 1e3 / read, intensity[-1] * 2])
        axis.plot(xs, [min(peak, x * read / 1e3) for x in xs], color="0.35")
        axis.annotate(f"measured limit: {peak:.2g} TFLOP/s, {read:.3g} GB/s", (xs[0], peak), color="0.35", fontsize=8,
                      xytext=(0, 5), textcoords="offset points")  # fmt: skip
        ours, others = ([row for row in here if (row["name"] == "latemax") is mine] for mine in (True, False))
        for chosen, colour, label, order in ((others, "#b0b0b0", "others", 2), (ours, "#d55e00", "latemax", 3)):
            x = [row["flops"] / row["bytes"] for row in chosen]
            y = [row["flops"] / row.get("cold", row["wall"])["p50"] / 1e9 for row in chosen]
            axis.scatter(x, y, s=34, color=colour, label=label, zorder=order)
        axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte of inputs", ylabel="TFLOP/s attained", title=dtype)
        axis.legend(frameon=False, loc="lower right")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    name = parser.parse_args().name
    path = harness.ROOT / "docs" / "img" / f"roofline-{name}.png"
    path.parent.mkdir(exist_ok=True)
    draw(json.loads((harness.RESULTS / f"bench-{name}.json").read_text()), path)
    print(f"drawn: {path.relative_to(harness.ROOT)}")


if __name__ == "__main__":
    main()
