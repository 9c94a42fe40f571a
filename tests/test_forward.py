"""Scores and argmax of every backend against the float64 oracle."""

import pytest
import torch
from common import BACKENDS, SHAPES, assert_argmax, assert_exact, exact, plain_torch, problem

import latemax

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", BACKENDS)
def test_scores_and_argmax(where, shape, own, normalize):
    backend, device = where
    q, d = problem(shape, own=own, device=device)
    scores, argmax = latemax.maxsim(q, d, normalize=normalize, return_argmax=True, backend=backend)
    assert scores.dtype == torch.float32
    assert_exact(scores, exact(q, d, normalize=normalize), plain_torch(q, d, normalize))
    assert_argmax(argmax, q, d, normalize=normalize)
    # without argmax another build of the kernel runs: its scores are bitwise equal if the tile is
    again = latemax.maxsim(q, d, normalize=normalize, backend=backend)
    tiles = [latemax.explain(q, d, return_argmax=want, backend=backend).tile for want in (True, False)]
    assert torch.equal(again, scores) or normalize or tiles[0] != tiles[1]
    torch.testing.assert_close(again, scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", BACKENDS)
def test_dtypes(where, dtype):
    backend, device = where
    q, d = problem((2, 3, 9, 40, 128), dtype=dtype, device=device)
    scores, argmax = latemax.maxsim(q, d, return_argmax=True, backend=backend)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_exact(scores, exact(q, d), plain_torch(q, d))
    # half-precision products summed in float32: far better than plain torch, which rounds every similarity
    torch.testing.assert_close(scores.double(), exact(q, d), rtol=0, atol=1e-3)
    assert_argmax(argmax, q, d)


@pytest.mark.parametrize(
    "pair", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str
)
@pytest.mark.parametrize("where", BACKENDS)
def test_mixed_dtypes_are_promoted(where, pair):
    backend, device = where
    q, d = problem((2, 2, 4, 20, 32), device=device)
    q, d = q.to(pair[0]), d.to(pair[1])
    common = torch.promote_types(*pair)
    scores = latemax.maxsim(q, d, backend=backend)
    assert scores.dtype == (torch.float64 if common == torch.float64 else torch.float32)
    assert_exact(scores, exact(q, d), plain_torch(q.to(common), d.to(common)))


def test_shape_table():
    """Every row of the table in the documentation: shapes of scores and of argmax."""
    l_q, l_d, dim, n_q, n_d = 4, 6, 8, 2, 3
    rows = [
        ((l_q, dim), (l_d, dim), ()),
        ((l_q, dim), (n_d, l_d, dim), (n_d,)),
        ((n_q, l_q, dim), (l_d, dim), (n_q,)),
        ((n_q, l_q, dim), (n_d, l_d, dim), (n_q, n_d)),
        ((n_q, l_q, dim), (n_q, n_d, l_d, dim), (n_q, n_d)),
    ]
    for q_shape, d_shape, expected in rows:
        q, d = torch.randn(q_shape), torch.randn(d_shape)
        scores, argmax = latemax.maxsim(q, d, return_argmax=True)
        truth, best = latemax.reference.maxsim(q, d, return_argmax=True)
        assert scores.shape == expected and argmax.shape == (*expected, l_q)
        torch.testing.assert_close(scores, truth)
        assert torch.equal(argmax, best)


@pytest.mark.parametrize("where", BACKENDS)
def test_pairs_are_the_diagonal(where):
    backend, device = where
    q, d = problem((3, 3, 7, 21, 32), device=device)
    scores, argmax = latemax.maxsim_pairs(q, d, return_argmax=True, backend=backend)
    full, full_argmax = latemax.maxsim(q, d, return_argmax=True, backend=backend)
    torch.testing.assert_close(scores, full.diagonal())
    assert torch.equal(argmax, full_argmax[torch.arange(3), torch.arange(3)])
    with pytest.raises(ValueError, match=r"same b"):
        latemax.maxsim_pairs(q[:2], d)


@pytest.mark.parametrize("where", BACKENDS)
def test_strides(where):
    """Transposed, sliced, expanded and offset views score as their contiguous copies."""
    backend, device = where
    q, d = problem((2, 3, 8, 40, 32), device=device)
    wide = torch.randn(3, 41, 33, device=device)
    views = {
        "transposed": (
            q.transpose(1, 2).contiguous().transpose(1, 2),
            d.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        ),
        "offset, rows not of 16 bytes": (q, wide[:, 1:, 1:]),
        "every second token": (q[:, ::2], d[:, ::2]),
        "expanded documents": (q, d[:1].expand(3, -1, -1)),
        "expanded candidates": (q, d.unsqueeze(0).expand(2, -1, -1, -1)),
        "expanded tokens": (q[:, :1].expand(-1, 8, -1), d[:, :1].expand(-1, 40, -1)),
    }
    for name, (a, b) in views.items():
        scores, argmax = latemax.maxsim(a, b, return_argmax=True, backend=backend)
        same, same_argmax = latemax.maxsim(a.contiguous(), b.contiguous(), return_argmax=True, backend=backend)
        assert torch.equal(scores, same) or torch.allclose(scores, same, atol=1e-5), name
        assert torch.equal(argmax, same_argmax), name


@pytest.mark.parametrize("where", BACKENDS)
def test_ties_take_the_lowest_index(where):
    backend, device = where
    d = torch.zeros(2, 300, 16, device=device)
    d[0, [7, 130, 299]] = 1.0
    d[1] = 1.0
    _, argmax = latemax.maxsim(torch.ones(20, 16, device=device), d, return_argmax=True, backend=backend)
    assert argmax[0].unique().tolist() == [7] and argmax[1].unique().tolist() == [0]


@pytest.mark.parametrize("where", BACKENDS)
def test_a_score_does_not_depend_on_other_documents_or_padding(where):
    backend, device = where
    q, d = problem((2, 5, 12, 70, 64), device=device)
    scores = latemax.maxsim(q, d, backend=backend)
    single = latemax.maxsim(q, d[3:4], backend=backend)
    padded = torch.full((5, 200, 64), torch.nan, device=device)
    padded[:, :70] = d
    keep = torch.arange(200, device=device).expand(5, -1) < 70
    with_padding = latemax.maxsim(q, padded, None, keep, backend=backend)
    if backend == "triton":
        assert torch.equal(scores[:, 3:4], single) and torch.equal(scores, with_padding)
    else:
        # torch's matmul sums in another order for each shape
        torch.testing.assert_close(scores[:, 3:4], single)
        torch.testing.assert_close(scores, with_padding)


@pytest.mark.parametrize("where", BACKENDS)
def test_all_negative_similarities(where):
    backend, device = where
    q, d = problem((2, 2, 4, 33, 16), device=device)
    scores = latemax.maxsim(q.abs(), -d.abs() - 0.1, backend=backend)
    assert (scores < 0).all()
    torch.testing.assert_close(scores, exact(q.abs(), -d.abs() - 0.1).float())


def test_module_is_the_function():
    q, d = problem((2, 2, 4, 9, 16))
    q_mask = torch.ones(2, 4)
    module = latemax.MaxSim(normalize=True, return_argmax=True)
    for ours, theirs in zip(
        module(q, d, q_mask), latemax.maxsim(q, d, q_mask, normalize=True, return_argmax=True), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert "normalize=True" in repr(module)


def test_long_documents_are_cut_in_token_blocks():
    """One document larger than a block of the CPU path: the running maximum crosses blocks."""
    q, d = problem((1, 1, 600, 5000, 8))
    scores, argmax = latemax.maxsim(q, d, return_argmax=True, backend="cpu")
    assert_exact(scores, exact(q, d), plain_torch(q, d))
    assert_argmax(argmax, q, d)
