"""NaN and infinity at valid tokens: their scores become NaN or inf as in torch.amax, and no other score does."""

import math

import pytest
import torch
from common import BACKENDS, exact, problem

import latemax


@pytest.mark.parametrize("position", [0, 5, 128, 139], ids=["first", "inside", "second tile", "tail"])
@pytest.mark.parametrize("where", BACKENDS)
def test_nan_in_a_document_makes_its_scores_nan_and_no_others(where, position):
    backend, device = where
    q, d = problem((3, 3, 5, 140, 16), device=device)
    d[1, position, 3] = math.nan
    scores, argmax = latemax.maxsim(q, d, return_argmax=True, backend=backend)
    assert scores[:, 1].isnan().all()
    torch.testing.assert_close(scores[:, [0, 2]], exact(q, d)[:, [0, 2]].float(), atol=1e-4, rtol=1e-5)
    assert (argmax[:, 1] == position).all()


@pytest.mark.parametrize("where", BACKENDS)
def test_nan_in_a_query_makes_its_scores_nan_and_no_others(where):
    backend, device = where
    q, d = problem((3, 2, 5, 20, 16), device=device)
    q[1, 2] = math.nan
    scores = latemax.maxsim(q, d, backend=backend)
    assert scores[1].isnan().all() and scores[[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("where", BACKENDS)
def test_infinite_similarities(where, value):
    backend, device = where
    q = torch.ones(1, 2, 4, device=device)
    d = torch.zeros(2, 3, 4, device=device)
    d[0, 1, 0] = value
    d[1, :, 0] = value
    scores, argmax = latemax.maxsim(q, d, return_argmax=True, backend=backend)
    truth, best = exact(q, d, return_argmax=True)
    assert torch.equal(scores.double(), truth) and torch.equal(argmax, best)


@pytest.mark.parametrize("where", BACKENDS)
def test_minus_infinity_everywhere_still_has_a_valid_argmax(where):
    backend, device = where
    q = torch.ones(1, 1, 1, device=device)
    d = torch.full((1, 140, 1), -math.inf, device=device)
    keep = torch.zeros(1, 140, device=device)
    keep[0, 7:] = 1
    d[0, :7] = 5.0
    scores, argmax = latemax.maxsim(q, d, None, keep, return_argmax=True, backend=backend)
    assert scores.item() == -math.inf and argmax.item() == 7


@pytest.mark.parametrize("where", BACKENDS)
def test_values_beyond_half_precision_are_summed_in_float32(where):
    """60 similarities of 60,000 sum to 3.6 million: float16 would have overflowed at 65,504."""
    backend, device = where
    q = torch.full((1, 60, 1), 300.0, device=device, dtype=torch.float16)
    d = torch.full((1, 3, 1), 200.0, device=device, dtype=torch.float16)
    assert latemax.maxsim(q, d, backend=backend).item() == pytest.approx(3.6e6)


@pytest.mark.parametrize("where", BACKENDS)
def test_denormals(where):
    backend, device = where
    q, d = torch.full((1, 1, 1), 1e-20, device=device), torch.full((1, 2, 1), 1e-19, device=device)
    assert latemax.maxsim(q, d, backend=backend).item() == pytest.approx(1e-39, rel=1e-4)


@pytest.mark.parametrize("where", BACKENDS)
def test_nan_gradient_reaches_only_the_tokens_of_its_pair(where):
    """A NaN score has a NaN gradient; the gradients of documents that met no NaN stay finite."""
    backend, device = where
    q, d = problem((1, 2, 3, 20, 8), device=device)
    d[0, 4] = math.nan
    d.requires_grad_()
    q.requires_grad_()
    scores = latemax.maxsim(q, d, backend=backend)
    scores[:, 1].sum().backward()
    assert d.grad[1].isfinite().all() and d.grad[0].isfinite().all()
    # the document with the NaN has an incoming gradient of 0: 0 · NaN, as in torch
    assert q.grad.isnan().any() and (d.grad[0] == 0).all()
