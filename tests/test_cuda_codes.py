"""8-bit codes in the CUDA kernels' own sources, in the emulator: similarities, maxima and argmax to the last bit, every
form through the public calls, and what the kernels do not take.
"""

import math

import pytest
import test_codes
import torch
from common import masks
from hypothesis import given
from hypothesis import strategies as st
from test_codes import numbers
from test_cuda_emulated import SEEDS, chosen, device, emulator, first_order  # noqa: F401
from test_cuda_random import gpus, keeps, lengths, many

import latemax
from latemax import QuantizedTokens, maxsim, maxsim_pairs, maxsim_varlen, quantize, rerank
from latemax.ops import tiles
from latemax.ops.backends import cuda
from latemax.ops.problem import Batch, Codes, Outputs, Plan, Side

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())
# one and two slabs of 128 dims in registers, more in shared memory; steps of 32 dims, and half of one at the end
SHAPES = [
    pytest.param((1, 1, 1, 1, 16), id="ones"),
    pytest.param((1, 3, 5, 17, 48), id="short"),
    pytest.param((2, 3, 17, 196, 128), id="patches"),
    pytest.param((9, 4, 8, 65, 64), id="packed"),
    pytest.param((5, 7, 96, 70, 80), id="slots"),
    pytest.param((3, 2, 140, 70, 192), id="chunks"),
    pytest.param((2, 2, 513, 33, 32), id="513"),
    pytest.param((1, 2, 3, 1030, 32), id="1030-patches"),
    pytest.param((2, 1, 200, 130, 256), id="dim256"),
    pytest.param((2, 1, 33, 90, 272), id="dim272"),
    pytest.param((3, 2, 40, 64, 432), id="dim432"),
    pytest.param((1, 2, 20, 128, 640), id="dim640"),
]


def problem(shape, *, own=False, seed=0):
    """Random codes with scales over three orders of magnitude."""
    n_q, n_d, l_q, l_d, dim = shape
    generator = torch.Generator().manual_seed(seed)

    def codes(*leading):
        x = torch.randint(-127, 128, (*leading, dim), generator=generator).to(torch.int8)
        scale = torch.exp(torch.randn(leading, generator=generator))
        return QuantizedTokens(x, scale, torch.zeros_like(scale), "int8", dim)

    return codes(n_q, l_q), codes(*((n_q,) if own else ()), n_d, l_d)


def side(x, mask=None, offsets=None):
    return Side(x.codes, mask, offsets, codes=Codes("int8", x.dim, x.scale, x.error))


def run(q, d, q_mask=None, d_mask=None, *, argmax=True, normalize=False, empty_score=-math.inf):
    n_q, l_q, _ = q.shape
    shape = n_q, d.shape[-3]
    scores = torch.full(shape, math.nan)
    where = torch.full((*shape, l_q), -99, dtype=torch.int32) if argmax else None
    b = Batch(side(q, q_mask), side(d, d_mask), None, normalize, empty_score)
    cuda.forward(b, Plan("cuda", "", launch=cuda.Launch()), Outputs(scores, where))
    return scores, where


def factors(x, normalize):
    """What the kernels multiply integers with, in float32."""
    if not normalize:
        return x.scale
    norm = x.codes.double().square().sum(-1).float().sqrt()
    return x.scale / (x.scale * norm).clamp(min=1e-12)


def truth(q, d, q_mask=None, d_mask=None, *, normalize=False, empty_score=-math.inf):
    """Scores in float64 from float32 similarities, and the argmax of these, the lowest of equal ones."""
    sims = torch.einsum("qic,qkjc->qkij" if d.codes.dim() == 4 else "qic,kjc->qkij", q.codes.double(), d.codes.double())
    sims = sims.float() * factors(d, normalize).unsqueeze(-2)
    if d_mask is not None:
        sims = sims.masked_fill(~d_mask.unsqueeze(-2), -math.inf)
    best, first = sims.amax(-1), (sims == sims.amax(-1, keepdim=True)).byte().argmax(-1).int()
    q_mask = torch.ones(q.shape[:2], dtype=torch.bool) if q_mask is None else q_mask
    none = torch.zeros(d.shape[:-2], dtype=torch.bool) if d_mask is None else ~d_mask.any(-1)
    terms = best.double() * factors(q, normalize).double().unsqueeze(1)
    scores = terms.masked_fill(~q_mask.unsqueeze(1), 0).sum(-1)
    scores = scores.masked_fill(none & q_mask.any(-1, keepdim=True), empty_score)
    return scores, first.masked_fill(~q_mask.unsqueeze(1) | none.unsqueeze(-1), -1)


