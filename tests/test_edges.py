"""Empty axes, and sizes around every boundary of the tiles."""

import math

import pytest
import torch
from common import BACKENDS, assert_exact, exact, plain_torch, problem

import latemax


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("empty", ["n_q", "n_d", "l_d"])
@pytest.mark.parametrize("where", BACKENDS)
def test_empty_axes(where, empty, own):
    backend, device = where
    sizes = dict(n_q=2, n_d=3, l_q=4, l_d=5, dim=8) | {empty: 0}
    n_q, n_d = sizes["n_q"], sizes["n_d"]
    q, d = problem(tuple(sizes.values()), own=own, device=device)
    q.requires_grad_(), d.requires_grad_()
    scores, argmax = latemax.maxsim(q, d, return_argmax=True, backend=backend)
    assert scores.shape == (n_q, n_d) and argmax.shape == (n_q, n_d, 4)
    assert (scores == -math.inf).all() and (argmax == -1).all()
    scores.sum().backward()
    assert q.grad.shape == q.shape and (q.grad == 0).all() and d.grad.shape == d.shape
    filled = latemax.maxsim(q, d, empty_score=1.5, normalize=True, backend=backend)
    assert (filled == 1.5).all()


@pytest.mark.parametrize("where", BACKENDS)
def test_empty_pairs(where):
    backend, device = where
    q, d = problem((0, 0, 4, 5, 8), device=device)
    assert latemax.maxsim_pairs(q, d, backend=backend).shape == (0,)


@pytest.mark.parametrize("dim", [1, 2, 15, 17, 65, 96, 513])
@pytest.mark.parametrize("where", BACKENDS)
def test_dims(where, dim):
    backend, device = where
    q, d = problem((2, 2, 3, 19, dim), device=device)
    q.requires_grad_(), d.requires_grad_()
    for normalize in (False, True):
        scores = latemax.maxsim(q, d, normalize=normalize, backend=backend)
        assert_exact(scores, exact(q, d, normalize=normalize), plain_torch(q, d, normalize))
        grads = torch.autograd.grad(scores.sum(), (q, d))
        truth = torch.autograd.grad(exact(q, d, normalize=normalize).sum(), (q, d))
        for a, b in zip(grads, truth, strict=True):
            torch.testing.assert_close(a, b.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("l_d", [1, 15, 16, 63, 64, 65, 127, 128, 129, 256, 513])
@pytest.mark.parametrize("where", BACKENDS)
def test_document_lengths_around_tile_boundaries(where, l_d):
    backend, device = where
    q, d = problem((1, 1, 3, l_d, 16), device=device)
    d[0, -1] = 10 * q[0, 0]  # the last token must be seen
    scores, argmax = latemax.maxsim(q, d, return_argmax=True, backend=backend)
    assert_exact(scores, exact(q, d), plain_torch(q, d))
    assert argmax[0, 0, 0] == l_d - 1


@pytest.mark.parametrize("l_q", [1, 15, 16, 17, 31, 33, 64, 65, 127, 129, 257])
@pytest.mark.parametrize("n_q", [1, 3])
@pytest.mark.parametrize("where", BACKENDS)
def test_query_lengths_around_tile_boundaries(where, n_q, l_q):
    backend, device = where
    q, d = problem((n_q, 2, l_q, 9, 16), device=device)
    q[:, -1] *= 50
    scores, argmax = latemax.maxsim(q, d, return_argmax=True, backend=backend)
    truth, best = exact(q, d, return_argmax=True)
    assert_exact(scores, truth, plain_torch(q, d))
    assert torch.equal(argmax, best)


@pytest.mark.parametrize("where", BACKENDS)
def test_outputs_are_written_whole(where, monkeypatch):
    """Outputs allocated full of NaN and -99: an element that no program writes would show."""
    backend, device = where
    from latemax.ops import dispatch

    def poisoned(*args, allocate=dispatch.allocate):
        out = allocate(*args)
        out.scores.fill_(math.nan), out.argmax.fill_(-99)
        return out

    monkeypatch.setattr(dispatch, "allocate", poisoned)
    q, d = problem((5, 3, 33, 70, 16), device=device)
    scores, argmax = latemax.maxsim(q, d, return_argmax=True, backend=backend)
    assert scores.isfinite().all() and ((argmax >= 0) & (argmax < 70)).all()
    cu_q, cu_d = torch.tensor([0, 33, 165], device=device), torch.tensor([0, 70, 71, 210], device=device)
    scores, argmax = latemax.maxsim_varlen(
        q.flatten(0, 1), d.flatten(0, 1), cu_q, cu_d, return_argmax=True, backend=backend
    )  # fmt: skip
    assert scores.isfinite().all() and ((argmax >= 0) & (argmax < 139)).all()
