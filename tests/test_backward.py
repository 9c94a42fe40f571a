"""Gradients of every backend against float64 autograd through the oracle."""

import pytest
import torch
from common import BACKENDS, SHAPES, assert_exact, exact, plain_torch, problem

import latemax


def gradients(score, q, d, g):
    q, d = q.detach().requires_grad_(), d.detach().requires_grad_()
    return torch.autograd.grad((score(q, d) * g).sum(), (q, d))


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", BACKENDS)
def test_gradients(where, shape, own, normalize):
    backend, device = where
    q, d = problem(shape, own=own, device=device)
    g = torch.randn(shape[:2], generator=torch.Generator().manual_seed(1)).to(device)
    ours = gradients(lambda q, d: latemax.maxsim(q, d, normalize=normalize, backend=backend), q, d, g)
    truth = gradients(lambda q, d: exact(q, d, normalize=normalize), q, d, g)
    plain = gradients(lambda q, d: plain_torch(q, d, normalize), q, d, g)
    for a, b, c in zip(ours, truth, plain, strict=True):
        assert_exact(a, b, c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("where", BACKENDS)
def test_gradient_dtypes(where, dtype, normalize):
    backend, device = where
    q, d = problem((2, 3, 9, 40, 64), dtype=dtype, device=device)
    g = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).to(device)
    ours = gradients(lambda q, d: latemax.maxsim(q, d, normalize=normalize, backend=backend), q, d, g)
    truth = gradients(lambda q, d: exact(q, d, normalize=normalize), q.double(), d.double(), g)
    plain = gradients(lambda q, d: plain_torch(q, d, normalize), q, d, g)
    for x, a, b, c in zip((q, d), ours, truth, plain, strict=True):
        assert a.dtype == x.dtype
        assert_exact(a, b, c)


