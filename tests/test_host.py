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
from benchmarks.suites.host import prepare
from latemax.ops.backends import triton_launch
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
    built = len(triton_launch._built)
    fast = plain(call(**case))
    assert slow == fast, (case, slow, fast)
    assert len(triton_launch._built) == built
# other numbers of documents and tokens, 1 and multiples of 16 among them, run on the build there is
call(n_q=1, n_d=5, l_q=32, l_d=100)
built = len(triton_launch._built)
for n_d, l_d in ((1, 1), (16, 16), (7, 1024), (1000, 3)):
    call(n_q=1, n_d=n_d, l_q=32, l_d=l_d)
assert len(triton_launch._built) == built
# strides beyond int32 take triton's own way, to a build with 64-bit strides, and are not remembered
far = torch.zeros(1, 9, 64, dtype=torch.bfloat16).as_strided((1, 9, 64), (1 << 32, 64, 1))
q = torch.zeros(1, 32, 64, dtype=torch.bfloat16)
latemax.maxsim(q, far, backend="triton")
assert null.last[2][14] == 1 << 32 and len(triton_launch._built) == built
latemax.maxsim(q, far.contiguous(), backend="triton")
assert len(triton_launch._built) == built
print("launches", null.launches)
"""


FORMS = """
import itertools, random, torch, latemax
from benchmarks.suites.host import prepare
from latemax.ops import dispatch
from latemax.ops.backends import triton_launch
null, _, _ = prepare()

def call(dtype=torch.bfloat16, n_d=5, l_d=100, offset=0, q_strided=False, d_strided=False, own=False,
         precision="highest", q_masked=False, d_masked=False, mask_strided=False, negated=False, **options):
    torch.set_float32_matmul_precision(precision)
    q = torch.zeros(1, 32, 64 + offset, dtype=dtype)[..., offset:]
    d = torch.zeros(*((1,) if own else ()), n_d, l_d, 64, dtype=dtype)
    q = torch.zeros(1, 32, 128, dtype=dtype)[..., :64] if q_strided else q
    d = d.transpose(-3, -2).contiguous().transpose(-3, -2) if d_strided else d
    q = torch.zeros(1, 32, 64, dtype=torch.complex64).conj().imag if negated else q
    keep = torch.ones(*d.shape[:-2], l_d * 2, dtype=torch.bool)[..., ::2] if mask_strided else torch.ones(
        d.shape[:-1], dtype=torch.bool)
    out = latemax.maxsim(q, d, torch.ones(1, 32, dtype=torch.bool) if q_masked else None, keep if d_masked else None,
                         backend="triton", **options)
    name, grid, args = null.last
    outs = [(x.shape, x.dtype) for x in (out if isinstance(out, tuple) else (out,))]
    return name, grid, outs, [(x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else x for x in args]

cases = [
    dict(), dict(dtype=torch.float16), dict(dtype=torch.float32), dict(dtype=torch.float32, precision="high"),
    dict(n_d=6), dict(l_d=101), dict(offset=1), dict(q_strided=True), dict(d_strided=True), dict(own=True),
    dict(q_masked=True), dict(d_masked=True), dict(d_masked=True, mask_strided=True), dict(normalize=True),
    dict(return_argmax=True), dict(normalize=True, return_argmax=True, d_masked=True), dict(empty_score=-7.5),
    dict(dtype=torch.float32, q_strided=True), dict(dtype=torch.float32, negated=True),
]
slow = []
for case in cases:
    dispatch._prepared.clear()
    slow.append(call(**case))
for case in cases:
    call(**case)
# one form an entry, but for empty_score, which is no part of it, and for the negated view, copied on every call
assert len(dispatch._prepared) == len(cases) - 2, len(dispatch._prepared)
known = dict(dispatch._prepared)
order = list(range(len(cases))) * 3
random.Random(0).shuffle(order)
for i in order:
    assert call(**cases[i]) == slow[i], (cases[i], call(**cases[i]), slow[i])
assert dispatch._prepared == known

# the stream current at the time; no hook, unless one is wanted
null.stream = 77
call()
assert null.given[0] == 77 and not null.given[1]
import triton
hook = lambda *_: None
if hasattr(triton.knobs.runtime.launch_enter_hook, "add"):
    triton.knobs.runtime.launch_enter_hook.add(hook)
else:
    triton.knobs.runtime.launch_enter_hook = hook
call()
assert null.given[0] == 77 and null.given[1]

# another current device: the prepared launch stands back
prepared, _ = next(iter(dispatch._prepared.values()))
prepared.index, torch.cuda.current_device = 1, lambda: 0
assert prepared(None) is None
prepared.index = None
# what is remembered stays bounded
dispatch._prepared.update({i: None for i in range(5000)})
call(n_d=9)
assert len(dispatch._prepared) == 1
print("same", len(order))
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
    rows = run("from benchmarks.suites import host; [print(row) for row in host.steps()]").splitlines()
    assert len(rows) == 15 and "torch.add" in rows[0] and "whole call" in rows[1] and "first training" in rows[-1]


def test_a_remembered_form_is_launched_as_one_met_for_the_first_time():
    assert run(FORMS).split() == ["same", "57"]


RAGGED = """
import torch, latemax
from benchmarks.suites.host import prepare
from latemax.kernels import backward, forward
null, _, _ = prepare()
kernels = [forward.forward_kernel, forward.sum_slots_kernel, backward.grad_q_kernel, backward.grad_d_kernel]

def builds():
    return [len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values()]

for layout in ("varlen", "rerank"):
    train = layout == "varlen"
    latemax.warmup(dim=64, l_q=20, n_q=3, device="cpu", layout=layout, train=train, backend="triton")
    before = builds()
    d = torch.zeros(500, 64, dtype=torch.bfloat16, requires_grad=train)
    # offsets and candidates at any multiple of 8 bytes, aligned or not, and other counts
    for skip, n_q in ((0, 3), (1, 3), (1, 7)):
        cu_d = torch.tensor([0] * skip + [0, 7, 7, 300, 500])[skip:]
        if layout == "varlen":
            cu_q = torch.tensor([0] * skip + [20 * i for i in range(n_q + 1)])[skip:]
            q = torch.zeros(20 * n_q, 64, dtype=torch.bfloat16, requires_grad=True)
            latemax.maxsim_varlen(q, d, cu_q, cu_d, backend="triton").sum().backward()
        else:
            slots = torch.zeros(n_q * 2 + skip, dtype=torch.int64)[skip:].view(n_q, 2)
            latemax.rerank(torch.zeros(n_q, 20, 64, dtype=torch.bfloat16), d, cu_d, slots, backend="triton")
    assert builds() == before, (layout, before, builds())
print("builds", *builds())
"""


def test_ragged_calls_after_warmup_build_nothing():
    assert run(RAGGED).startswith("builds")
