"""The CPU path never holds the similarities of the whole problem."""

import pytest
from common import run_program


@pytest.mark.parametrize(
    "shape, dtype, train, similarities",
    [
        (dict(n_q=1, n_d=1000, l_q=32, l_d=512), "float32", False, 66),
        (dict(n_q=64, n_d=64, l_q=32, l_d=512), "float32", False, 268),
        (dict(n_q=1, n_d=400, l_q=32, l_d=1024), "bfloat16", False, 52),
        # the gradients need 131 MB in bfloat16; a float32 copy of them would need 262 MB more
        (dict(n_q=1, n_d=1000, l_q=1, l_d=512), "bfloat16", True, 1000),
    ],
    ids=["one query", "in-batch", "bfloat16", "training"],
)
def test_peak_extra_memory(shape, dtype, train, similarities):
    """``similarities``: size in MB of [n_q, n_d, l_q, l_d] in float32; the path may use 64 MB plus the gradients."""
    sizes = ",".join(str(shape[name]) for name in ("n_q", "n_d", "l_q", "l_d"))
    kilobytes = int(run_program("peak_memory", sizes, dtype, *(["train"] if train else [])))
    gradients = 2 * shape["n_d"] * shape["l_d"] * 128 / 1e6 if train else 0
    assert kilobytes / 1000 < min(64, similarities) + gradients