@pytest.mark.parametrize("where", BACKENDS)
def test_mixed_dtypes_get_gradients_of_their_own_dtype(where):
    backend, device = where
    q, d = problem((2, 2, 4, 20, 32), device=device)
    for q_dtype, d_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float16, torch.float64),
    ):
        a, b = q.to(q_dtype).requires_grad_(), d.to(d_dtype).requires_grad_()
        for normalize in (False, True):
            ours = torch.autograd.grad(latemax.maxsim(a, b, normalize=normalize, backend=backend).sum(), (a, b))
            truth = torch.autograd.grad(exact(a, b, normalize=normalize).sum(), (a, b))
            assert ours[0].dtype == q_dtype and ours[1].dtype == d_dtype
            torch.testing.assert_close(ours[0], truth[0])
            torch.testing.assert_close(ours[1].double(), truth[1].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", BACKENDS)
def test_only_the_side_that_needs_a_gradient_costs_one(where, monkeypatch):
    backend, device = where
    from latemax.ops.backends import blocks, cuda, native, triton_launch

    module = {"triton": triton_launch, "cuda": cuda}.get(backend) or (native if native.status()[0] else blocks)
    seen = []
    original = module.backward
    monkeypatch.setattr(
        module,
        "backward",
        lambda *args: seen.append(tuple(args[-1])) or original(*args),
    )
    cases = [(True, False, False), (False, True, False), (True, True, False), (False, False, True)]
    for needs in cases:
        tensors = (*problem((2, 2, 4, 20, 16), device=device), torch.ones(2, 4, device=device))
        q, d, weights = (x.requires_grad_(needed) for x, needed in zip(tensors, needs, strict=True))
        latemax.maxsim(q, d, q_weights=weights if needs[2] else None, backend=backend).sum().backward()
        assert tuple(x.grad is not None for x in tensors) == needs
    assert seen == cases


@pytest.mark.parametrize("where", BACKENDS)
def test_gradients_through_views_and_squeezed_shapes(where):
    """Expanded and transposed leaves, 2-D sides and pairs get gradients in their own shapes."""
    backend, device = where
    q, d = problem((2, 2, 5, 12, 16), device=device)
    cases = [
        (q, d, lambda q, d: (q[0], d[1])),
        (q, d, lambda q, d: (q.transpose(0, 1), d)),
        (q, d[:1], lambda q, d: (q, d.expand(3, -1, -1))),
        (q[:1], d, lambda q, d: (q.transpose(1, 2).contiguous().transpose(1, 2), d)),
        (q, d, lambda q, d: (q.transpose(1, 2).contiguous().transpose(1, 2), d.unsqueeze(0).expand(2, -1, -1, -1))),
    ]
    for a, b, view in cases:
        truth = gradients(lambda q, d, view=view: exact(*view(q, d)), a.double(), b.double(), 1.0)
        ours = gradients(lambda q, d, view=view: latemax.maxsim(*view(q, d), backend=backend), a, b, 1.0)
        for x, y in zip(ours, truth, strict=True):
            torch.testing.assert_close(x.double(), y, atol=1e-4, rtol=1e-5)
    pairs = gradients(lambda q, d: latemax.maxsim_pairs(q, d, backend=backend), q, d, 1.0)
    truth = gradients(lambda q, d: exact(q, d).diagonal(), q.double(), d.double(), 1.0)
    for x, y in zip(pairs, truth, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("where", BACKENDS)
def test_a_tied_maximum_gives_its_whole_gradient_to_its_argmax(where):
    backend, device = where
    d = torch.ones(3, 4, device=device, requires_grad=True)
    latemax.maxsim(torch.ones(2, 4, device=device), d, backend=backend).backward()
    assert d.grad[0].tolist() == [2.0] * 4 and (d.grad[1:] == 0).all()


@pytest.mark.parametrize("where", BACKENDS)
def test_normalize_below_eps_is_a_division_by_a_constant(where):
    """Norms under 1e-12 are clamped, as torch.nn.functional.normalize does: scores and gradients agree with it."""
    backend, device = where
    q, d = problem((1, 2, 3, 5, 8), device=device)
    q[0, 0] *= 1e-14
    d[0, 0] = 0.0
    d[1] *= 1e-7
    ours = gradients(lambda q, d: latemax.maxsim(q, d, normalize=True, backend=backend), q, d, 1.0)
    truth = gradients(lambda q, d: exact(q, d, normalize=True), q.double(), d.double(), 1.0)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", BACKENDS)
def test_second_derivative_is_refused_in_clear_words(where):
    backend, device = where
    q, d = problem((1, 2, 3, 5, 8), device=device)
    q.requires_grad_(), d.requires_grad_()
    (grad,) = torch.autograd.grad(latemax.maxsim(q, d, backend=backend).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="maxsim has no second derivative"):
        grad.sum().backward()


def test_argmax_carries_no_gradient():
    q, d = problem((1, 2, 3, 5, 8))
    scores, argmax = latemax.maxsim(q.requires_grad_(), d, return_argmax=True)
    assert scores.requires_grad and not argmax.requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", BACKENDS)
def test_a_non_finite_incoming_gradient_reaches_only_the_argmax(where, value):
    """Masked tokens and tokens that are no argmax get exactly 0, whatever g is."""
    backend, device = where
    q, d = problem((2, 2, 3, 9, 8), device=device)
    keep = torch.ones(2, 9, dtype=torch.bool, device=device)
    keep[:, 5:] = False
    for normalize in (False, True):
        a, b = q.clone().requires_grad_(), d.clone().requires_grad_()
        scores, argmax = latemax.maxsim(a, b, None, keep, normalize=normalize, return_argmax=True, backend=backend)
        g = torch.ones_like(scores)
        g[0, 0] = value
        scores.backward(g)
        won = torch.zeros(2, 9, dtype=torch.bool, device=device)
        for document in range(2):
            won[document, argmax[:, document].flatten().long()] = True
        assert (b.grad[~won] == 0).all() and b.grad[1].isfinite().all()
        assert a.grad[1].isfinite().all() and not a.grad[0].isfinite().all()


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("where", BACKENDS)
def test_gradients_of_wide_tokens(where, normalize):
    """More columns than one program of grad_d holds."""
    backend, device = where
    q, d = problem((1, 2, 3, 18, 530), device=device)
    ours = gradients(lambda q, d: latemax.maxsim(q, d, normalize=normalize, backend=backend), q, d, 1.0)
    truth = gradients(lambda q, d: exact(q, d, normalize=normalize), q.double(), d.double(), 1.0)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
