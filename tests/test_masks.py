"""Masked tokens influence nothing, whatever their values; rules for those without a valid token."""

import math

import pytest
import torch
from common import BACKENDS, SHAPES, assert_argmax, exact, masks, problem

import latemax


def poisoned(q, d, q_mask, d_mask):
    """NaN and both infinities in every masked token."""
    q, d = q.clone(), d.clone()
    poison = torch.tensor([math.nan, math.inf, -math.inf], device=q.device, dtype=q.dtype)
    for x, keep in ((q, q_mask), (d, d_mask)):
        out = (~keep).nonzero(as_tuple=True)
        x[out] = poison[torch.arange(len(out[0]), device=x.device) % 3].unsqueeze(-1)
    return q, d


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("where", BACKENDS)
def test_poisoned_masked_tokens(where, shape, own, normalize):
    backend, device = where
    clean_q, clean_d = problem(shape, own=own, device=device)
    q_mask, d_mask = masks(clean_q, clean_d)
    q, d = poisoned(clean_q, clean_d, q_mask, d_mask)
    q.requires_grad_(), d.requires_grad_()
    scores, argmax = latemax.maxsim(q, d, q_mask, d_mask, normalize=normalize, return_argmax=True, backend=backend)
    torch.testing.assert_close(
        scores, exact(clean_q, clean_d, q_mask, d_mask, normalize=normalize).float(), atol=1e-4, rtol=1e-5
    )
    assert_argmax(argmax, clean_q, clean_d, q_mask, d_mask, normalize)
    scores[scores.isfinite()].sum().backward()
    for x, keep in ((q, q_mask), (d, d_mask)):
        assert (x.grad[~keep] == 0).all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", BACKENDS)
def test_mask_dtypes_compare_with_zero(where, dtype):
    """0.5 keeps, 3 keeps: the rule is != 0 (negative values are refused, see test_transforms)."""
    backend, device = where
    q, d = problem((2, 3, 5, 20, 16), device=device)
    q_mask, d_mask = masks(q, d)
    values = {torch.float32: 0.5, torch.bfloat16: 0.25, torch.int64: 3}.get(dtype, 1)
    as_dtype = [(m.to(torch.float32) * values).to(dtype) for m in (q_mask, d_mask)]
    ours = latemax.maxsim(q, d, *as_dtype, backend=backend)
    assert torch.equal(ours, latemax.maxsim(q, d, q_mask, d_mask, backend=backend))


@pytest.mark.parametrize("where", BACKENDS)
def test_document_without_a_valid_token(where):
    backend, device = where
    q, d = problem((2, 3, 5, 20, 16), device=device)
    q.requires_grad_(), d.requires_grad_()
    d_mask = torch.ones(3, 20, dtype=torch.bool, device=device)
    d_mask[1] = False
    scores, argmax = latemax.maxsim(q, d, None, d_mask, return_argmax=True, backend=backend)
    assert (scores[:, 1] == -math.inf).all() and scores[:, [0, 2]].isfinite().all()
    assert (argmax[:, 1] == -1).all()
    # a softmax over scores gives such a document a gradient, NaN at worst: none of it reaches the tokens
    scores.backward(torch.tensor([[1.0, math.nan, 1.0]] * 2, device=device))
    assert (d.grad[1] == 0).all() and q.grad.isfinite().all() and d.grad.isfinite().all()
    custom = latemax.maxsim(q, d, None, d_mask, empty_score=-3, backend=backend)
    assert custom[:, 1].tolist() == [-3.0, -3.0]


@pytest.mark.parametrize("l_q", [5, 140], ids=["one chunk", "two chunks"])
@pytest.mark.parametrize("where", BACKENDS)
def test_empty_query_scores_zero_even_against_an_empty_document(where, l_q):
    backend, device = where
    q, d = problem((3, 2, l_q, 20, 16), device=device)
    q_mask = torch.ones(3, l_q, device=device)
    q_mask[1] = 0
    q_mask[2, : l_q - 1] = 0  # its only token is in the last chunk
    d_mask = torch.ones(2, 20, device=device)
    d_mask[0] = 0
    scores, argmax = latemax.maxsim(q, d, q_mask, d_mask, empty_score=-5.0, return_argmax=True, backend=backend)
    truth, best = exact(q, d, q_mask, d_mask, empty_score=-5.0, return_argmax=True)
    torch.testing.assert_close(scores, truth.float(), atol=1e-4, rtol=1e-5)
    assert scores[1].tolist() == [0.0, 0.0] and scores[0, 0] == -5.0 and scores[2, 0] == -5.0
    assert torch.equal(argmax, best)


@pytest.mark.parametrize("where", BACKENDS)
def test_masks_with_unusual_strides(where):
    backend, device = where
    q, d = problem((2, 3, 8, 40, 32), own=True, device=device)
    q_mask, d_mask = masks(q, d)
    strange_q = q_mask.t().contiguous().t()
    strange_d = d_mask.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    expanded = d_mask[:1].expand(2, -1, -1)
    assert torch.equal(
        latemax.maxsim(q, d, strange_q, strange_d, backend=backend),
        latemax.maxsim(q, d, q_mask, d_mask, backend=backend),
    )
    assert torch.equal(
        latemax.maxsim(q, d, None, expanded, backend=backend),
        latemax.maxsim(q, d, None, expanded.contiguous(), backend=backend),
    )


@pytest.mark.parametrize("side", ["front", "middle", "back"])
@pytest.mark.parametrize("where", BACKENDS)
def test_whole_masked_tiles(where, side):
    backend, device = where
    q, d = problem((1, 2, 6, 420, 16), device=device)
    keep = torch.ones(2, 420, dtype=torch.bool, device=device)
    keep[0, {"front": slice(0, 270), "middle": slice(5, 400), "back": slice(11, 420)}[side]] = False
    d[0][~keep[0]] = 1e6
    scores, argmax = latemax.maxsim(q, d, None, keep, return_argmax=True, backend=backend)
    truth, best = exact(q, d, None, keep, return_argmax=True)
    torch.testing.assert_close(scores, truth.float(), atol=1e-4, rtol=1e-5)
    assert torch.equal(argmax, best)
