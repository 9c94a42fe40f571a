"""Every tracing and transform mode of torch gives the scores and gradients of plain eager calls."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from common import problem

import latemax
from latemax import MaxSim, maxsim, maxsim_pairs

Q, D = problem((3, 4, 5, 9, 16))
KEEP = torch.arange(9).expand(4, -1) < torch.tensor([9, 3, 1, 0])[:, None]


def traced(function, *args):
    with warnings.catch_warnings():
        # jit.trace is deprecated, and warns of every check on a shape
        warnings.simplefilter("ignore")
        return torch.jit.trace(function, args, check_trace=False)


@pytest.mark.parametrize(
    "function",
    [
        maxsim,
        maxsim_pairs,
        MaxSim(),
        lambda q, d: maxsim(q, d, normalize=True),
        lambda q, d: maxsim(q, d, d_mask=KEEP, empty_score=-1.0),
        lambda q, d: maxsim(q, d, return_argmax=True)[1],
    ],
    ids=["maxsim", "pairs", "module", "normalize", "mask", "argmax"],
)
def test_jit_trace_records_the_operator(function):
    """Traced at one problem and run on another: a graph without the operator returned uninitialised memory."""
    q, d = (Q, D) if function is not maxsim_pairs else (Q, D[:3])
    graph = traced(function, q, d)
    assert "latemax::maxsim" in str(graph.graph) or "latemax::maxsim" in str(graph.inlined_graph)
    torch.testing.assert_close(graph(q + 1, d * 2), function(q + 1, d * 2))


def test_make_fx_records_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda q, d: maxsim(q, d, d_mask=KEEP))(Q, D)
    assert any("latemax.maxsim" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(Q * 2, D), maxsim(Q * 2, D, d_mask=KEEP))


def test_aot_inductor_with_default_arguments(tmp_path):
    """-inf as an argument of the operator was written as a string that the loader refused."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    for empty_score in (-math.inf, 0.0):
        exported = torch.export.export(MaxSim(empty_score=empty_score), (Q, D))
        package = aoti_compile_and_package(exported, package_path=str(tmp_path / f"maxsim{empty_score}.pt2"))
        torch.testing.assert_close(aoti_load_package(package)(Q * 2, D), maxsim(Q * 2, D))


def gradients(function, *tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


def test_vmap_over_tensors_that_require_a_gradient():
    q, d = torch.randn(5, 2, 3, 8), torch.randn(5, 4, 6, 8)
    loop = gradients(lambda q, d: torch.stack([maxsim(a, b) for a, b in zip(q, d, strict=True)]), q, d)
    for dims in ((0, 0), (0, None)):
        other = d if dims[1] == 0 else d[0]
        ours = gradients(lambda q, d, dims=dims: torch.vmap(maxsim, dims)(q, d), q, other)
        if dims[1] is None:
            loop = gradients(lambda q, d: torch.stack([maxsim(a, d) for a in q]), q, other)
        for x, y in zip(ours, loop, strict=True):
            torch.testing.assert_close(x, y)


def test_batched_gradients_and_vectorised_jacobians():
    q = Q[:1].clone().requires_grad_()
    scores = maxsim(q, D)
    rows = torch.eye(4).unsqueeze(1)
    batched = torch.autograd.grad(scores, q, rows, is_grads_batched=True, retain_graph=True)[0]
    single = torch.stack([torch.autograd.grad(scores, q, row, retain_graph=True)[0] for row in rows])
    torch.testing.assert_close(batched, single)
    vectorised = torch.autograd.functional.jacobian(lambda q: maxsim(q, D), Q[:1], vectorize=True)
    torch.testing.assert_close(vectorised, torch.autograd.functional.jacobian(lambda q: maxsim(q, D), Q[:1]))


def test_compiled_autograd():
    from torch._dynamo import compiled_autograd

    q = Q.clone().requires_grad_()
    with compiled_autograd._enable(lambda graph: graph):
        maxsim(q, D).sum().backward()
    torch.testing.assert_close(q.grad, torch.autograd.grad(maxsim(q, D).sum(), q)[0])


def test_functional_call():
    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(16))

        def forward(self, q, d):
            return maxsim(q @ self.weight, d)

    weight = torch.randn(16, 16)
    assert torch.equal(torch.func.functional_call(Scorer(), {"weight": weight}, (Q, D)), maxsim(Q @ weight, D))


def test_a_default_device_does_not_move_cpu_data():
    expected = [maxsim(Q, D), maxsim([*Q], [*D]), maxsim_pairs([*Q], [*D[:3]])]
    torch.set_default_device("meta")
    try:
        ours = [maxsim(Q, D), maxsim([*Q], [*D]), maxsim_pairs([*Q], [*D[:3]])]
    finally:
        torch.set_default_device(None)
    for x, y in zip(ours, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("pool", ["latemax", "torch"])
def test_a_forked_child_scores_on_threads_of_its_own(pool):
    """The parent's OpenMP workers do not exist in a child: waiting for them hung for ever."""
    program = Path(__file__).parent / "programs" / "fork.py"
    done = subprocess.run([sys.executable, program, pool], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("value", [-1e9, -math.inf, -1])
def test_an_additive_mask_is_refused_where_values_may_be_read(value):
    mask = torch.zeros(3, 5, dtype=torch.int32 if value == -1 else torch.float32)
    mask[0, 2] = value
    with pytest.raises(
        ValueError, match=r"q_mask must be nonzero where a token is kept .* additive mask .*`q_mask == 0`"
    ):
        maxsim(Q, D, mask)


def test_a_freed_mask_is_refused():
    keep = torch.ones(4, 9, dtype=torch.bool)
    keep.untyped_storage().resize_(0)
    if not latemax.explain(Q, D).native:
        pytest.skip("the native CPU kernel was not built")
    with pytest.raises(RuntimeError, match="has been freed"):
        maxsim(Q, D, None, keep)
