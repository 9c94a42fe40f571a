"""maxsim_bounds: the score of the original tokens, in exact arithmetic, is never outside."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch
from common import BACKENDS, GPU, TRITON_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

import latemax
from latemax import QuantizedTokens, maxsim, maxsim_bounds, maxsim_pairs, quantize
from latemax.bounds import bound_corpus
from latemax.ops import dispatch, tiles
from latemax.ops.backends import triton

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
# without the CUDA kernels, which have no bounds
PLACES = [*BACKENDS[:3], pytest.param(("reference", "cpu"), id="reference")]


def exact_score(q, d, weights=None, *, normalize=False, mean=False) -> Decimal:
    """Σ_i w_i max_j <q_i, d_j> of tokens [l, dim] to 100 digits."""
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 100, -10000, 10000
        rows = [[[Decimal(v) for v in token] for token in x.double().tolist()] for x in (q, d)]
        if normalize:
            eps = Decimal("1e-12")
            lengths = [[max(sum(v * v for v in x).sqrt(), eps) for x in side] for side in rows]
            rows = [
                [[v / n for v in x] for x, n in zip(*side, strict=True)] for side in zip(rows, lengths, strict=True)
            ]
        best = [max(sum((a * b for a, b in zip(x, y, strict=True)), Decimal(0)) for y in rows[1]) for x in rows[0]]
        factors = [Decimal(1)] * len(best) if weights is None else [Decimal(w) for w in weights.tolist()]
        return sum((w * v for w, v in zip(factors, best, strict=True)), Decimal(0)) / (len(best) if mean else 1)


def hard(seed: int, l: int, dim: int, dtype: torch.dtype) -> torch.Tensor:  # noqa: E741
    """Tokens that are hard to bound, any of them at any place."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(max(l, 9), dim, generator=g, dtype=torch.float64)
    x[0] *= torch.logspace(-30, 3, dim, dtype=torch.float64)
    x[1] *= 2.0**-140
    x[2] = 0.3
    x[3] = 0.0
    x[3, seed % dim] = -7.0
    x[4] = x[5] * (1 + 2.0**-10)
    x[6] = torch.where(x[6] > 0, 127.0, 126.5)
    x[7] = 0.0
    x[8] *= 1e-13
    x = x[torch.randperm(len(x), generator=g)[:l]] * 10.0 ** (seed % 7 - 3)
    return x.to(dtype).nan_to_num(posinf=6e4, neginf=-6e4)


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_exact_score_is_inside(seed, dim, dtype, normalize, weighted, mean):
    q, d = hard(seed, 3, dim, dtype), hard(seed + 1, 5, dim, dtype)
    weights = torch.randn(3, generator=torch.Generator().manual_seed(seed)) if weighted else None
    inside(q, d, weights, normalize=normalize, mean=mean)
    inside(q, d, weights, normalize=normalize, mean=mean, coarse=True)


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """In Triton's interpreter, which takes 10 ms for a row of a tile."""
    if GPU or "triton" not in request.node.name:
        yield
        return
    monkeypatch.setattr(tiles, "pick", lambda *_: (tiles.TileConfig(16, 16, 32, True, 4, 3), "small"))
    dispatch.plan_for.cache_clear()
    yield
    dispatch.plan_for.cache_clear()


@pytest.fixture
def rounded_queries(monkeypatch):
    """Triton takes 8-bit queries for coarse bounds of few dims too, where it finds exact ones as fast."""
    monkeypatch.setattr(triton, "FEW_DIMS", 0)


@pytest.mark.usefixtures("rounded_queries")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("coarse", [False, True], ids=["exact", "coarse"])
def test_the_exact_score_is_inside_on_triton(dtype, coarse):
    """Few calls for many pairs, since the interpreter takes 0.1 s for a document."""
    for seed, dim in enumerate((1, 7, 40)):
        q = torch.stack([hard(seed + i, 3, dim, dtype) for i in range(8)])
        d = torch.stack([hard(50 + seed + i, 5, dim, dtype) for i in range(4)])
        weights = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)) if seed % 2 else None
        all_inside(q, d, weights, normalize=seed == 1, mean=seed == 2, coarse=coarse)


