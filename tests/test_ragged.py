"""Lists of tensors and jagged nested tensors score as their items do, one by one."""

import pytest
import torch
from common import BACKENDS

import latemax
from latemax import reference


def items(lengths, dim=16, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dim, generator=generator).to(device) for n in lengths]


@pytest.mark.parametrize("where", BACKENDS)
def test_lists(where):
    backend, device = where
    q, d = items([3, 1, 7], device=device), items([5, 130, 1, 40], seed=1, device=device)
    scores, argmax = latemax.maxsim(q, d, return_argmax=True, backend=backend)
    truth, best = reference.maxsim(q, d, return_argmax=True)
    torch.testing.assert_close(scores, truth)
    assert torch.equal(argmax, best)
    one, _ = latemax.maxsim(q[2], d, return_argmax=True, backend=backend)
    torch.testing.assert_close(one, truth[2])
    dense = latemax.maxsim(torch.stack([q[0], q[0]]), d, backend=backend)
    torch.testing.assert_close(dense, truth[[0, 0]])


@pytest.mark.parametrize("where", BACKENDS)
def test_list_masks_and_empty_items(where):
    backend, device = where
    q, d = items([3, 2], device=device), items([5, 0, 4], seed=1, device=device)
    d_mask = [torch.tensor([1, 0, 1, 0, 1], device=device), None, torch.zeros(4, device=device)]
    q_mask = [torch.tensor([True, False, True], device=device), torch.tensor([False, False], device=device)]
    d[0][1] = torch.nan
    scores, argmax = latemax.maxsim(q, d, q_mask, d_mask, empty_score=-9, return_argmax=True, backend=backend)
    assert scores[0, 1:].tolist() == [-9.0, -9.0] and scores[1].tolist() == [0.0, 0.0, 0.0]
    expected = reference.maxsim(q[0][[0, 2]], d[0][[0, 2, 4]])
    torch.testing.assert_close(scores[0, 0], expected)
    assert set(argmax[0, 0].tolist()) <= {-1, 0, 2, 4} and argmax[0, 0, 1] == -1


def test_gradients_reach_every_item():
    q, d = items([3, 6]), items([5, 9, 2], seed=1)
    for x in q + d:
        x.requires_grad_()
    latemax.maxsim(q, d, normalize=True).square().sum().backward()
    ours = [x.grad.clone() for x in q + d]
    for x in q + d:
        x.grad = None
    reference.maxsim(q, d, normalize=True).square().sum().backward()
    for x, grad in zip(q + d, ours, strict=True):
        torch.testing.assert_close(grad, x.grad, atol=1e-5, rtol=1e-4)


def test_pairs_of_lists():
    q, d = items([3, 6]), items([5, 9], seed=1)
    scores = latemax.maxsim_pairs(q, d)
    torch.testing.assert_close(scores, reference.maxsim(q, d).diagonal())
    with pytest.raises(ValueError, match="same b"):
        latemax.maxsim_pairs(q, d[:1])


def test_jagged_nested_tensors():
    q, d = items([3, 6]), items([5, 9, 2], seed=1)
    nested_q = torch.nested.nested_tensor(q, layout=torch.jagged)
    nested_d = torch.nested.nested_tensor(d, layout=torch.jagged, requires_grad=True)
    scores, argmax = latemax.maxsim(nested_q, nested_d, return_argmax=True)
    truth, best = reference.maxsim(q, d, return_argmax=True)
    torch.testing.assert_close(scores.detach(), truth)
    assert torch.equal(argmax, best)
    scores.sum().backward()
    assert nested_d.grad is not None and nested_d.grad.values().isfinite().all()
    strided = torch.nested.nested_tensor(d)
    with pytest.raises(
        TypeError, match=r"d must be a dense tensor, a list or a jagged nested tensor, got layout torch\.strided"
    ):
        latemax.maxsim(q, strided)


def test_lists_are_not_padded(monkeypatch):
    """What reaches the operator is the real tokens; a nested tensor's are where they were."""
    from latemax.ops import operator

    q, d = items([3, 6]), items([5, 9, 2], seed=1)
    nested = torch.nested.nested_tensor(d, layout=torch.jagged)
    seen = []
    real = operator.maxsim
    monkeypatch.setattr(operator, "maxsim", lambda args, *rest: seen.append(args) or real(args, *rest))
    latemax.maxsim(q, nested)
    assert seen[0].q.tokens.shape == (9, 16) and seen[0].d.tokens.shape == (16, 16)
    assert seen[0].d.tokens.data_ptr() == nested.values().data_ptr()
    assert latemax.explain(q, d).backend == "cpu"


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_nested_tensors_with_holes(masked):
    """Items that do not touch (a nested tensor with lengths) score as a list of them."""
    values = torch.randn(12, 16, generator=torch.Generator().manual_seed(7))
    starts, lengths = torch.tensor([0, 5, 12]), torch.tensor([3, 6])
    nested = torch.nested.nested_tensor_from_jagged(values, starts, lengths)
    apart = [values[0:3], values[5:11]]
    mask = [torch.tensor([1, 0, 1]), None] if masked else None
    for q, d, masks in ((nested, apart, (mask, None)), (apart, nested, (None, mask))):
        ours = latemax.maxsim(q, d, *masks, return_argmax=True)
        theirs = latemax.maxsim(apart, apart, *masks, return_argmax=True)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