def assert_right(q, d, q_mask=None, d_mask=None, **options):
    scores, argmax = run(q, d, q_mask, d_mask, **options)
    assert torch.equal(run(q, d, q_mask, d_mask, argmax=False, **options)[0], scores)
    wanted, where = truth(q, d, q_mask, d_mask, **options)
    terms = wanted.abs().nan_to_num(posinf=0).amax()
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-6, atol=1e-6 * terms.item())
    assert torch.equal(argmax, where)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(device, shape, own):  # noqa: F811
    for seed in (1,) if own else SEEDS:
        device(seed)
        assert_right(*problem(shape, own=own), normalize=seed == 2 or own)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("shape", [(3, 4, 20, 70, 96), (2, 3, 140, 129, 128), (5, 2, 7, 200, 272)], ids=str)
def test_masks_with_poison_under_them(device, shape, own, normalize):  # noqa: F811
    for seed in SEEDS:
        device(seed)
        q, d = problem(shape, own=own)
        q_mask, d_mask = masks(q.codes, d.codes)
        d_mask[..., 1, :] = False
        q_mask[1] = False
        for x, keep in ((q, q_mask), (d, d_mask)):
            x.scale[~keep] = torch.tensor([math.nan, math.inf, -math.inf, 0.0])[torch.arange(int((~keep).sum())) % 4]
        assert_right(q, d, q_mask, d_mask, normalize=normalize, empty_score=-3.0)


def test_ties_zeros_and_scales_that_are_no_numbers(device):  # noqa: F811
    q, d = problem((2, 4, 20, 200, 64))
    d.codes[0, 10:], d.scale[0, 10:] = d.codes[0, :10].repeat(19, 1), d.scale[0, :10].repeat(19)
    # the second half has double codes of half the scale: equal similarities
    d.codes[1, :100] = d.codes[1, :100].div(2, rounding_mode="floor").clamp(-63)
    d.codes[1, 100:], d.scale[1, 100:] = d.codes[1, :100] * 2, d.scale[1, :100] / 2
    d.scale[2, 1::2] = 0
    for seed in SEEDS:
        device(seed)
        _, argmax = run(q, d)
        assert argmax[:, 0].max() < 10 and argmax[:, 1].max() < 100
        assert_right(q, d)
        assert_right(q, d, normalize=True)
    # a query token that is zero ties with every token, a document of zeros with every query token
    q.scale[0, 3], q.codes[1, 5], d.codes[3] = 0, 0, 0
    keep = torch.ones(4, 200, dtype=torch.bool)
    keep[:, :71] = False
    for normalize in (False, True):
        scores, argmax = run(q, d, None, keep, normalize=normalize)
        assert (argmax[0, :, 3] == 71).all() and (argmax[1, :, 5] == 71).all() and (argmax[:, 3] == 71).all()
        assert (scores[:, 3] == 0).all()
    d.scale[1, 77] = math.nan
    scores, argmax = run(q, d)
    assert scores[:, 1].isnan().all() and (argmax[1, 1] == 77).all() and scores[:, [0, 2, 3]].isfinite().all()
    q.scale[1, 2] = math.nan
    assert run(q, d)[0][1].isnan().all()