def all_inside(q, d, weights=None, *, normalize=False, mean=False, coarse=False):
    """Queries [n_q, l_q, dim] with documents [n_d, l_d, dim] on Triton, every pair."""
    at = torch.arange(len(d) + 1) * d.shape[1]
    options = dict(normalize=normalize, reduce="mean" if mean else "sum", coarse=coarse, backend="triton")
    w = None if weights is None else weights.to(TRITON_DEVICE)
    codes = quantize(d.flatten(0, 1).to(TRITON_DEVICE))
    found = bound_corpus(q.to(TRITON_DEVICE), codes, at.to(TRITON_DEVICE), q_weights=w, **options)
    lower, upper = (x.tolist() for x in found)
    for i, j in itertools.product(range(len(q)), range(len(d))):
        score = exact_score(q[i], d[j], None if weights is None else weights[i], normalize=normalize, mean=mean)
        assert Decimal(lower[i][j]) <= score <= Decimal(upper[i][j]), (i, j)


def inside(q, d, weights=None, *, normalize=False, mean=False, coarse=False, where=("auto", "cpu")):
    backend, device = where
    options = dict(normalize=normalize, reduce="mean" if mean else "sum", coarse=coarse, backend=backend)
    options |= dict(q_weights=None if weights is None else weights.to(device))
    at = torch.tensor([0, len(d)], device=device)
    lower, upper = bound_corpus(q.to(device), quantize(d.to(device)), at, **options)
    score = exact_score(q, d, weights, normalize=normalize, mean=mean)
    assert Decimal(lower.item()) <= score <= Decimal(upper.item())
    return lower, upper


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dim", [517, 1030, 4096])
@pytest.mark.parametrize("normalize", [False, True])
def test_many_dims(dim, normalize, where):
    for seed in range(1 if where[0] == "triton" else 3):
        q, d = hard(seed, 2, dim, torch.float32), hard(seed + 7, 3, dim, torch.float32)
        for coarse in (False, True):
            inside(q, d, normalize=normalize, coarse=coarse, where=where)


@given(st.integers(0, 10**6), st.floats(-38, 38))
@settings(max_examples=40, deadline=None)
def test_the_whole_range_of_float32(seed, exponent):
    g = torch.Generator().manual_seed(seed)
    q, d = torch.randn(2, 6, generator=g), torch.randn(3, 6, generator=g)
    inside(q, (d.double() * 10.0**exponent).float().clamp(-3e38, 3e38))
    inside((q.double() * 10.0**exponent).float().clamp(-3e38, 3e38), d)
    inside(q.double() * 10.0 ** (exponent * 8), d.double())


@pytest.mark.usefixtures("rounded_queries")
@pytest.mark.parametrize("coarse", [False, True], ids=["exact", "coarse"])
def test_the_whole_range_of_float32_on_triton(coarse):
    g = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.linspace(-44, 38, 12, dtype=torch.float64)[:, None, None]
    q, d = ((torch.randn(12, 2, 6, generator=g) * scale).float().clamp(-3e38, 3e38) for _ in range(2))
    all_inside(q, d[::2], coarse=coarse)
    all_inside(q, d[1::2], normalize=True, coarse=coarse)


