"""Imports the installed package with all its kernel modules, scores one pair and prints what it found as JSON."""

import importlib
import json
import pathlib

import torch

import latemax
import latemax.kernels

(folder,) = latemax.kernels.__path__
for path in pathlib.Path(folder).glob("*.py"):
    importlib.import_module(f"latemax.kernels.{path.stem}")
q = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
d = torch.tensor([[3.0, 1.0], [1.0, 4.0]])
score = latemax.maxsim(q, d).item()
print(json.dumps({"file": latemax.__file__, "kernels": folder, "version": latemax.__version__, "score": score}))
