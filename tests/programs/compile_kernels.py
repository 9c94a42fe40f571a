"""Compiles a few builds for sm_90 into a folder, as triton caches them, and prints triton's version and ptxas's log:
compile_kernels.py FOLDER."""

import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"

import torch
import triton

from benchmarks import internals

# the last one takes its argmax from a forward of its own, then grad_q and grad_d
BUILDS = {
    "l_q 32": dict(l_q=32),
    "l_q 32 l_d 300": dict(l_q=32, l_d=300),
    "l_q 128": dict(l_q=128),
    "l_q 128 argmax": dict(l_q=128, return_argmax=True),
    "l_q 32 argmax": dict(l_q=32, train=True),
}
FORM = dict(l_d=1024, return_argmax=False, train=False)

print(triton.__version__)
internals.install_null_driver(90)
for name, options in BUILDS.items():
    os.environ["TRITON_CACHE_DIR"] = str(Path(sys.argv[1], name))
    internals.warm(**FORM | options, dim=128, n_q=1, dtype=torch.bfloat16, device="cpu", backend="triton")