def test_saturated_codes_of_the_widest_dim(device, monkeypatch):  # noqa: F811
    """Sums beyond 2^24, where integers are rounded to float."""
    for shared in (101376, 232448):
        device(2, shared=shared)
        monkeypatch.setitem(tiles.SHARED_MEMORY, device.capability, shared)
        dim = cuda.most_dims(device.capability, 1)
        assert dim == 2 * cuda.most_dims(device.capability)
        q, d = problem((1, 1, 100, 70, dim))
        q.codes[0, :50], d.codes[0, :50] = 127, 127
        q.codes[0, 7], d.codes[0, 9] = -128, -128
        d.codes[0, 9, -1] = 5
        for normalize in (False, True):
            scores, argmax = run(q, d, normalize=normalize)
            x, y = (
                torch.nn.functional.normalize(x, dim=-1) if normalize else x for x in (numbers(q)[0], numbers(d)[0])
            )
            sims = x @ y.T
            torch.testing.assert_close(scores[0, 0].double(), sims.amax(-1).sum(), rtol=1e-6, atol=0)
            # by value: floats of 24 bits tie where these do not
            won = sims.gather(1, argmax[0, 0].long().unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(won, sims.amax(-1), rtol=3e-7, atol=0)
        with pytest.raises(RuntimeError, match="more shared memory than this GPU has"):
            run(*problem((4, 1, 128, 9, 2 * dim)))


@pytest.mark.parametrize(
    ("shape", "own", "multiprocessors"),
    [((1, 1, 300, 700, 32), False, 16), ((1, 5, 20, 330, 16), False, 13), ((3, 3, 70, 200, 272), True, 7)],
    ids=str,
)
def test_documents_cut_between_thread_blocks(device, shape, own, multiprocessors):  # noqa: F811
    q, d = problem(shape, own=own)
    for normalize in (False, True):
        device(2, multiprocessors, launch_clocks=2**30)
        scores, argmax = run(q, d, normalize=normalize)
        products = emulator.products()
        for seed in SEEDS:
            device(seed, multiprocessors)
            cut, where = run(q, d, normalize=normalize)
            assert emulator.products() == products
            assert torch.equal(cut, scores) and torch.equal(where, argmax)


def test_strides(device):  # noqa: F811
    q, wide = problem((4, 5, 20, 70, 96), own=True)
    d = wide[0]

    def moved(x, change, dims=slice(None)):
        scale = change(x.scale.unsqueeze(-1)).squeeze(-1).contiguous()
        codes = change(x.codes)[..., dims]
        return QuantizedTokens(codes, scale, torch.zeros_like(scale), "int8", codes.shape[-1])

    def misaligned(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    cases = {
        "sliced dims": (moved(q, torch.Tensor.detach, slice(16, 80)), moved(d, torch.Tensor.detach, slice(16, 80))),
        "unaligned": (moved(q, torch.Tensor.detach, slice(1, 65)), moved(d, torch.Tensor.detach, slice(3, 67))),
        "transposed": (moved(q, lambda x: x.transpose(0, 1)), moved(d, lambda x: x.transpose(0, 1))),
        "every second": (moved(q, lambda x: x[::2, ::2]), moved(d, lambda x: x[::2, 1::3])),
        "dims not last": (q, moved(d, lambda x: x.mT.contiguous().mT)),
        "expanded documents": (q, moved(d, lambda x: x[:1].expand(3, -1, -1))),
        "expanded candidates": (q, moved(wide, lambda x: x[:1].expand(4, -1, -1, -1))),
        "expanded queries": (moved(q, lambda x: x[:1].expand(3, -1, -1)), d),
        "contiguous but misaligned": (moved(q, misaligned), moved(d, misaligned)),
        "expanded tokens": (
            moved(q, lambda x: x[:, :1].expand(-1, 9, -1)),
            moved(d, lambda x: x[:, :1].expand(-1, 7, -1)),
        ),
    }
    for name, (a, b) in cases.items():
        try:
            assert_right(a, b)
            assert_right(a, b, None, torch.rand(b.shape[:-1]) < 0.7, normalize=True)
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@many
@given(data=st.data())
def test_random_codes(device, data):  # noqa: F811
    seed, multiprocessors, shared, most = data.draw(gpus(device.capability))
    dim = 16 * data.draw(st.one_of(st.integers(1, 24), st.integers(1, 2 * most // 16)))
    l_q, l_d = data.draw(lengths(8, 32, 64, 65, 128, 129, 200, 300)), data.draw(lengths(1, 48, 64, 65, 128, 300, 500))
    n_q, n_d, own = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4)), data.draw(st.booleans())
    while n_q > 1 and n_q * l_q > 500:
        n_q -= 1
    while n_d > 1 and n_q * l_q * n_d * l_d * dim > 2e7:
        n_d -= 1
    q, d = problem((n_q, n_d, l_q, l_d, dim), own=own, seed=seed)
    q_mask, d_mask = keeps(data.draw, q.shape[:-1], seed), keeps(data.draw, d.shape[:-1], seed + 1)
    for x, keep in ((q, q_mask), (d, d_mask)):
        if keep is not None:
            x.scale[~keep] = math.nan
    device(seed, multiprocessors, shared, data.draw(st.sampled_from([0, 4000])))
    assert_right(q, d, q_mask, d_mask, normalize=data.draw(st.booleans()), empty_score=-2.0)


@pytest.mark.parametrize("dim", [32, 144])
def test_every_form(chosen, device, dim):  # noqa: F811
    """Ragged, candidates, lists and masks through the public calls."""
    q, d = problem((3, 3, 40, 70, dim))
    own, flat_d, flat_q = problem((3, 2, 4, 70, dim), own=True)[1], d[0], q[0]
    flat_d = QuantizedTokens(*(x.flatten(0, 1) for x in (d.codes, d.scale, d.error)), "int8", dim)
    some_q, some_d = [q[0], q[1][:2], q[2]], [d[0][:3], d[1][:0], d[2]]
    ends = torch.tensor([0, 65, 65, 210])
    q_ends = torch.tensor([0, 1, 40])
    pick, rows = torch.tensor([[2, 0, -1], [1, 1, 2], [0, 2, 0]]), torch.tensor([2, 0, 0])
    keep_q, keep_d = masks(q.codes, d.codes)
    for seed, normalize in ((1, False), (2, True)):
        device(seed)
        for call, sides in (
            (maxsim, (q, d)),
            (maxsim, (q[0], d)),
            (maxsim, (q, d[1])),
            (maxsim, (q, own)),
            (maxsim, (some_q, d)),
            (maxsim, (q, some_d)),
            (maxsim, (some_q, some_d)),
            (maxsim_pairs, (q, d)),
            (maxsim_pairs, (some_q, some_d)),
            (lambda q, d, **o: maxsim(q, d, keep_q, keep_d, **o), (q, d)),
            (lambda q, d, **o: maxsim_varlen(q, d, q_ends, ends, empty_score=-3.0, **o), (flat_q, flat_d)),
            (lambda q, d, **o: rerank(q, d, ends, pick, empty_score=-2.0, **o), (q, flat_d)),
            (lambda q, d, **o: rerank(q, d, ends, pick, query_ids=rows, **o), (q, flat_d)),
            (lambda q, d, **o: rerank(q, d, ends, pick, query_ids=rows, **o), (some_q, flat_d)),
            (lambda q, d, **o: rerank((q, q_ends), d, ends, pick[:2], **o), (flat_q, flat_d)),
            (lambda q, d, **o: rerank(q, d, None, pick, **o), (q, some_d)),
        ):
            ours = call(*sides, normalize=normalize, backend="cuda")
            wanted = call(*numbers(list(sides)), normalize=normalize, backend="reference")
            assert ours.dtype == torch.float32 and ours.shape == wanted.shape
            torch.testing.assert_close(ours.double(), wanted, rtol=2e-6, atol=1e-3 * (not normalize) + 2e-6)
        ours = maxsim_varlen(
            flat_q, flat_d, q_ends, ends, normalize=normalize, return_argmax=True, backend="cuda"
        )  # fmt: skip
        wanted = maxsim_varlen(
            numbers(flat_q), numbers(flat_d), q_ends, ends, normalize=normalize, return_argmax=True, backend="reference"
        )
        assert torch.equal(ours[1], wanted[1])
    assert maxsim(q, d[:0], backend="cuda").shape == (3, 0)
    assert maxsim(q, d[:, :0], empty_score=1.0, backend="cuda").eq(1).all()


def test_the_tests_of_codes(chosen):  # noqa: F811
    test_codes.test_products_of_codes_are_exact(("cuda", "cpu"), "int8")
    test_codes.test_every_form(("cuda", "cpu"), "int8", True)


def test_what_the_kernels_do_not_take(chosen):  # noqa: F811
    x, y = torch.randn(2, 5, 32), torch.randn(3, 9, 32)
    q, d = quantize(x), quantize(y)
    choice = latemax.explain(q, d, backend="cuda")
    assert choice.backend == "cuda" and "codes have no gradient" in choice.notes
    weights = torch.ones(2, 5)
    for why, sides, options in (
        ("8-bit codes, not 1-bit ones", (quantize(x, "binary"), quantize(y, "binary")), {}),
        ("8-bit codes, not 1-bit ones", (x, quantize(y, "binary")), {}),
        ("8-bit codes of d only with those of q, not with q of torch.bfloat16", (x.bfloat16(), d), {}),
        ("8-bit codes of d only with those of q, not with q of torch.float32", (x, d), {}),
        ("neither weights nor the mean", (q, d), dict(q_weights=weights)),
        ("neither weights nor the mean", (q, d), dict(reduce="mean")),
        ("dim must be a multiple of 16, not 24", (quantize(x[..., :24]), quantize(y[..., :24])), {}),
        ("keep whole query tokens in shared memory: dim up to", [quantize(torch.ones(1, 1, 4096))] * 2, {}),
    ):
        with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run: the CUDA kernels .*{why}"):
            maxsim(*sides, backend="cuda", **options)
