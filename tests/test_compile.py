"""torch.compile(fullgraph=True), export, opcheck, FakeTensor, functorch and autocast see one operator."""

import pytest
import torch
from common import BACKENDS, exact, masks, problem
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import latemax

op = torch.ops.latemax.maxsim


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "train"])
@pytest.mark.parametrize("where", BACKENDS)
def test_opcheck(where, train, own):
    backend, device = where
    q, d = problem((2, 3, 4, 9, 16), own=own, device=device)
    q_mask, d_mask = masks(q, d)
    q.requires_grad_(train), d.requires_grad_(train)
    for normalize, q_keep, d_keep in ((False, None, None), (True, q_mask, d_mask)):
        # with gradients, opcheck covers the backward operator too
        torch.library.opcheck(op, (q, d, q_keep, d_keep, normalize, -1.0, train, backend))


def test_opcheck_backward():
    q, d = problem((2, 3, 4, 9, 16))
    _, argmax = latemax.maxsim(q, d, return_argmax=True)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.latemax.maxsim_backward, (torch.randn(2, 3), q, d, argmax, False, *needs, "auto")
        )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def loss(q, d, q_mask, d_mask):
        scores, argmax = latemax.maxsim(q * 2, d, q_mask, d_mask, normalize=True, return_argmax=True)
        return torch.logsumexp(scores, -1).sum(), argmax

    # static: another shape would only compile the same code again, which takes 7 s
    for shape in ((2, 3, 4, 9, 16), (3, 4, 5, 17, 16), (5, 2, 8, 30, 16))[: None if dynamic else 1]:
        q, d = problem(shape)
        q_mask, d_mask = masks(q, d, keep=0.9)
        d_mask[:, 1] = True
        grads = []
        for run in (loss, loss._torchdynamo_orig_callable if hasattr(loss, "_torchdynamo_orig_callable") else loss):
            a, b = q.clone().requires_grad_(), d.clone().requires_grad_()
            value, argmax = run(a, b, q_mask, d_mask)
            value.backward()
            grads.append((value.detach(), argmax, a.grad, b.grad))
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y)


def test_compile_of_every_shape_of_argument():
    torch._dynamo.reset()
    q, d = problem((2, 3, 4, 9, 16))
    cases = [
        lambda q, d: latemax.maxsim(q[0], d[0]),
        lambda q, d: latemax.maxsim(q[0], d),
        lambda q, d: latemax.maxsim(q, d[0]),
        lambda q, d: latemax.maxsim(q, d.expand(2, 3, 9, 16)),
        lambda q, d: latemax.maxsim_pairs(q, d[:2]),
        lambda q, d: latemax.maxsim([q[0], q[1, :2]], [d[0], d[1, :5]]),
        lambda q, d: latemax.MaxSim(normalize=True)(q, d),
    ]
    for case in cases:
        torch.testing.assert_close(torch.compile(case, fullgraph=True)(q, d), case(q, d))


def test_errors_survive_compilation():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="same dim"):
        torch.compile(latemax.maxsim, fullgraph=True)(torch.ones(1, 2, 4), torch.ones(1, 2, 5))


def test_export_with_dynamic_documents():
    q, d = problem((2, 3, 4, 9, 16))
    program = torch.export.export(
        latemax.MaxSim(), (q, d), dynamic_shapes=({}, {0: torch.export.Dim("n_d"), 1: torch.export.Dim("l_d")})
    )
    assert "latemax.maxsim" in str(program.graph)
    q, d = problem((2, 7, 4, 31, 16), seed=3)
    torch.testing.assert_close(program.module()(q, d), latemax.maxsim(q, d))


