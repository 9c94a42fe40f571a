"""Bad input: the error names the argument, the rule and the value, before anything is launched."""

import numpy
import pytest
import torch

import latemax

Q, D = torch.ones(2, 3, 4), torch.ones(5, 6, 4)
OWN = torch.ones(2, 5, 6, 4)
META = torch.ones(5, 6, 4, device="meta")

CASES = {
    "q integer array": (dict(q=numpy.ones((3, 4), int)), TypeError, r"q must be float16.*got torch\.int64"),
    "d no tensor": (
        dict(d=None),
        TypeError,
        r"d must be a torch\.Tensor, a numpy array or a list of them, got NoneType",
    ),
    "q integers": (dict(q=Q.long()), TypeError, r"q must be float16, bfloat16, float32 or float64, got torch\.int64"),
    "d complex": (dict(d=D.to(torch.complex64)), TypeError, r"d must be float16.*got torch\.complex64"),
    "d sparse": (dict(d=D.to_sparse()), TypeError, r"d must be a dense tensor.*sparse_coo"),
    "q 1-D": (dict(q=Q[0, 0]), ValueError, r"q must be \[l_q, dim\] or \[n_q, l_q, dim\], got shape \[4\]"),
    "q 4-D": (dict(q=OWN), ValueError, r"q must be .*got shape \[2, 5, 6, 4\]"),
    "d 5-D": (dict(d=OWN[None]), ValueError, r"d must be .*got shape \[1, 2, 5, 6, 4\]"),
    "other dim": (dict(d=D[..., :3]), ValueError, r"same dim \(last axis\); got q \[2, 3, 4\] and d \[5, 6, 3\]"),
    "dim 0": (dict(q=Q[..., :0], d=D[..., :0]), ValueError, r"dim .* must be at least 1"),
    "no query token": (dict(q=Q[:, :0]), ValueError, r"at least one token \(l_q >= 1\); got q \[2, 0, 4\]"),
    "other n_q": (dict(q=Q[:1], d=OWN), ValueError, r"own candidates .* same n_q; got q \[1, 3, 4\]"),
    "own candidates of one query": (dict(q=Q[0], d=OWN), ValueError, r"own candidates .* got q \[3, 4\]"),
    "other device": (dict(d=META), ValueError, r"one device; got q on cpu and d on meta"),
    "q_mask shape": (
        dict(q_mask=torch.ones(1, 3)),
        ValueError,
        r"q_mask must have the leading shape of q, \[2, 3\]; got shape \[1, 3\]",
    ),
    "q_mask one long": (dict(q_mask=torch.ones(2, 4)), ValueError, r"q_mask .*got shape \[2, 4\]"),
    "d_mask shape": (
        dict(d_mask=torch.ones(5, 7)),
        ValueError,
        r"d_mask must have the leading shape of d, \[5, 6\]; got shape \[5, 7\]",
    ),
    "d_mask broadcasts": (dict(d_mask=torch.ones(6)), ValueError, r"d_mask .*got shape \[6\]"),
    "own mask": (dict(d=OWN, d_mask=torch.ones(5, 6)), ValueError, r"d_mask .*\[2, 5, 6\]; got shape \[5, 6\]"),
    "mask no tensor": (dict(q_mask=[[1]]), TypeError, r"q_mask must be a torch\.Tensor or a numpy array, got list"),
    "mask complex": (
        dict(q_mask=torch.ones(2, 3, dtype=torch.complex64)),
        TypeError,
        r"q_mask must be bool, int or float",
    ),
    "mask device": (dict(d_mask=META[..., 0]), ValueError, r"d_mask must be on the device of d, cpu; got meta"),
    "backend": (
        dict(backend="gpu"),
        ValueError,
        r"backend must be one of auto, triton, cuda, cpu, reference; got 'gpu'",
    ),
    "normalize": (dict(normalize="yes"), TypeError, r"normalize must be a Python bool, got builtins\.str"),
    "return_argmax": (dict(return_argmax=1), TypeError, r"return_argmax must be a Python bool, got builtins\.int"),
    "empty_score": (dict(empty_score="zero"), TypeError, r"empty_score must be a number, got str"),
    "empty_score too large": (
        dict(empty_score=1e300),
        ValueError,
        r"infinite or within the range of float32, got 1e\+300",
    ),
    "numpy bool": (dict(normalize=numpy.True_), TypeError, r"normalize must be a Python bool, got numpy\.bool"),
    "mask sparse": (dict(d_mask=torch.ones(5, 6).to_sparse()), TypeError, r"d_mask must be a dense tensor.*sparse_coo"),
    "list of 3-D": (dict(d=[D]), ValueError, r"d\[0\] must be \[l_i, dim\], got shape \[5, 6, 4\]"),
    "list of integers": (dict(d=[D[0], D[0].int()]), TypeError, r"d\[1\] must be float16.*torch\.int32"),
    "list of two dims": (
        dict(d=[D[0], D[0, :, :2]]),
        ValueError,
        r"all tensors of d must have one dim.*d\[1\] is \[6, 2\]",
    ),
    "list of two dtypes": (
        dict(d=[D[0], D[0].half()]),
        ValueError,
        r"all tensors of d must have one dtype.*d\[1\] has torch\.float16",
    ),
    "tensor mask for a list": (
        dict(d=[D[0]], d_mask=torch.ones(1, 6)),
        ValueError,
        r"d_mask must be a list of 1 masks .*got Tensor",
    ),
    "too few masks": (dict(d=[D[0], D[1]], d_mask=[None]), ValueError, r"d_mask must be a list of 2 .*got a list of 1"),
    "mask in a list": (
        dict(d=[D[0]], d_mask=[torch.ones(5)]),
        ValueError,
        r"d_mask\[0\] .*d\[0\], \[6\]; got shape \[5\]",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_maxsim_refuses(case):
    changed, error, text = CASES[case]
    arguments = dict(q=Q, d=D) | changed
    with pytest.raises(error, match=text):
        latemax.maxsim(**arguments)
    if "empty_score" not in changed:
        with pytest.raises(error, match=text):
            latemax.explain(**arguments)


@pytest.mark.parametrize("case", ["other dim", "q integers", "q_mask shape", "backend"])
def test_pairs_refuse(case):
    changed, error, text = CASES[case]
    with pytest.raises(error, match=text):
        latemax.maxsim_pairs(**(dict(q=Q, d=D[:2]) | changed))


@pytest.mark.parametrize("q, d", [(Q[0], D[:2]), (Q, OWN)], ids=["2-D q", "4-D d"])
def test_pairs_take_only_3d(q, d):
    with pytest.raises(ValueError, match=r"must be \[b, l_. dim\]|must be \[b, l_[qd], dim\]"):
        latemax.maxsim_pairs(q, d)


def test_errors_come_before_any_launch(monkeypatch):
    from latemax.ops import dispatch

    def forbidden(*_):
        raise AssertionError("launched")

    monkeypatch.setattr(dispatch, "forward", forbidden)
    for case in CASES:
        changed, error, text = CASES[case]
        with pytest.raises(error, match=text):
            latemax.maxsim(**(dict(q=Q, d=D) | changed))


def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run: .*(no CUDA device|cannot be loaded)"):
        latemax.maxsim(Q, D, backend="cuda")
    with pytest.raises(ValueError, match="CPU or CUDA device; got meta"):
        latemax.maxsim(META, META)


def test_an_empty_list_takes_the_dim_of_the_other_side():
    with pytest.raises(ValueError, match="q is an empty list"):
        latemax.maxsim([], [D[0]][:0])
    assert latemax.maxsim([Q[0]], []).shape == (1, 0)
    assert latemax.maxsim(Q, []).shape == (2, 0)
