"""Switches that must be set before the libraries concerned are imported."""

import os

import pytest
import torch
import torchvision_shim

torchvision_shim.install()
# without a GPU the Triton kernels run in triton's interpreter
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "torch_path: runs as where the native CPU kernel was not built")


@pytest.fixture(autouse=True)
def torch_path(request, monkeypatch):
    if request.node.get_closest_marker("torch_path") is None:
        yield
        return
    from latemax.ops import native_cpu_backend, select

    monkeypatch.setattr(native_cpu_backend, "_cpu", None)
    monkeypatch.setattr(native_cpu_backend, "_why_not", "taken away by a test")
    select.choose.cache_clear()
    yield
    select.choose.cache_clear()
