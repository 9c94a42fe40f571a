"""Scores one pair on the CPU where triton cannot be imported."""

import sys

import torch

sys.modules["triton"] = None
import latemax  # noqa: E402

q, d = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 1.0], [1.0, 4.0]])
assert latemax.maxsim(q, d).item() == 11.0
