"""pytest option of the benchmark cases."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("latemax benchmarks")
    group.addoption("--tiny", action="store_true", help="shrink every shape: a rehearsal, not a measurement")
