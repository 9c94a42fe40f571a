"""Imports latemax: fails if that asks for a GPU or loads one of the modules named as arguments."""

import sys

# torch itself loads tqdm if it is installed: only what latemax adds counts
import numpy  # noqa: F401
import torch

ASKING = (
    "is_available", "device_count", "current_device", "get_device_capability", "get_device_properties", "init",
    "_lazy_init",
)  # fmt: skip


def asked(*_: object, **__: object) -> None:
    raise AssertionError("CUDA was asked at import")


for name in ASKING:
    setattr(torch.cuda, name, asked)
before = set(sys.modules)
import latemax  # noqa: E402, F401

added = {name.split(".")[0] for name in set(sys.modules) - before} & set(sys.argv[1:])
assert not added, f"importing latemax imports {sorted(added)}"
assert not torch.cuda.is_initialized()
