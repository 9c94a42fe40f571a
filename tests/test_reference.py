"""The oracle against numbers computed by hand: all other tests compare with the oracle."""

import math

import pytest
import torch

from latemax import reference

Q = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
D = torch.tensor([[[3.0, 1.0], [2.0, 4.0], [0.0, 0.0]], [[-1.0, -1.0], [-2.0, -3.0], [-5.0, -0.5]]])


def test_scores_and_argmax_by_hand():
    # document 0: max(3, 2, 0) + 2·max(1, 4, 0) = 11
    # document 1, all negative: max(-1, -2, -5) + 2·max(-1, -3, -0.5) = -2
    scores, argmax = reference.maxsim(Q, D, return_argmax=True)
    assert scores.tolist() == [11.0, -2.0]
    assert argmax.tolist() == [[0, 1], [0, 2]]
    assert argmax.dtype == torch.int32


def test_masks_by_hand():
    d_mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    scores, argmax = reference.maxsim(Q, D, torch.tensor([1.0, 0.0]), d_mask, return_argmax=True)
    assert scores.tolist() == [2.0, -1.0]
    assert argmax.tolist() == [[1, -1], [0, -1]]


def test_own_candidates_by_hand():
    scores = reference.maxsim(torch.stack([Q, -Q]), torch.stack([D[:1], D[1:]]))
    # query 1 is -Q: max(1, 2, 5) + max(2, 6, 1) = 11
    assert scores.tolist() == [[11.0], [11.0]]


def test_normalize_by_hand():
    scores = reference.maxsim(Q, D[:1], normalize=True)
    expected = 3 / math.sqrt(10) + 4 / math.sqrt(20)
    assert scores.item() == pytest.approx(expected, abs=1e-6)


def test_ties_take_the_lowest_index_and_the_whole_gradient():
    d = torch.tensor([[1.0], [2.0], [2.0]], requires_grad=True)
    score, argmax = reference.maxsim(torch.ones(1, 1), d, return_argmax=True)
    score.backward()
    assert argmax.tolist() == [1] and d.grad.flatten().tolist() == [0.0, 1.0, 0.0]


def test_empty_document_and_empty_query():
    d_mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    scores, argmax = reference.maxsim(Q, D, None, d_mask, return_argmax=True)
    assert scores.tolist() == [-math.inf, -2.0] and argmax[0].tolist() == [-1, -1]
    assert reference.maxsim(Q, D, torch.zeros(2), d_mask).tolist() == [0.0, 0.0]
    assert reference.maxsim(Q, D[:, :0], empty_score=-7).tolist() == [-7.0, -7.0]


def test_nan_affects_only_its_pair():
    d = D.clone()
    d[0, 1, 0] = math.nan
    scores = reference.maxsim(Q, d)
    assert math.isnan(scores[0]) and scores[1] == -2.0
    assert reference.maxsim(Q, d, None, torch.tensor([[1, 0, 1], [1, 1, 1]])).tolist() == [5.0, -2.0]


def test_minus_infinity_at_a_valid_token_still_has_an_argmax():
    d = torch.tensor([[[5.0], [-math.inf]]])
    _, argmax = reference.maxsim(torch.ones(1, 1), d, None, torch.tensor([[0, 1]]), return_argmax=True)
    assert argmax.tolist() == [[1]]


def test_lists_score_like_their_items():
    scores, argmax = reference.maxsim([Q, Q[:1]], [D[0], D[1, :2]], return_argmax=True)
    assert scores.tolist() == [[11.0, -3.0], [3.0, -1.0]]
    assert argmax.tolist() == [[[0, 1], [0, 0]], [[0, -1], [0, -1]]]


def test_float64_stays_float64():
    assert reference.maxsim(Q, D.double()).dtype == torch.float64
    assert reference.maxsim(Q.half(), D.bfloat16()).dtype == torch.float32
