"""Ragged calls, and bounds, after warmup run on the builds that it made."""

import torch

import latemax
from benchmarks.suites.host import prepare
from latemax.bounds import bound_corpus
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
    # offsets and candidates at any multiple of 8 bytes, aligned to 16 or not, and other counts
    for skip, n_q in ((0, 3), (1, 3), (1, 7)):
        d_offsets = torch.tensor([0] * skip + [0, 7, 7, 300, 500])[skip:]
        if layout == "varlen":
            q_offsets = torch.tensor([0] * skip + [20 * i for i in range(n_q + 1)])[skip:]
            q = torch.zeros(20 * n_q, 64, dtype=torch.bfloat16, requires_grad=True)
            latemax.maxsim_varlen(q, d, q_offsets, d_offsets, backend="triton").sum().backward()
        else:
            slots = torch.zeros(n_q * 2 + skip, dtype=torch.int64)[skip:].view(n_q, 2)
            latemax.rerank(torch.zeros(n_q, 20, 64, dtype=torch.bfloat16), d, d_offsets, slots, backend="triton")
    assert builds() == before, (layout, before, builds())
latemax.warmup(dim=64, l_q=20, n_q=3, device="cpu", normalize=True, bounds=True, backend="triton")
before = builds()
for n_d, l_d in ((1, 1), (16, 16), (7, 1024), (3, 300)):
    codes = latemax.quantize(torch.zeros(n_d, l_d, 64))
    q = torch.zeros(3, 20, 64, dtype=torch.bfloat16)
    latemax.maxsim_bounds(q, codes, normalize=True, backend="triton")
assert builds() == before, ("bounds", before, builds())
latemax.warmup(dim=64, l_q=20, n_q=3, device="cpu", layout="corpus", backend="triton")
latemax.warmup(dim=64, l_q=20, n_q=3, device="cpu", layout="corpus", normalize=True, bounds=True, backend="triton")
before = builds()
q = torch.zeros(3, 20, 64, dtype=torch.bfloat16)
for n_d, l_d in ((1, 1), (7, 1024), (3, 300)):
    tokens, offsets = torch.zeros(n_d * l_d, 64), torch.arange(n_d + 1) * l_d
    latemax.topk(q, (tokens.bfloat16(), offsets), 1, backend="triton")
    for coarse in (True, False):
        codes = latemax.quantize(tokens)
        bound_corpus(q, codes, offsets, normalize=True, coarse=coarse, backend="triton")
assert builds() == before, ("corpus", before, builds())
print("builds", *builds())
