"""Weights and reductions that cannot be: the argument, the rule and what came."""

import numpy
import pytest
import torch
from common import problem

import latemax


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "q_weights must be a torch.Tensor or a numpy array, got list", dict(q_weights=[1.0])),
        (TypeError, "q_weights must be float16, .* got torch.bool", dict(q_weights=torch.ones(2, 4).bool())),
        (TypeError, "q_weights must be float16, .* got torch.int64", dict(q_weights=torch.ones(2, 4).long())),
        (ValueError, r"q_weights must have the leading shape of q, \[2, 4\]; got shape \[4\]",
         dict(q_weights=torch.ones(4))),
        (ValueError, "q_weights must be on the device of q, cpu; got meta",
         dict(q_weights=torch.ones(2, 4, device="meta"))),
        (TypeError, "reduce must be a str, 'sum' or 'mean'; got int", dict(reduce=1)),
        (ValueError, "reduce must be 'sum' or 'mean'; got 'max'", dict(reduce="max")),
    ],
)  # fmt: skip
def test_errors(error, message, options):
    q, d = problem((2, 2, 4, 9, 16))
    for call in (latemax.maxsim, latemax.maxsim_pairs, latemax.explain, lambda *x, **o: latemax.topk(*x, 1, **o)):
        with pytest.raises(error, match=message):
            call(q, d, **options)


def test_errors_of_lists():
    q, d = problem((2, 2, 4, 9, 16))
    for weights, message in (
        (torch.ones(2, 4), "q_weights must be a list of 2 weights for a list of 2; got Tensor"),
        ([torch.ones(4)], "q_weights must be a list of 2 weights for a list of 2; got a list of 1"),
        ([torch.ones(4), torch.ones(3)], r"q_weights\[1\] must have the leading shape of q\[1\], \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            latemax.maxsim([*q], d, q_weights=weights)
    with pytest.raises(TypeError, match=r"q_weights\[0\] must be a torch.Tensor or a numpy array, got NoneType"):
        latemax.maxsim([*q], d, q_weights=[None, torch.ones(4)])


def test_arrays_of_a_masked_kind_are_refused():
    q, d = problem((2, 2, 4, 9, 16))
    with pytest.raises(TypeError, match="q_weights must be a plain array, got a masked array"):
        latemax.maxsim(q, d, q_weights=numpy.ma.masked_array(numpy.ones((2, 4), numpy.float32)))
