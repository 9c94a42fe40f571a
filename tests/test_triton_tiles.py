"""Documents whose last, partial tile is in the loop over the others, or before it: the same scores and argmax."""

import pytest
import torch
from common import TRITON_DEVICE, batch, exact, masks, problem, run_forward

pytest.importorskip("triton", reason="the kernels need triton")

import latemax
from latemax.ops import dispatch, tiles
from latemax.ops.backends import triton

TILE = tiles.TileConfig(16, 32, 16, True, 4, 3)


def score(q, d, q_mask, d_mask, norm=tiles.NO_NORM, **options):
    """(scores, argmax) with the last tile in the loop, found equal to those with it peeled off, bit for bit."""
    found = []
    for peel in (True, False):
        n_d = len(options["d_offsets"]) - 1 if "d_offsets" in options else d.shape[-3]
        scores = torch.full((len(q), n_d), float("nan"), device=q.device)
        argmax = torch.full((len(q), n_d, q.shape[1]), -7, dtype=torch.int32, device=q.device)
        launch = tiles.Launch(TILE._replace(peel=peel, block_k=tiles.padded_dim(q.shape[-1])), 1, norm)
        run_forward(
            triton, q, d, scores, argmax, q_mask=q_mask, d_mask=d_mask, launch=launch,
            normalize=norm != tiles.NO_NORM, **options,
        )  # fmt: skip
        found.append((scores, argmax))
    (scores, argmax), ours = found
    torch.testing.assert_close(ours[0], scores, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours[1], argmax)
    return ours


# around one and two tiles of 32 tokens
@pytest.mark.parametrize("l_d", [1, 31, 32, 33, 63, 64, 65, 96])
def test_lengths_around_the_tile(l_d):
    q, d = problem((2, 3, 9, l_d, 16), device=TRITON_DEVICE)
    for chosen in ((None, None), masks(q, d)):
        for norm in (tiles.NO_NORM, tiles.NORM_IN_TILE, tiles.NORM_BEFORE):
            scores, argmax = score(q, d, *chosen, norm)
            truth, best = exact(q, d, *chosen, normalize=norm != tiles.NO_NORM, return_argmax=True)
            torch.testing.assert_close(scores.double(), truth, atol=1e-4, rtol=1e-5)
            assert torch.equal(argmax, best)


def test_ties_and_nan_across_tiles():
    # whole numbers: numpy, which multiplies in the interpreter, may round the products of equal rows apart
    q, d = (x.round() for x in problem((1, 2, 5, 80, 16), device=TRITON_DEVICE))
    d[0] = d[0, :1]
    d[1, [40, 79]] = float("nan")
    scores, argmax = score(q, d, None, None)
    assert (argmax[0, 0] == 0).all() and scores[0, 0].isfinite()
    assert (argmax[0, 1] == 40).all() and scores[0, 1].isnan()
    empty = torch.zeros(2, 80, dtype=torch.bool, device=d.device)
    scores, argmax = score(q, d, None, empty)
    assert (scores == -float("inf")).all() and (argmax == -1).all()


def test_ragged_documents():
    """Empty ones, whole tiles, and documents right after each other: the loop reads no neighbour's tokens."""
    lengths = [0, 32, 5, 64, 33]
    q, d = problem((2, 1, 9, sum(lengths), 16), device=TRITON_DEVICE)
    offsets = torch.tensor([0, *lengths], device=q.device).cumsum(0)
    scores, _ = score(q, d[0], None, None, d_offsets=offsets)
    for i, part in enumerate(d[0].split(lengths)):
        truth = exact(q, part[None]) if len(part) else torch.full((2, 1), -float("inf"))
        torch.testing.assert_close(scores[:, i : i + 1].double().cpu(), truth.double().cpu(), atol=1e-4, rtol=1e-5)


def test_short_documents_take_tiles_of_their_own():
    """By the length of dense documents, by the mean of ragged ones; what runs is what explain says."""
    for l_d, block_d, peel in ((300, 64, False), (400, 64, False), (401, 128, True)):
        q, d = problem((1, 2, 32, l_d, 128), dtype=torch.bfloat16, device=TRITON_DEVICE)
        tile = latemax.explain(q, d, backend="triton").tile
        assert (tile.block_q, tile.block_d, tile.peel) == (32, block_d, peel)
        ragged = batch(q, d.flatten(0, 1), None, None, d_offsets=torch.tensor([0, l_d - 100, 2 * l_d]))
        assert dispatch.explain(ragged, "triton", argmax=False).tile == tile
    # several tiles of query tokens meet a document: products bind
    q, d = problem((16, 2, 32, 300, 128), dtype=torch.bfloat16, device=TRITON_DEVICE)
    assert latemax.explain(q, d, backend="triton").tile.peel
