"""Markdown for the tables that suites render from their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table of the pages, between ``<!-- table:NAME -->`` and ``<!-- /table -->``."""

    result: str  # rendered from benchmarks/results/<result>.json
    render: Callable[[Any], str]
    absent: str = ""  # the text while that file does not exist


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def measured_limits(limit: dict[str, float]) -> str:
    """The sentence on the limits of the machine."""
    return (
        f"Limits measured in the same run: matmul float32 {limit['matmul_float32_tflops']:.3g} TFLOP/s, bfloat16 "
        f"{limit['matmul_bfloat16_tflops']:.3g}; read {limit['read_gbs']:.3g} GB/s."
    )
