"""Settings made before the libraries they concern are imported, and the two marks of backends."""

import os

import pytest
import torch
import torchvision_shim

torchvision_shim.install()
# without a GPU the Triton kernels run in triton's interpreter
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# pytest-xdist's workers share the cores: this process and the programs that tests start take only their part
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)

# Files of 25 to 80 s start first: one that started last would run while the other workers have nothing to do.
LONGEST = [
    "cuda_emulated",
    "sanitizers",
    "cuda_build",
    "varlen",
    "store_model",
    "forward",
    "masks",
    "backward",
    "edges",
]


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips a test of the CUDA kernels with their reason if they reject its problem."""
    try:
        return (yield)
    except RuntimeError as error:
        if item.get_closest_marker("cuda_kernels") and str(error).startswith("backend='cuda' cannot run: "):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def torch_path(request, monkeypatch):
    """Removes the native CPU kernel for tests marked torch_path."""
    if request.node.get_closest_marker("torch_path") is None:
        yield
        return
    from latemax.ops import dispatch
    from latemax.ops.backends import native

    monkeypatch.setattr(native, "_cpu", None)
    monkeypatch.setattr(native, "_why_not", "removed by a test")
    dispatch.plan_for.cache_clear()
    yield
    dispatch.plan_for.cache_clear()
