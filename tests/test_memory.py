"""The CPU path never holds the similarities of the whole problem."""

import pathlib
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch, latemax
torch.manual_seed(0)
q, d = torch.randn({n_q}, {l_q}, 128), torch.randn({n_d}, {l_d}, 128, dtype={dtype})
for x in (q, d): x.requires_grad_({train})
small = latemax.maxsim(q[:1, :2], d[:1, :2])
if {train}: small.sum().backward()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = latemax.maxsim(q, d)
if {train}: scores.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
"""


@pytest.mark.parametrize(
    "shape, dtype, similarities",
    [
        (dict(n_q=1, n_d=1000, l_q=32, l_d=512), "torch.float32", 66),
        (dict(n_q=64, n_d=64, l_q=32, l_d=512), "torch.float32", 268),
        (dict(n_q=1, n_d=400, l_q=32, l_d=1024), "torch.bfloat16", 52),
    ],
    ids=["one query", "in-batch", "bfloat16"],
)
def test_peak_extra_memory(shape, dtype, similarities):
    """``similarities``: MB that [n_q, n_d, l_q, l_d] in float32 would take; the path may use 64 MB in all."""
    program = PROGRAM.format(**shape, dtype=dtype, train=False)
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout) / 1000 < min(64, similarities)
