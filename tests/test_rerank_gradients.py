"""Gradients of a corpus whose documents are named by candidates, by the Triton kernels, from a given argmax."""

import pytest
import torch
from common import TRITON_DEVICE, problem, run_backward

pytest.importorskip("triton", reason="the kernels need triton")

from latemax.ops.backends import gather, triton
from latemax.ops.problem import Batch, Needs, Side

LENGTHS = [0, 5, 70, 33, 1, 0]
# the same document for several queries and twice for one; empty ones, empty slots; no candidate names document 4
CANDIDATES = [[2, 1, 2, -1], [3, 0, 2, 5], [-1, -1, -1, 2]]


def case(dim=16, l_q=9, n_q=3, after=0):
    """(q, d, offsets, candidates, argmax, g); ``after``: tokens after the last document."""
    q, d = problem((n_q, 1, l_q, sum(LENGTHS) + after, dim), device=TRITON_DEVICE)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    candidates = torch.tensor(CANDIDATES).repeat(-(-n_q // 3), 1)[:n_q]
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([*LENGTHS, 0])[candidates]  # -1 names the last, of no token
    argmax = (torch.rand(*candidates.shape, l_q, generator=generator) * lengths.unsqueeze(-1)).int()
    argmax[torch.rand(argmax.shape, generator=generator) < 0.2] = -1
    argmax[lengths == 0] = -1
    g = torch.randn(candidates.shape, generator=generator)
    return q, d[0], *(x.to(q.device) for x in (offsets, candidates, argmax, g))


def assert_right(b, argmax, g):
    needs = Needs(True, True, b.q.weights is not None)
    ours = triton.backward(b, None, argmax, g, needs)
    truth = gather.ragged(b, argmax, g, needs)
    for x, y in zip(ours, truth, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    for x, y in zip(triton.backward(b, None, argmax, g, needs), ours, strict=True):
        assert x is y is None or torch.equal(x, y)
    return ours


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weights"])
def test_repeated_candidates_and_empty_slots(normalize, weighted):
    # 40 query tokens: two blocks; 19 tokens after the last document get no gradient; 300 dims: two column blocks
    for sizes in (dict(), dict(l_q=40, after=19), dict(n_q=7, l_q=1), dict(dim=300)):
        q, d, offsets, candidates, argmax, g = case(**sizes)
        weights = torch.randn(q.shape[:-1], device=q.device) if weighted else None
        grads = assert_right(
            Batch(Side(q, None, weights=weights), Side(d, None, offsets), candidates, normalize), argmax, g
        )
        # no candidate names document 4
        first = sum(LENGTHS[:4])
        assert (grads.d[first:] == 0).all() and (grads.d[:first] != 0).any()


def test_ragged_queries():
    q, d, offsets, candidates, argmax, g = case()
    q_offsets = torch.tensor([0, 9, 13, 27], device=q.device)
    flat = argmax.transpose(0, 1).reshape(4, 27).clone()
    # the queries have 9, 4 and 14 tokens; the last five of the third would be of the second
    lengths = torch.tensor([*LENGTHS, 0], device=q.device)[candidates]
    owner = torch.tensor([0] * 9 + [1] * 4 + [2] * 14, device=q.device)
    flat = torch.minimum(flat, (lengths.T[:, owner] - 1).int())
    assert_right(Batch(Side(q.reshape(27, -1), None, q_offsets), Side(d, None, offsets), candidates), flat, g)


def test_nan_stays_with_its_own_tokens():
    """In a document that no candidate names, in a masked query token, and in the gradient of a pair."""
    q, d, offsets, candidates, argmax, g = case()
    argmax[:, :, 0] = -1
    q[:, 0], d[sum(LENGTHS[:4]) :] = float("nan"), float("nan")
    for normalize in (False, True):
        b = Batch(Side(q), Side(d, None, offsets), candidates, normalize)
        grads = triton.backward(b, None, argmax, g, Needs(True, True))
        assert grads.d.isfinite().all() and grads.q.isfinite().all()
    g[1, 0] = float("nan")
    grad = triton.backward(Batch(Side(q), Side(d, None, offsets), candidates), None, argmax, g, Needs(False, True)).d
    hit = torch.zeros(len(d), dtype=torch.bool, device=d.device)
    chosen = argmax[1, 0][argmax[1, 0] >= 0].long()
    hit[offsets[3] + chosen] = True
    assert grad[hit].isnan().all() and grad[~hit].isfinite().all()


def test_half_precision_sums_round_once():
    """A document that 40 queries name, all with the same token: 40 x 9 rows are added in float32."""
    q, d = problem((40, 1, 9, 8, 16), dtype=torch.float16, device=TRITON_DEVICE)
    offsets = torch.tensor([0, 8], device=q.device)
    candidates = torch.zeros(40, 1, dtype=torch.int64, device=q.device)
    argmax, g = torch.full((40, 1, 9), 3, dtype=torch.int32, device=q.device), torch.ones(40, 1, device=q.device)
    _, grad = run_backward(
        triton, g, q, d[0], argmax, needs_q=False, needs_d=True, d_offsets=offsets, candidates=candidates
    )  # fmt: skip
    truth = q.double().sum((0, 1))
    torch.testing.assert_close(grad[3].double(), truth.half().double(), rtol=1e-3, atol=1e-6)
    assert (grad[[0, 1, 2, 4, 5, 6, 7]] == 0).all()
