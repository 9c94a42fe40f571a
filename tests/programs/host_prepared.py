"""A prepared launch hands the driver the arguments of a first launch, whatever ran in between."""

import random

import torch
import triton

import latemax
from benchmarks.suites.host import prepare
from latemax.ops import dispatch

null, _, _ = prepare()


def call(
    dtype=torch.bfloat16,
    n_d=5,
    l_d=100,
    offset=0,
    q_strided=False,
    d_strided=False,
    own=False,
    precision="highest",
    q_masked=False,
    d_masked=False,
    mask_strided=False,
    negated=False,
    d_kind=None,
    q_kind=None,
    **options,
):
    torch.set_float32_matmul_precision(precision)
    q = torch.zeros(1, 32, 64 + offset, dtype=dtype)[..., offset:]
    d = torch.zeros(*((1,) if own else ()), n_d, l_d, 64, dtype=dtype)
    q = torch.zeros(1, 32, 128, dtype=dtype)[..., :64] if q_strided else q
    d = d.transpose(-3, -2).contiguous().transpose(-3, -2) if d_strided else d
    q = torch.zeros(1, 32, 64, dtype=torch.complex64).conj().imag if negated else q
    keep = (
        torch.ones(*d.shape[:-2], l_d * 2, dtype=torch.bool)[..., ::2]
        if mask_strided
        else torch.ones(d.shape[:-1], dtype=torch.bool)
    )
    out = latemax.maxsim(
        q if q_kind is None else latemax.quantize(q, q_kind),
        d if d_kind is None else latemax.quantize(d, d_kind),
        torch.ones(1, 32, dtype=torch.bool) if q_masked else None,
        keep if d_masked else None,
        backend="triton",
        **options,
    )
    name, grid, args = null.last
    outs = [(x.shape, x.dtype) for x in (out if isinstance(out, tuple) else (out,))]
    return name, grid, outs, [(x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else x for x in args]


cases = [
    dict(),
    dict(dtype=torch.float16),
    dict(dtype=torch.float32),
    dict(dtype=torch.float32, precision="high"),
    dict(n_d=6),
    dict(l_d=101),
    dict(offset=1),
    dict(q_strided=True),
    dict(d_strided=True),
    dict(own=True),
    dict(q_masked=True),
    dict(d_masked=True),
    dict(d_masked=True, mask_strided=True),
    dict(normalize=True),
    dict(return_argmax=True),
    dict(normalize=True, return_argmax=True, d_masked=True),
    dict(empty_score=-7.5),
    dict(dtype=torch.float32, q_strided=True),
    dict(dtype=torch.float32, negated=True),
    dict(d_kind="int8", normalize=True),
    dict(d_kind="int8", q_kind="int8", d_masked=True),
    dict(dtype=torch.float32, d_kind="binary", return_argmax=True),
]
slow = []
for case in cases:
    dispatch._prepared.clear()
    slow.append(call(**case))
for case in cases:
    call(**case)
# one entry per form, except empty_score, which is not part of the key, and the negated view, copied on every call
assert len(dispatch._prepared) == len(cases) - 2, len(dispatch._prepared)
known = dict(dispatch._prepared)
order = list(range(len(cases))) * 3
random.Random(0).shuffle(order)
for i in order:
    assert call(**cases[i]) == slow[i], (cases[i], call(**cases[i]), slow[i])
assert dispatch._prepared == known

# the current stream; no hook unless one is set
null.stream = 77
call()
assert null.given[0] == 77 and not null.given[1]


def hook(*_):
    pass


if hasattr(triton.knobs.runtime.launch_enter_hook, "add"):
    triton.knobs.runtime.launch_enter_hook.add(hook)
else:
    triton.knobs.runtime.launch_enter_hook = hook
call()
assert null.given[0] == 77 and null.given[1]

# another current device: the prepared launch does not apply
prepared, _ = next(iter(dispatch._prepared.values()))
prepared.index, torch.cuda.current_device = 1, lambda: 0
assert prepared(None) is None
prepared.index = None
# the number of prepared launches is bounded
dispatch._prepared.update({i: None for i in range(5000)})
call(n_d=9)
assert len(dispatch._prepared) == 1
print("same", len(order))
