"""pytest options of the benchmark suite, and the JSON that it leaves behind."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from benchmarks.cpu import machine
from latemax import _bench


def pytest_addoption(parser):
    group = parser.getgroup("latemax benchmarks")
    group.addoption("--rows", type=pathlib.Path, help="write machine, limits and rows to this JSON")
    group.addoption("--tiny", action="store_true", help="shrink every shape: a rehearsal, not a measurement")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def limit(device, request) -> dict:
    return _bench.limits(device, rounds=2 if request.config.getoption("--tiny") else 20)


@pytest.fixture(scope="session")
def rows(request, device, limit):
    found: list[dict] = []
    yield found
    path = request.config.getoption("--rows")
    if path and found:
        result = dict(machine=describe(device), limits=limit, tiny=request.config.getoption("--tiny"), rows=found)
        # whole or not at all
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(result, indent=1) + "\n")
        scratch.replace(path)


def describe(device: str) -> dict:
    if device == "cpu":
        return machine()
    import triton

    return machine() | dict(
        gpu=torch.cuda.get_device_name(), capability=torch.cuda.get_device_capability(), triton=triton.__version__
    )  # fmt: skip
