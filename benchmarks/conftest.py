"""pytest options of the benchmark suite, and the JSON that it leaves behind."""

from __future__ import annotations

import json
import math
import pathlib
import time

import pytest
import torch

from benchmarks.cpu import machine
from latemax.cli import bench


def pytest_addoption(parser):
    group = parser.getgroup("latemax benchmarks")
    group.addoption("--rows", type=pathlib.Path, help="write machine, limits and rows to this JSON")
    group.addoption("--seconds", type=float, default=math.inf, help="start no shape later than this")
    group.addoption("--tiny", action="store_true", help="shrink every shape: a rehearsal, not a measurement")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def limit(device, request) -> dict:
    return bench.limits(device, rounds=2 if request.config.getoption("--tiny") else 20)


class Rows:
    """The rows found so far; every addition writes the file, so that a run cut short or failing leaves what it had."""

    def __init__(self, path, **head):
        self.path, self.head, self.found, self.start = path, head, [], time.monotonic()

    def extend(self, rows: list[dict]) -> None:
        self.found.extend(rows)
        if self.path:
            # whole or not at all
            scratch = self.path.with_suffix(".part")
            scratch.write_text(json.dumps(self.head | dict(rows=self.found), indent=1) + "\n")
            scratch.replace(self.path)


@pytest.fixture(scope="session")
def rows(request, device, limit):
    option = request.config.getoption
    return Rows(option("--rows"), machine=describe(device), limits=limit, tiny=option("--tiny"))


def describe(device: str) -> dict:
    if device == "cpu":
        return machine()
    import triton

    return machine() | dict(
        gpu=torch.cuda.get_device_name(), capability=torch.cuda.get_device_capability(), triton=triton.__version__
    )  # fmt: skip
