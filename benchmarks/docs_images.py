"""Shrinks PNGs for the documentation: resizes to a width, reduces to a palette, refuses what stays above 150 kB.

latemax demo --out demo_out
python examples/grounding_plots.py benchmarks/results/train_grounding.json --out demo_out
python -m benchmarks.docs_images demo_out
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

OUT = Path(__file__).resolve().parents[1] / "docs" / "img"
LIMIT = 150_000
# file -> (width in pixels, colours): photos need colours, plots need pixels
IMAGES = {
    "words.png": (860, 96),
    "ranking-3-motorcycle.png": (860, 128),
    "cls-win-rate.png": (1100, 64),
    "cls-simulation.png": (1000, 64),
    "train-canvases.png": (740, 80),
    "train-grounding.png": (1200, 64),
}


# file -> the part of its height that is kept: of the words, those with CLS dropped
KEPT = {"words.png": (0.062, 0.452)}


def shrink(source: Path, target: Path, width: int, colours: int) -> int:
    """Writes ``target`` and returns its size in bytes."""
    with Image.open(source) as image:
        top, bottom = (round(image.height * side) for side in KEPT.get(source.name, (0, 1)))
        image = image.crop((0, top, image.width, bottom))
        height = round(image.height * width / image.width)
        small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    small.quantize(colours, dither=Image.Dither.NONE).save(target, optimize=True)
    return target.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the PNGs are")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    too_large = False
    for name, (width, colours) in IMAGES.items():
        size = shrink(options.folder / name, OUT / name, width, colours)
        too_large |= size > LIMIT
        print(f"{name}: {size / 1000:.0f} kB{' (too large)' if size > LIMIT else ''}")
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
