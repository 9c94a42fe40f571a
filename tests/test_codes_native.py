"""The native CPU kernels over codes, instruction set by instruction set."""

import math

import pytest
import torch

import latemax
from latemax import quantize
from latemax.ops.backends import native
from latemax.ops.problem import Batch, Codes, Outputs, Plan, Side

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native CPU kernels are not built")
LEVELS = list(enumerate(native.levels()))
KINDS = [("", "int8"), ("int8", "int8"), ("", "binary"), ("binary", "binary")]


def side(x, kind=""):
    if not kind:
        return Side(x)
    codes = quantize(x, kind)
    return Side(codes.codes, codes=Codes(kind, codes.dim, codes.scale, codes.error))


def numbers(x, kind=""):
    return quantize(x, kind).dequantize(torch.float64) if kind else x.double()


def scores(level, q, d, **options):
    b = Batch(q, d, **options)
    out = Outputs(torch.empty(b.n_q, b.n_d), torch.empty(b.n_q, b.n_d, b.l_q, dtype=torch.int32))
    native.forward(b, Plan("native", "", launch=level), out)
    return out


def bounds(level, q, d, coarse, **options):
    b = Batch(q, d, **options)
    lower, upper = torch.empty(b.n_q, b.n_d), torch.empty(b.n_q, b.n_d)
    native.bounds(b, Plan("native", "", launch=level), lower, upper, coarse=coarse)
    return lower, upper


def tokens(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level[1])
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(kinds))
def test_saturated_codes_and_one_hot_queries(level, kinds):
    """The largest sums there are: 4,096 products of ±127 or of ±1, and queries of one number."""
    for dim in (517, 1030, 4096):
        d = tokens(2, 5, dim, seed=1).sign()
        q = torch.stack([d[0, 0], -d[0, 0], torch.eye(dim)[dim // 2], tokens(dim)]).unsqueeze(0)
        similarities = numbers(q, kinds[0]) @ numbers(d, kinds[1]).mT
        out = scores(level[0], side(q, kinds[0]), side(d, kinds[1]))
        allowed = 2**-12 * numbers(q, kinds[0]).norm(dim=-1).sum() * numbers(d, kinds[1]).norm(dim=-1).max()
        assert (out.scores[0] - similarities.amax(-1).sum(-1)).abs().max() <= allowed


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level[1])
def test_query_tokens_of_any_size(level):
    """Rounding a query token is relative to its own norm, whatever its batch mates are."""
    d = tokens(3, 40, 96, seed=1)
    q = tokens(1, 6, 96) * torch.tensor([1e-44, 1e-38, 1e-20, 1.0, 1e20, 1e36]).view(1, -1, 1)
    together = scores(level[0], side(q), side(d, "int8"))
    for i in range(q.shape[1]):
        alone = scores(level[0], side(q[:, i : i + 1]), side(d, "int8"))
        assert torch.equal(alone.argmax[..., 0], together.argmax[..., i])
        truth = (q[:, i].double() @ numbers(d, "int8").mT).squeeze(1).amax(-1)
        allowed = 2**-12 * q[0, i].double().norm() * numbers(d, "int8").norm(dim=-1).max() + 2e-45
        assert (alone.scores[0] - truth).abs().max() <= allowed


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level[1])
@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_nan_and_infinity_in_a_query(level, kind):
    q, d = tokens(4, 3, 40), tokens(5, 17, 40, seed=1)
    q[0, 1, 7], q[1, 0, 3], q[2, 2, 39] = math.nan, math.inf, -math.inf
    codes = quantize(d, kind)
    ours = latemax.maxsim(q, codes, return_argmax=True, backend="cpu")
    out = scores(level[0], side(q), side(d, kind))
    truth, argmax = latemax.reference.maxsim(q.double(), codes.dequantize(torch.float64), return_argmax=True)
    assert truth.isnan().any() and truth.isinf().any()
    finite = truth.isfinite()
    assert torch.equal(out.scores[~finite].nan_to_num(7), truth[~finite].float().nan_to_num(7))
    assert (out.scores[finite] - truth[finite]).abs().max() < 0.05
    special = q.isfinite().all(-1).logical_not().unsqueeze(1).expand(argmax.shape)
    assert torch.equal(out.argmax[special], argmax[special])
    if level == LEVELS[-1]:
        assert torch.equal(ours[1], out.argmax)


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level[1])
@pytest.mark.parametrize("normalize", [False, True])
def test_bounds_hold_over_sizes(level, normalize):
    """Also where tokens are huge, tiny, constant or of one number, products overflow, or errors are infinite."""
    for dim in (1, 5, 130, 700):
        x, q = tokens(6, 9, dim, seed=2), tokens(2, 4, dim, seed=3)
        x[0] *= 1e37 / dim
        x[1] *= 1e-30
        x[2] *= 1e-42
        x[3] = x[3, :, :1]
        x[4] = 0
        x[4, :, 0] = x[5, :, 0]
        q[1, 0], q[1, 1], q[1, 2, 1:] = 0, 1, 0
        d = side(x, "int8")
        q64, x64 = q.double(), x.double()
        if normalize:
            q64, x64 = (y / y.norm(dim=-1, keepdim=True).clamp_min(1e-12) for y in (q64, x64))
        truth = torch.einsum("aik,cjk->acij", q64, x64).amax(-1).sum(-1)
        for coarse in (False, True):
            lower, upper = bounds(level[0], side(q), d, coarse, normalize=normalize)
            assert (lower <= truth).all() and (truth <= upper).all()
            unknown = d._replace(codes=d.codes._replace(error=torch.full_like(d.codes.error, math.inf)))
            lower, upper = bounds(level[0], side(q[:1]), unknown, coarse, normalize=normalize)
            assert (lower == -math.inf).all() and (upper == math.inf).all()


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level[1])
def test_bounds_of_a_query_that_is_no_number(level):
    q, d = tokens(2, 3, 20), side(tokens(4, 6, 20, seed=1), "int8")
    q[0, 1, 1], q[1, 1, 1] = math.nan, math.inf
    for coarse in (False, True):
        lower, upper = bounds(level[0], side(q), d, coarse)
        assert lower[0].isnan().all() and upper[0].isnan().all()
        assert (lower[1] == -math.inf).all() and (upper[1] == math.inf).all()


def test_bounds_of_an_empty_query_are_zero_without_a_sign():
    """Also where it shares a part of the query rows with others."""
    q, d = tokens(3, 4, 20), side(tokens(4, 6, 20, seed=1), "int8")
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    for coarse in (False, True):
        for bound in bounds(LEVELS[-1][0], side(q)._replace(mask=mask), d, coarse):
            assert torch.equal(bound[1], torch.zeros(4)) and not bound[1].signbit().any()


def test_too_many_dims_for_sums_of_32_bits():
    dim = native.MOST_CODE_DIMS + 1
    q, d = torch.ones(1, dim), quantize(torch.ones(1, dim))
    assert "at most 131072 dims" in str(latemax.explain(q, d))
    assert latemax.maxsim(q, d).item() == pytest.approx(dim, rel=1e-4)
