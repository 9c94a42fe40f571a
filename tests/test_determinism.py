"""The same call gives the same bits, and leaves its inputs and the global state unchanged."""

import pytest
import torch
from common import BACKENDS, masks, problem

import latemax


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("where", BACKENDS)
def test_forward_and_backward_repeat_bit_for_bit(where, normalize):
    backend, device = where
    q, d = problem((6, 3, 8, 40, 32), device=device)
    q_mask, d_mask = masks(q, d)
    d_mask[:, 1] = True
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            a, b = q.clone().requires_grad_(), d.clone().requires_grad_()
            scores = latemax.maxsim(a, b, q_mask, d_mask, normalize=normalize, backend=backend)
            scores.square().sum().backward()
            runs.append((scores.detach(), a.grad, b.grad))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        for x, y in zip(runs[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("where", BACKENDS)
def test_inputs_are_left_as_they_were(where):
    backend, device = where
    q, d = problem((2, 3, 8, 40, 32), device=device)
    q_mask, d_mask = masks(q, d)
    before = [x.clone() for x in (q, d, q_mask, d_mask)]
    latemax.maxsim(
        q.requires_grad_(), d.requires_grad_(), q_mask, d_mask, normalize=True, backend=backend
    ).sum().backward()
    for x, y in zip((q, d, q_mask, d_mask), before, strict=True):
        assert torch.equal(x, y)


def test_inference_mode_and_no_grad():
    q, d = problem((2, 3, 8, 40, 32))
    q.requires_grad_()
    expected = latemax.maxsim(q, d).detach()
    with torch.inference_mode():
        assert torch.equal(latemax.maxsim(q, d), expected)
    with torch.no_grad():
        assert not latemax.maxsim(q, d).requires_grad
