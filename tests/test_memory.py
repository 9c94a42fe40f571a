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
    "shape, dtype, train, similarities",
    [
        (dict(n_q=1, n_d=1000, l_q=32, l_d=512), "torch.float32", False, 66),
        (dict(n_q=64, n_d=64, l_q=32, l_d=512), "torch.float32", False, 268),
        (dict(n_q=1, n_d=400, l_q=32, l_d=1024), "torch.bfloat16", False, 52),
        # the gradients themselves besides: 131 MB in bfloat16; a float32 copy of them would be 262 MB more
        (dict(n_q=1, n_d=1000, l_q=1, l_d=512), "torch.bfloat16", True, 1000),
    ],
    ids=["one query", "in-batch", "bfloat16", "training"],
)
def test_peak_extra_memory(shape, dtype, train, similarities):
    """``similarities``: MB that [n_q, n_d, l_q, l_d] in float32 would take; the path may use 64 MB beside gradients."""
    program = PROGRAM.format(**shape, dtype=dtype, train=train)
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    gradients = 2 * shape["n_d"] * shape["l_d"] * 128 / 1e6 if train else 0
    assert int(done.stdout) / 1000 < min(64, similarities) + gradients
