"""The look that all plots share: palette, type sizes, spines, and the import of matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Okabe-Ito: distinguishable under the common colour-vision deficiencies.
COLORS = {"CLS": "#D55E00", "registers": "#009E73", "patches": "#0072B2", "maximum": "#4D4D4D"}
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, FAINT = "#222222", "#6B6B6B", "#D9D9D9"

_RC: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 10.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 144,
    "figure.dpi": 100,
}


@contextmanager
def style() -> Iterator[Any]:
    """Yields ``matplotlib.pyplot`` with the look of this package and restores the user's rcParams afterwards.

    Raises:
        ImportError: matplotlib is missing; names the extra to install.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('latemax.viz needs matplotlib: pip install "latemax[viz]"') from error
    with plt.rc_context(_RC):
        yield plt


def color_of(name: str, at: int) -> str:
    """Returns the fixed colour of a token type; any other name takes colour number ``at`` of the cycle."""
    return COLORS.get(name, CYCLE[at % len(CYCLE)])


def percent(value: float) -> str:
    """Formats a share: 0.0039 -> "0.4 %", 0.123 -> "12 %", 0.998 -> "99.8 %".

    Only an exact 0 or 1 becomes "0 %" or "100 %".
    """
    value *= 100
    if value in (0, 100):
        return f"{value:.0f} %"
    if 0 < value < 0.05:
        return "< 0.1 %"
    return f"{value:.1f} %" if value < 10 or 99 <= value < 100 else f"{value:.0f} %"


def number(value: float) -> str:
    """Formats a number with three significant digits and without an exponent: 0.586, 43.4, 1,023."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def as_uint8(image: Any, name: str = "image") -> Any:
    """Converts an image to uint8 [H, W, 3].

    Args:
        image: a PIL image, which is turned upright as the encoder does it; or an array or tensor [H, W], [H, W, 3] or
            [H, W, 4]; floats are in 0..1.
        name: name of the argument in the error.

    Raises:
        ValueError: another shape.
    """
    import numpy as np

    if hasattr(image, "getexif"):
        from latemax.encoders.images import load_image

        image = load_image(image, name)
    array = np.asarray(image)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.ndim != 3 or array.shape[-1] not in (3, 4):
        raise ValueError(f"{name} must be [H, W], [H, W, 3] or [H, W, 4], got shape {list(array.shape)}")
    if array.dtype != np.uint8:
        array = (np.clip(array, 0, 1) * 255).round().astype(np.uint8)
    return array[..., :3]


def new_axes(plt: Any, ax: Any, figsize: tuple[float, float]) -> tuple[Any, Any]:
    """Returns ``(fig, ax)``: those of ``ax``, or of a new figure if it is None."""
    if ax is not None:
        return ax.figure, ax
    return plt.subplots(figsize=figsize, layout="constrained")


def spread_labels(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Returns heights for labels at ``values``, at least ``gap`` apart and within low..high."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed: list[float] = []
    for i in order:
        placed.append(max(values[i], placed[-1] + gap if placed else low))
    overshoot = placed[-1] - high if placed else 0
    if overshoot > 0:
        limit = high
        for k in range(len(placed) - 1, -1, -1):
            placed[k] = min(placed[k], limit)
            limit = placed[k] - gap
    heights = [0.0] * len(values)
    for i, height in zip(order, placed, strict=True):
        heights[i] = height
    return heights
