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
    config.addinivalue_line("markers", "cuda_kernels: runs over backend='cuda' and skips what that refuses")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The operator's tests over the CUDA kernels: what these cannot take is told, not failed."""
    try:
        return (yield)
    except RuntimeError as error:
        if item.get_closest_marker("cuda_kernels") and str(error).startswith("backend='cuda' cannot run: "):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def torch_path(request, monkeypatch):
    if request.node.get_closest_marker("torch_path") is None:
        yield
        return
    from latemax.ops import dispatch
    from latemax.ops.backends import native

    monkeypatch.setattr(native, "_cpu", None)
    monkeypatch.setattr(native, "_why_not", "taken away by a test")
    dispatch.plan_for.cache_clear()
    yield
    dispatch.plan_for.cache_clear()