@pytest.mark.parametrize("where", PLACES)
def test_bounds_are_tight(where):
    """Half a step of the codes, not more: a wide bound is right and useless."""
    backend, device = where
    g = torch.Generator().manual_seed(0)
    q, d = (
        torch.nn.functional.normalize(torch.randn(n, l, 128, generator=g), dim=-1).to(device)
        for n, l in ((2, 64), (3, 24) if backend == "triton" else (20, 64))  # noqa: E741
    )
    codes = quantize(d)
    lower, upper = maxsim_bounds(q, codes, backend=backend)
    reach = codes.error.max() * q.norm(dim=-1).sum(-1, keepdim=True)
    assert (upper - lower <= 2.1 * reach).all() and (upper - lower >= 0.5 * reach).all()
    least, most = maxsim_bounds(q, codes, backend="reference")
    assert (upper - lower <= 1.1 * (most - least)).all()
    truth = maxsim(q.double(), d.double(), backend="reference")
    assert (lower <= truth).all() and (truth <= upper).all()
    small = QuantizedTokens(codes.codes, codes.scale, torch.zeros_like(codes.error), "int8", 128)
    truth = maxsim(q.double(), codes.dequantize(torch.float64), backend="reference")
    for normalize in (False, True):
        lower, upper = maxsim_bounds(q, small, normalize=normalize, backend=backend)
        assert (upper - lower <= 64 * 2.0**-9).all()


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_codes_that_lose_nothing(dtype, where):
    """Only what the backend itself rounds is left: sums of numbers that cancel."""
    backend, device = where
    g = torch.Generator().manual_seed(0)
    q, codes = torch.randn(4, 1, 64, generator=g), torch.randint(-127, 128, (6, 1, 64), generator=g)
    q[..., 1::2], codes[..., 1::2] = -q[..., ::2] * (1 + 2.0**-7), codes[..., ::2]
    q, scale = q.to(dtype), torch.rand(6, 1, generator=g) + 0.5
    d = QuantizedTokens(codes.to(torch.int8), scale, torch.zeros_like(scale), "int8", 64).to(device)
    for normalize in (False, True):
        lower, upper = (x.tolist() for x in maxsim_bounds(q.to(device), d, normalize=normalize, backend=backend))
        for i, j in itertools.product(range(4), range(6)):
            score = exact_score(q[i], d[j].dequantize(torch.float64), normalize=normalize)
            assert Decimal(lower[i][j]) <= score <= Decimal(upper[i][j])


