"""Switches that must be set before the libraries concerned are imported."""

import os

import torch
import torchvision_shim

torchvision_shim.install()
# without a GPU the Triton kernels run in triton's interpreter
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
