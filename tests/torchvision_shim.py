"""Makes torchvision importable with a CPU-only torch, for the tests only.

PyPI's Linux wheel of torchvision is built for CUDA: without libtorch_cuda its operators do not load, and `import
torchvision` dies on registering fakes for two of them. Declaring those two is enough for its models and transforms, and
so for timm and open_clip. Call `install()` before the first import of any of these.
"""

from __future__ import annotations

import importlib.util

import torch

_library = None


def install() -> bool:
    """Whether torchvision can be imported now."""
    global _library
    if importlib.util.find_spec("torchvision") is None:
        return False
    if not torch.cuda.is_available() and _library is None:
        # Kept in the module: a Library that is collected takes its operators with it.
        _library = torch.library.Library("torchvision", "DEF")
        _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return True
