"""The cached launcher hands the driver the arguments of triton's own launch, and builds nothing twice.

The programs run in processes of their own, with a driver that compiles for sm_90 and launches nothing: the interpreter
has no launcher.
"""

import pytest
from common import run_program

pytest.importorskip("triton", reason="the kernels need triton")


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_cached_launches_equal_those_of_triton():
    assert int(run_program("host_launches").split()[-1]) >= 20


def test_the_host_path_is_timed_step_by_step():
    rows = run_program("host_steps").splitlines()
    assert len(rows) == 15 and "torch.add" in rows[0] and "whole call" in rows[1] and "first training" in rows[-1]


def test_a_prepared_launch_equals_a_first_launch():
    assert run_program("host_prepared").split() == ["same", "66"]


def test_ragged_calls_after_warmup_build_nothing():
    assert run_program("host_ragged").startswith("builds")
