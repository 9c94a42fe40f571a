"""The cached launcher hands the driver what triton's own launch would have handed it, and builds nothing twice.

In a process of its own, with a driver that compiles for sm_90 and launches nothing (the interpreter has no launcher).
"""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

PROGRAM = """
import torch, latemax
from benchmarks.host import prepare
from latemax.ops import triton_backend
null, _, _ = prepare()

def call(n_q, n_d, l_q, l_d, own=False, train=False, masked=False, normalize=False, offset=0):
    q = torch.zeros(n_q, l_q, 64 + offset, dtype=torch.bfloat16)[..., offset:].requires_grad_(train)
    d = torch.zeros(*((n_q,) if own else ()), n_d, l_d, 64, dtype=torch.bfloat16).requires_grad_(train)
    keep = torch.ones(d.shape[:-1], dtype=torch.bool) if masked else None
    seen = []
    scores = latemax.maxsim(q, d, None, keep, normalize=normalize, backend="triton")
    seen.append(null.last)
    if train:
        scores.sum().backward()
        seen.append(null.last)
    return seen

def plain(seen):
    # tensors by dtype and shape, everything else by value
    return [
        (name, grid, [(x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in args])
        for name, grid, args in seen
    ]

cases = [
    dict(n_q=1, n_d=5, l_q=32, l_d=100), dict(n_q=3, n_d=2, l_q=20, l_d=7, masked=True),
    dict(n_q=2, n_d=3, l_q=16, l_d=9, own=True, normalize=True),
    dict(n_q=2, n_d=3, l_q=16, l_d=9, train=True, normalize=True),
    dict(n_q=1, n_d=5, l_q=32, l_d=100, offset=1),
]
for case in cases:
    slow = plain(call(**case))
    built = len(triton_backend._built)
    fast = plain(call(**case))
    assert slow == fast, (case, slow, fast)
    assert len(triton_backend._built) == built
# other numbers of documents and tokens, 1 and multiples of 16 among them, run on the build there is
call(n_q=1, n_d=5, l_q=32, l_d=100)
built = len(triton_backend._built)
for n_d, l_d in ((1, 1), (16, 16), (7, 1024), (1000, 3)):
    call(n_q=1, n_d=n_d, l_q=32, l_d=l_d)
assert len(triton_backend._built) == built
# strides beyond int32 take triton's own way, to a build with 64-bit strides, and are not remembered
far = torch.zeros(1, 9, 64, dtype=torch.bfloat16).as_strided((1, 9, 64), (1 << 32, 64, 1))
q = torch.zeros(1, 32, 64, dtype=torch.bfloat16)
latemax.maxsim(q, far, backend="triton")
assert null.last[2][11] == 1 << 32 and len(triton_backend._built) == built
latemax.maxsim(q, far.contiguous(), backend="triton")
assert len(triton_backend._built) == built
print("launches", null.launches)
"""


def run(program: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cached_launches_equal_triton_s_own():
    assert int(run(PROGRAM).split()[-1]) >= 20


def test_the_host_path_is_timed_step_by_step():
    rows = run("from benchmarks import host; [print(row) for row in host.steps()]").splitlines()
    assert len(rows) == 9 and "whole call" in rows[0] and "first call" in rows[-1]
