"""A cached launch hands the driver the arguments of triton's own launch, and builds nothing a second time."""

import torch

import latemax
from benchmarks.suites.host import prepare
from latemax.kernels.forward import forward_kernel
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
    dict(n_q=1, n_d=5, l_q=32, l_d=100),
    dict(n_q=3, n_d=2, l_q=20, l_d=7, masked=True),
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
# other numbers of documents and tokens, 1 and multiples of 16 among them, run on the existing builds: a tile for short
# documents, one for long ones
for l_d in (100, 500):
    call(n_q=1, n_d=5, l_q=32, l_d=l_d)
built = len(triton_launch._built)
for n_d, l_d in ((1, 1), (16, 16), (7, 1024), (1000, 3)):
    call(n_q=1, n_d=n_d, l_q=32, l_d=l_d)
assert len(triton_launch._built) == built
# strides beyond int32 go through triton's own launch, to a build with 64-bit strides, and are not kept
far = torch.zeros(1, 9, 64, dtype=torch.bfloat16).as_strided((1, 9, 64), (1 << 32, 64, 1))
q = torch.zeros(1, 32, 64, dtype=torch.bfloat16)
latemax.maxsim(q, far, backend="triton")
assert null.last[2][forward_kernel.arg_names.index("d_stride_k")] == 1 << 32 and len(triton_launch._built) == built
latemax.maxsim(q, far.contiguous(), backend="triton")
assert len(triton_launch._built) == built
print("launches", null.launches)
