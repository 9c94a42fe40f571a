"""Prints the kilobytes that one call adds to the peak memory of the process.

python -m tests.programs.peak_memory N_Q,N_D,L_Q,L_D DTYPE [train]
"""

import resource
import sys

import torch

import latemax

n_q, n_d, l_q, l_d = map(int, sys.argv[1].split(","))
train = sys.argv[3:] == ["train"]
torch.manual_seed(0)
q = torch.randn(n_q, l_q, 128).requires_grad_(train)
d = torch.randn(n_d, l_d, 128, dtype=getattr(torch, sys.argv[2])).requires_grad_(train)


def call(q: torch.Tensor, d: torch.Tensor) -> None:
    scores = latemax.maxsim(q, d)
    if train:
        scores.sum().backward()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


call(q[:1, :2], d[:1, :2])
before = peak()
call(q, d)
print(peak() - before)