def test_fake_tensors_give_shapes_and_dtypes_without_running():
    with FakeTensorMode():
        q, d = torch.empty(2, 4, 8, dtype=torch.bfloat16), torch.empty(2, 5, 9, 8, dtype=torch.float64)
        scores, argmax = latemax.maxsim(q, d, return_argmax=True)
        assert scores.shape == (2, 5) and scores.dtype == torch.float64
        assert argmax.shape == (2, 5, 4) and argmax.dtype == torch.int32
        assert type(scores).__name__ == "FakeTensor"
    meta = latemax.maxsim(torch.empty(4, 8), torch.empty(5, 9, 8))
    assert meta.shape == (5,)


@pytest.mark.parametrize("where", BACKENDS)
def test_autocast_changes_nothing(where):
    """Tokens are scored in their own dtype; autocast rounds no similarity."""
    backend, device = where
    q, d = problem((2, 3, 4, 9, 16), device=device)
    q.requires_grad_(), d.requires_grad_()
    plain = latemax.maxsim(q, d, normalize=True, backend=backend)
    grads = torch.autograd.grad(plain.sum(), (q, d))
    with torch.autocast(device, dtype=torch.bfloat16):
        scores = latemax.maxsim(q, d, normalize=True, backend=backend)
        assert scores.dtype == torch.float32 and torch.equal(scores, plain)
        for a, b in zip(torch.autograd.grad(scores.sum(), (q, d)), grads, strict=True):
            assert torch.equal(a, b)


def test_autocast_does_not_change_the_oracle():
    q, d = problem((2, 3, 4, 9, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = latemax.maxsim(q, d, backend="reference")
    assert scores.dtype == torch.float32 and torch.equal(scores, latemax.maxsim(q, d, backend="reference"))


def test_compile_under_autocast():
    torch._dynamo.reset()
    q, d = problem((2, 3, 4, 9, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = torch.compile(latemax.maxsim, fullgraph=True)(q, d)
    torch.testing.assert_close(scores, exact(q, d).float())


def test_vmap_loops_over_the_operator():
    q, d = torch.randn(3, 2, 4, 8), torch.randn(5, 9, 8)
    mapped = torch.func.vmap(latemax.maxsim, in_dims=(0, None))(q, d)
    torch.testing.assert_close(mapped, torch.stack([latemax.maxsim(x, d) for x in q]))


def test_forward_mode_is_refused_not_dropped():
    q, d = problem((1, 2, 3, 5, 8))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: latemax.maxsim(q, d), (q,), (torch.ones_like(q),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        latemax.maxsim(forward_ad.make_dual(q, torch.ones_like(q)), d)


def test_functional_gradients_are_refused_in_clear_words():
    q, d = problem((1, 2, 3, 5, 8))
    with pytest.raises(NotImplementedError, match=r"not under torch\.func\.grad; use torch\.autograd\.grad"):
        torch.func.grad(lambda q: latemax.maxsim(q, d).sum())(q)


def test_second_derivative_is_refused_through_the_operator():
    torch._dynamo.reset()
    q, d = problem((1, 2, 3, 5, 8))
    q.requires_grad_()
    scores, _ = op(q, d, None, None, False, 0.0, True, "auto")
    (grad,) = torch.autograd.grad(scores.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="maxsim has no second derivative"):
        grad.sum().backward()


def test_the_operator_raises_if_it_needs_the_argmax():
    q, d = problem((1, 2, 3, 5, 8))
    with pytest.raises(RuntimeError, match="argmax=True where a gradient is needed"):
        op(q.requires_grad_(), d, None, None, False, 0.0, False, "auto")


def test_eager_calls_bypass_the_dispatcher(monkeypatch):
    """Plain tensors go straight to the launcher; the operator is for tracing and subclasses."""
    from latemax.ops import operator

    def forbidden(*_):
        raise AssertionError("went through the dispatcher")

    q, d = problem((1, 2, 3, 5, 8))
    monkeypatch.setattr(operator.torch.ops.latemax, "maxsim", forbidden)
    latemax.maxsim(q, d)
    latemax.maxsim(torch.nn.Parameter(q), d).sum().backward()