@pytest.mark.parametrize("where", PLACES)
def test_every_form(where):
    backend, device = where
    g = torch.Generator().manual_seed(0)
    shapes = (3, 4, 24), (3, 7, 24), (3, 2, 7, 24)
    q, d, own = (torch.randn(shape, generator=g).to(device) for shape in shapes)
    keep, kept = ((torch.rand(3, n, generator=g) < 0.6).to(device) for n in (4, 7))
    some_q, some_d = [q[0], q[1, :2], q[2]], [d[0, :3], d[1, :0], d[2]]
    for call in (
        (q, d),
        (q[0], d),
        (q, d[1]),
        (q[0], d[1]),
        (q, own),
        (some_q, some_d),
        (q, some_d),
        (some_q, d),
        (q, d, keep, kept),
    ):
        for options in ({}, dict(normalize=True, reduce="mean", empty_score=0.1)):
            x, y, *masks = call
            codes = [quantize(item) for item in y] if isinstance(y, list) else quantize(y)
            lower, upper = maxsim_bounds(x, codes, *masks, **options, backend=backend)
            truth = maxsim(*([i.double() for i in z] if isinstance(z, list) else z.double() for z in (x, y)), *masks,
                           **options, backend="reference")  # fmt: skip
            assert lower.shape == upper.shape == truth.shape and lower.dtype == torch.float32
            empty = options.get("empty_score", -math.inf)
            for x in (lower, upper):
                assert torch.equal(x == torch.tensor(empty, device=device), truth == empty)
            found = truth != empty
            assert ((lower <= truth) & (truth <= upper))[found].all()
    flat, ends = torch.randn(20, 24, generator=g).to(device), torch.tensor([0, 5, 5, 20], device=device)
    for normalize, queries in itertools.product((False, True), (q, some_q)):
        lower, upper = bound_corpus(queries, quantize(flat), ends, normalize=normalize, coarse=True, backend=backend)
        wide = [x.double() for x in queries]
        truth = maxsim(wide, [flat[:5], flat[:0], flat[5:]], normalize=normalize, backend="reference")
        assert ((lower <= truth) & (truth <= upper)).all() and (upper[:, 1] == -math.inf).all()


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "list"])
def test_queries_of_several_tiles_on_triton(ragged):
    """Parts of bounds, of 128 query tokens or fewer, are rounded outwards and added up."""
    g, l_q = torch.Generator().manual_seed(0), 260 if GPU else 40
    q, d = (torch.randn(shape, generator=g).to(TRITON_DEVICE) for shape in ((2, l_q, 8), (3, 5, 8)))
    keep, kept = torch.ones(2, l_q, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    keep[0, : l_q // 2], kept[1] = False, False
    keep, kept, weights = keep.to(q.device), kept.to(q.device), torch.randn(2, l_q, generator=g).to(q.device)
    options = dict(reduce="mean", empty_score=0.1)
    masks = (keep, kept) if not ragged else (list(keep), kept)
    queries, w = (list(q), list(weights)) if ragged else (q, weights)
    for cut in (False, True):
        if cut:
            q[1, -1, 0] = math.nan
            queries = list(q) if ragged else q
        lower, upper = maxsim_bounds(queries, quantize(d), *masks, q_weights=w, **options, backend="triton")
        truth = maxsim(q.double(), d.double(), keep, kept, q_weights=weights.double(), **options, backend="reference")
        assert (lower[:, 1] == torch.tensor(0.1)).all() and torch.equal(lower[:, 1], upper[:, 1])
        assert torch.equal(truth.isnan(), lower.isnan()) and torch.equal(lower.isnan(), upper.isnan())
        inner, sound = truth[:, ::2], ~truth[:, ::2].isnan()
        assert ((lower[:, ::2] < inner) & (inner < upper[:, ::2]))[sound].all()
        assert (upper - lower)[:, ::2][sound].max() < 0.2


@pytest.mark.parametrize("where", PLACES)
def test_edges(where):
    backend, device = where
    g = torch.Generator().manual_seed(0)
    q, d = (torch.randn(shape, generator=g).to(device) for shape in ((3, 4, 8), (2, 5, 8)))
    codes = quantize(d)
    for bad in (math.nan, math.inf):
        x = q.clone()
        x[1, 2, 3] = bad
        keep = torch.ones(3, 4, dtype=torch.bool, device=device)
        lower, upper = maxsim_bounds(x, codes, backend=backend)
        assert (torch.stack([lower[1], upper[1]]).isnan() == math.isnan(bad)).all()
        assert math.isnan(bad) or ((lower[1] == -math.inf) & (upper[1] == math.inf)).all()
        assert lower[[0, 2]].isfinite().all()
        keep[1, 2], keep[2] = False, False
        lower, upper = maxsim_bounds(x, codes, keep, backend=backend)
        assert lower.isfinite().all() and not lower[2].any() and not upper[2].any()
    # neither a weight that is not finite nor sums beyond float64 make a bound that is wrong
    weights = torch.ones(3, 4, device=device)
    weights[1, 2] = math.inf
    score = maxsim(q, d, q_weights=weights)
    lower, upper = maxsim_bounds(q, codes, q_weights=weights, backend=backend)
    assert ((lower <= score) & (score <= upper)).all() and lower[[0, 2]].isfinite().all()
    for sign in (1, -1) if backend != "triton" else ():
        big = torch.full((1, 1, 8), sign * 1e306, dtype=torch.float64)
        lower, upper = maxsim_bounds(big, quantize(torch.ones(1, 1, 8)), backend=backend)
        assert lower <= sign * 8e306 <= upper
    # a token that has no code: its document's score may be anything above the others'
    unknown = QuantizedTokens(codes.codes, codes.scale, codes.error.clone(), "int8", 8)
    unknown.error[0, 1] = math.inf
    for normalize in (False, True):
        lower, upper = maxsim_bounds(q, unknown, normalize=normalize, backend=backend)
        assert (upper[:, 0] == math.inf).all() and upper[:, 1].isfinite().all()
        assert torch.equal(lower[:, 1], maxsim_bounds(q, codes, normalize=normalize, backend=backend)[0][:, 1])
    # what a masked token holds does not matter
    kept = torch.ones(2, 5, dtype=torch.bool, device=device)
    kept[0, 1] = False
    unknown.scale[0, 1] = math.nan
    lower, upper = maxsim_bounds(q, unknown, d_mask=kept, backend=backend)
    for x, y in zip((lower, upper), maxsim_bounds(q, codes, d_mask=kept, backend=backend), strict=True):
        assert x.isfinite().all() and torch.equal(x, y)
    assert maxsim_bounds(q, codes[:0], backend=backend)[0].shape == (3, 0)
    lower, upper = maxsim_bounds(q, codes[:, :0], empty_score=0.1, backend=backend)
    assert lower.eq(0.1).all() and upper.eq(0.1).all()
    assert not maxsim_bounds(q.requires_grad_(), codes, backend=backend)[0].requires_grad


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_processor_that_flushes_subnormal_numbers(sign, where):
    backend, device = where
    q, d = torch.full((2, 8), sign * 1e-30, device=device), quantize(torch.full((3, 8), 1e-30, device=device))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        lower, upper = (float(x) for x in maxsim_bounds(q, d, backend=backend))
    finally:
        torch.set_flush_denormal(False)
    assert lower <= sign * 16e-60 <= upper


@pytest.mark.torch_path
def test_blocks_change_nothing_but_rounding(monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, d = torch.randn(3, 4, 24, generator=g), quantize(torch.randn(6, 50, 24, generator=g))
    mask = torch.rand(6, 50, generator=g) < 0.5
    whole = maxsim_bounds(q, d, d_mask=mask)
    for size in (1000, 4000, 20000):
        monkeypatch.setattr("latemax.ops.backends.bounds.BLOCK_BYTES", size)
        monkeypatch.setattr("latemax.ops.backends.bounds.ROWS", 8)
        for ours, truth in zip(maxsim_bounds(q, d, d_mask=mask), whole, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)


def test_refusals():
    q, d = torch.randn(2, 5, 24), torch.randn(3, 9, 24)
    with pytest.raises(TypeError, match="d must be QuantizedTokens or a list of them, got Tensor"):
        maxsim_bounds(q, d)
    with pytest.raises(TypeError, match="d must be QuantizedTokens of kind 'int8', whose error is known; got 'binary'"):
        maxsim_bounds(q, quantize(d, "binary"))
    with pytest.raises(TypeError, match="maxsim_bounds takes no QuantizedTokens; got them as q"):
        maxsim_bounds(quantize(q), quantize(d))
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: the CUDA kernels have no bounds"):
        maxsim_bounds(q, quantize(d), backend="cuda")
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: .* not float64"):
        maxsim_bounds(q.double().to(TRITON_DEVICE), quantize(d.to(TRITON_DEVICE)), backend="triton")
    with pytest.raises(ValueError, match="same dim"):
        maxsim_bounds(q[..., :8], quantize(d))


@pytest.mark.parametrize("where", PLACES)
def test_opcheck(where):
    backend, device = where
    q, d = torch.randn(2, 5, 24, device=device), quantize(torch.randn(3, 9, 24, device=device))
    for coarse in (False, True):
        torch.library.opcheck(
            torch.ops.latemax.maxsim_bounds, (q, d.codes, d.scale, d.error, None, None, True, -1.0, backend),
            dict(coarse=coarse), test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip


def test_explain_and_warmup():
    q, d = torch.randn(2, 5, 24), quantize(torch.randn(3, 9, 24))
    assert latemax.explain(q, d, bounds=True).backend == "cpu"
    choice = latemax.explain(q.to(TRITON_DEVICE), d.to(TRITON_DEVICE), bounds=True, backend="triton")
    assert choice.backend == "triton" and choice.tile.block_d == 64
    assert "float64" in latemax.explain(q.double(), d, bounds=True).why
    with pytest.raises(TypeError, match="d must be QuantizedTokens of kind 'int8'"):
        latemax.explain(q, quantize(torch.randn(3, 9, 24), "binary"), bounds=True)
    with pytest.raises(ValueError, match="bounds have no argmax"):
        latemax.explain(q, d, bounds=True, return_argmax=True)
    choice = latemax.warmup(dim=24, l_q=5, dtype=torch.float32, device=TRITON_DEVICE, bounds=True, backend="triton")
    assert choice.backend == "triton"
    with pytest.raises(ValueError, match="bounds have no argmax"):
        latemax.warmup(device="cpu", bounds=True, return_argmax=True)


def test_torch_sees_one_operator():
    torch._dynamo.reset()
    q, d = torch.randn(2, 5, 24), quantize(torch.randn(3, 9, 24))
    ours = torch.compile(lambda q, d: maxsim_bounds(q, d, normalize=True), fullgraph=True, backend="aot_eager")(q, d)
    for x, y in zip(ours, maxsim_bounds(q, d, normalize=True), strict=True):
        torch.testing.assert_close(x, y)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map(mode.from_tensor, (q, d))
        assert maxsim_bounds(*fake)[1].shape == (2, 3)
    batched = torch.vmap(lambda q: latemax.maxsim_bounds(q, d)[0])(q)
    torch.testing.assert_close(batched, maxsim_bounds(q, d)[0], rtol=1e-3, atol=1e-3)
    assert maxsim_pairs(q, d[:2]).shape == (2,)
