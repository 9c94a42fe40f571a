"""maxsim and its siblings on QuantizedTokens: every form and backend against the oracle on the numbers they mean."""

from __future__ import annotations

import math

import pytest
import torch
from common import BACKENDS, TRITON_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

import latemax
from latemax import MaxSim, QuantizedTokens, maxsim, maxsim_pairs, maxsim_varlen, quantize, reference, rerank
from latemax.ops.backends import decode
from latemax.quantized import KINDS

# the CUDA kernels take only int8 codes with int8 codes: other tests are skipped with their reason (see common.py)
PLACES = [*BACKENDS[:3], pytest.param(("reference", "cpu"), id="reference"), BACKENDS[3]]


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def numbers(x):
    """What the codes mean, in float64, in the form of x."""
    if isinstance(x, QuantizedTokens):
        return x.dequantize(torch.float64)
    if isinstance(x, (list, tuple)):
        return type(x)(numbers(item) for item in x)
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def allowed(q: torch.Tensor, d: QuantizedTokens, normalize: bool = False) -> torch.Tensor:
    """2^-12 · Σ_i ‖q_i‖ · max_j ‖x̂_j‖, which the contract allows, [n_q, 1]."""
    if normalize:
        return torch.full((len(q), 1), 2.0**-12 * q.shape[1], dtype=torch.float64)
    longest = d.dequantize(torch.float64).norm(dim=-1).max().cpu()
    return 2.0**-12 * q.double().cpu().norm(dim=-1).sum(-1, keepdim=True) * longest


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_those_of_the_numbers(where, kind, dtype):
    backend, device = where
    cases = ((37, True), (128, False), (1, False), (16, True), (37, False), (128, True))
    for dim, normalize in cases[:2] if backend == "triton" else cases:
        q, d = tokens(2, 5, dim, dtype=dtype, device=device), quantize(tokens(3, 70, dim, seed=1, device=device), kind)
        q_mask, d_mask = torch.ones(2, 5, dtype=torch.bool), torch.rand(3, 70) < 0.7
        q_mask[1, 3:], d_mask[:, 0] = False, True
        masks = q_mask.to(device), d_mask.to(device)
        options = dict(normalize=normalize, return_argmax=True)
        scores, argmax = maxsim(q, d, *masks, **options, backend=backend)
        truth, _ = reference.maxsim(q.double(), numbers(d), *masks, **options)
        assert scores.dtype == torch.float32
        assert ((scores.double() - truth).abs().cpu() <= allowed(q, d, normalize)).all()
        q64, d64 = (torch.nn.functional.normalize(x, dim=-1) if normalize else x for x in (q.double(), numbers(d)))
        sims = torch.einsum("qic,kjc->qkij", q64, d64).masked_fill(~masks[1][:, None], -math.inf)
        won = sims.gather(-1, argmax.clamp_min(0).long().unsqueeze(-1)).squeeze(-1)
        off = 2.0**-11 * q64.norm(dim=-1).unsqueeze(1) * d64.norm(dim=-1).max()
        assert ((won >= sims.amax(-1) - off) | ~masks[0].unsqueeze(1)).all()
        assert torch.equal(argmax < 0, ~masks[0].unsqueeze(1).expand_as(argmax))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_codes_are_exact(where, kind):
    """All sums are integers below 2^24 or rounded once; scales are powers of two, so that nothing else rounds."""
    backend, device = where
    dims = {"triton": (517,), "cuda": (16, 80, 128, 528, 1040)}.get(backend, (1, 24, 128, 517, 1030, 4096))
    for dim in dims:
        q, d = (
            quantize(tokens(2, 5, dim, device=device), kind),
            quantize(tokens(3, 9, dim, seed=1, device=device), kind),
        )
        q, d = (QuantizedTokens(x.codes, torch.full_like(x.scale, 0.25), x.error, kind, dim) for x in (q, d))
        scores, argmax = maxsim(q, d, return_argmax=True, backend=backend)
        assert torch.equal(argmax, reference.maxsim(numbers(q), numbers(d), return_argmax=True)[1])
        maxima = torch.einsum("qic,kjc->qkij", numbers(q), numbers(d)).amax(-1).float()
        torch.testing.assert_close(scores, maxima.sum(-1), rtol=2e-7, atol=0)
        ours = maxsim(q, d, normalize=True, backend=backend).double()
        torch.testing.assert_close(ours, reference.maxsim(numbers(q), numbers(d), normalize=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of_codes", [False, True], ids=["float", "codes"])
def test_every_form(where, kind, of_codes):
    backend, device = where
    x, y = tokens(3, 4, 32, device=device), tokens(3, 7, 32, seed=1, device=device)
    q, d = quantize(x, kind) if of_codes else x, quantize(y, kind)
    own = quantize(tokens(3, 2, 7, 32, seed=2, device=device), kind)
    flat_q, flat_d = q[0] if of_codes else x.flatten(0, 1), quantize(y.flatten(0, 1), kind)
    some_q, some_d = [q[0], q[1][:2], q[2]], [d[0][:3], d[1][:0], d[2]]
    ends = torch.tensor([0, 5, 5, 21], device=device)
    q_ends = torch.tensor([0, 1, 4], device=device)
    pick, rows = (torch.tensor(v, device=device) for v in ([[2, 0, -1], [1, 1, 2], [0, 2, 0]], [2, 0, 0]))
    weights = tokens(3, 4, seed=3, device=device)
    if backend != "cuda":
        agree(lambda q, d, **o: maxsim(q, d, q_weights=weights, reduce="mean", **o), (q, d), backend)
    agree(lambda q, d, **o: maxsim_pairs(q, d, normalize=True, **o), (q, d), backend)
    agree(lambda q, d, **o: rerank(q, d, ends, pick, query_ids=rows, **o), (some_q, flat_d), backend)
    agree(lambda q, d, **o: maxsim_varlen(q, d, q_ends, ends, empty_score=-3.0, **o), (flat_q, flat_d), backend)
    agree(maxsim, (q, some_d), backend)
    agree(maxsim, (q, own), backend)
    if backend == "triton":  # the interpreter takes half a second a call, and these reach the same kernel
        return
    agree(maxsim, (q[0], d), backend)
    agree(maxsim, (q, d[1]), backend)
    agree(lambda q, d, **o: MaxSim(normalize=True, **o)(q, d), (q, d), backend)
    agree(maxsim, (some_q, some_d), backend)
    agree(maxsim_pairs, (some_q, some_d), backend)
    agree(maxsim, (q, []), backend)
    agree(lambda q, d, **o: rerank(q, d, ends, pick, empty_score=-2.0, **o), (q, flat_d), backend)
    agree(lambda q, d, **o: rerank(q, d, ends, pick, query_ids=rows, normalize=True, **o), (q, flat_d), backend)
    agree(lambda q, d, **o: rerank((q, q_ends), d, ends, pick[:2], **o), (flat_q, flat_d), backend)
    agree(lambda q, d, **o: rerank(q, d, None, pick, **o), (q, some_d), backend)


def agree(call, sides, backend):
    """With codes as with the numbers they mean."""
    ours, truth = call(*sides, backend=backend), call(*numbers(list(sides)), backend="reference")
    assert ours.dtype == torch.float32 and ours.shape == truth.shape
    torch.testing.assert_close(ours.double(), truth, rtol=1e-3, atol=2e-2)


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([517, 1030, 4096]), st.booleans())
@settings(max_examples=12, deadline=None)
def test_hard_tokens_on_the_cpu(seed, kind, dim, normalize):
    """Saturated codes, one-hot and constant tokens, a huge range, subnormals."""
    q, d = hard(seed, dim), quantize(hard(seed + 1, dim), kind)
    truth = reference.maxsim(q.double(), numbers(d), normalize=normalize)
    for backend in ("cpu", "reference"):
        scores = maxsim(q, d, normalize=normalize, backend=backend)
        assert (scores.double() - truth).abs() <= allowed(q[None], d, normalize)


def hard(seed: int, dim: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8, dim, generator=g)
    x[0] = 1.0
    x[1] = torch.where(x[1] > 0, 3.0, -3.0)
    x[2] = 0.0
    x[2, seed % dim] = 5.0
    x[3] *= torch.logspace(-30, 3, dim)
    x[4] *= 2.0**-130
    x[5] = x[6]
    x[7] = 0.0
    return x * 10.0 ** (seed % 5 - 2)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_edges(where, kind):
    backend, device = where
    q, d = tokens(2, 3, 20, device=device), quantize(tokens(4, 6, 20, seed=1, device=device), kind)
    d = QuantizedTokens(d.codes, d.scale.clone(), d.error, kind, 20)
    # equal tokens: the first wins; a masked token may have any scale
    d.codes[0, 3:], d.scale[0, 3:] = d.codes[0, 2], d.scale[0, 2]
    mask = torch.ones(4, 6, dtype=torch.bool, device=device)
    mask[1, 2], mask[3] = False, False
    d.scale[1, 2], d.scale[3, 0] = math.nan, math.inf
    scores, argmax = maxsim(q, d, d_mask=mask, return_argmax=True, empty_score=-7.0, backend=backend)
    assert (argmax[:, 0] <= 2).all() and (argmax[:, 3] == -1).all() and (scores[:, 3] == -7).all()
    assert scores.isfinite().all() and not (argmax[:, 1] == 2).any()
    alone = [maxsim(q, d[i], d_mask=mask[i], empty_score=-7.0, backend=backend) for i in range(4)]
    torch.testing.assert_close(torch.stack(alone, 1), scores, rtol=1e-6, atol=1e-6)
    q[1, 1, 3] = math.nan
    scores = maxsim(q, d, d_mask=mask, empty_score=-7.0, backend=backend)
    assert scores[0].isfinite().all() and scores[1, :3].isnan().all() and scores[1, 3] == -7
    keep = torch.ones(2, 3, dtype=torch.bool, device=device)
    keep[1, 1] = False
    assert maxsim(q, d, keep, mask, backend=backend)[1, 0].isfinite()
    zero = quantize(torch.zeros(2, 3, 20, device=device), kind)
    scores, argmax = maxsim(zero, d, d_mask=mask, return_argmax=True, backend=backend)
    assert not scores[:, :3].any() and not argmax[:, :3].any()
    assert maxsim(q, d[:0], backend=backend).shape == (2, 0)
    assert maxsim(q, d[:, :0], empty_score=1.0, backend=backend).eq(1).all()


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_numbers(where, kind):
    backend, device = where
    x, d = tokens(2, 5, 24, device=device), quantize(tokens(3, 9, 24, seed=1, device=device), kind)
    for normalize in (False, True):
        grads = []
        for codes, name in ((d, backend), (d.dequantize(), "reference")):
            q, w = x.clone().requires_grad_(), torch.ones(2, 5, device=device).mul(0.5).requires_grad_()
            maxsim(q, codes, q_weights=w, normalize=normalize, backend=name).square().sum().backward()
            grads.append((q.grad, w.grad))
        for ours, truth in zip(*grads, strict=True):
            torch.testing.assert_close(ours, truth, rtol=2e-3, atol=2e-2)
    w = torch.ones(2, 5, device=device, requires_grad=True)
    maxsim(quantize(x, kind), d, q_weights=w, backend=backend).sum().backward()
    assert w.grad.isfinite().all() and w.grad.any()
    q = x.flatten(0, 1).requires_grad_()
    ends = torch.tensor([0, 4, 10], device=device), torch.tensor([0, 9, 27], device=device)
    flat = quantize(tokens(27, 24, seed=1, device=device), kind)
    maxsim_varlen(q, flat, *ends, backend=backend).sum().backward()
    q2 = x.flatten(0, 1).requires_grad_()
    maxsim_varlen(q2, flat.dequantize(), *ends, backend="reference").sum().backward()
    torch.testing.assert_close(q.grad, q2.grad, rtol=2e-3, atol=2e-2)


@pytest.mark.torch_path
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_documents_are_decoded_one_at_a_time(kind, monkeypatch):
    largest, integers = 0, decode.integers

    def measured(codes, *rest):
        nonlocal largest
        largest = max(largest, len(codes.flatten(0, -2)))
        return integers(codes, *rest)

    monkeypatch.setattr(decode, "integers", measured)
    q, d = tokens(1, 32, 64), quantize(tokens(60_000, 64), kind)
    maxsim(q, QuantizedTokens(d.codes.view(60, 1000, -1), d.scale.view(60, 1000), None if d.error is None else
                              d.error.view(60, 1000), kind, 64), backend="cpu")  # fmt: skip
    maxsim_varlen(q[0], d, torch.tensor([0, 32]), torch.arange(61) * 1000, backend="cpu")
    assert 1000 <= largest <= 20_000


def test_the_best_backend_is_explained():
    q, d = tokens(2, 5, 24), quantize(tokens(3, 9, 24))
    assert latemax.explain(q, d).backend == "cpu"
    assert latemax.explain(q.double(), d).native is False
    assert maxsim(q.double(), d).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"8-bit codes of d only with|cannot be loaded|no CUDA device"):
        maxsim(q, d, backend="cuda")


def test_refusals():
    q, d, bits = tokens(2, 5, 24), quantize(tokens(3, 9, 24)), quantize(tokens(3, 9, 24), "binary")
    for x, y, came in ((quantize(q), q, "of dtype torch.float32"), (quantize(q), bits, "of kind 'binary'")):
        with pytest.raises(TypeError, match=f"q may be QuantizedTokens only where d is, and of its kind; .*{came}"):
            maxsim(x, y)
    with pytest.raises(ValueError, match=r"same dim .* got q \[2, 5, 8\] and d \[3, 9, 24\]"):
        maxsim(q[..., :8], bits)
    with pytest.raises(ValueError, match=r"d must be .*, got shape \[2, 1, 3, 9, 24\]"):
        maxsim(q, quantize(tokens(2, 1, 3, 9, 24), "binary"))
    with pytest.raises(TypeError, match=r"d must hold only QuantizedTokens if it holds one; d\[1\] is Tensor"):
        maxsim(q, [d[0], q[0]])
    with pytest.raises(TypeError, match=r"d\[1\] must be a torch.Tensor"):
        maxsim(q, [q[0], d[0]])
    with pytest.raises(ValueError, match=r"all items of d must have one kind; d\[0\] has int8, d\[1\] has binary"):
        maxsim(q, [d[0], bits[0]])
    with pytest.raises(ValueError, match=r"d\[0\] must be \[l_i, dim\], got shape \[3, 9, 24\]"):
        maxsim(q, [d])
    with pytest.raises(ValueError, match="d_mask must have the leading shape of d"):
        maxsim(q, bits, d_mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match="not differentiable, but its scale requires a gradient"):
        maxsim(q, QuantizedTokens(d.codes, d.scale.clone().requires_grad_(), d.error, "int8", 24))
    for x, y in ((q, d), (quantize(q), d), (q, [d[0]])):
        with pytest.raises(TypeError, match=r"smooth_maxsim takes no QuantizedTokens; got them as [qd]"):
            latemax.smooth_maxsim(x, y, tau=0.1)


def test_compile_export_and_fake_tensors():
    torch._dynamo.reset()
    q, d = tokens(2, 5, 24), quantize(tokens(3, 9, 24))
    for codes in (d, quantize(tokens(3, 9, 24), "binary")):
        loss = torch.compile(lambda q, d: maxsim(q, d, normalize=True, return_argmax=True), fullgraph=True)
        leaf, again = q.clone().requires_grad_(), q.clone().requires_grad_()
        ours, truth = loss(leaf, codes), maxsim(again, codes, normalize=True, return_argmax=True)
        for x, y in zip(ours, truth, strict=True):
            torch.testing.assert_close(x, y)
        ours[0].sum().backward(), truth[0].sum().backward()
        torch.testing.assert_close(leaf.grad, again.grad)
    program = torch.export.export(MaxSim(), (q, d))
    assert "latemax.maxsim" in str(program.graph)
    other = quantize(tokens(3, 9, 24, seed=5))
    torch.testing.assert_close(program.module()(q, other), maxsim(q, other))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map(mode.from_tensor, d)
        scores, argmax = maxsim(mode.from_tensor(q), fake, return_argmax=True)
        assert scores.shape == (2, 3) and argmax.shape == (2, 3, 5) and scores.dtype == torch.float32
        assert maxsim(fake, fake).dtype == torch.float32


@pytest.mark.parametrize("where", PLACES)
def test_opcheck(where):
    backend, device = where
    x = tokens(2, 5, 24, device=device)
    for kind in KINDS:
        d = quantize(tokens(3, 9, 24, device=device), kind)
        codes = quantize(x, kind)
        for q, scale in ((x.clone().requires_grad_(), None), (codes.codes, codes.scale)):
            torch.library.opcheck(
                torch.ops.latemax.maxsim,
                (q, d.codes, None, None, True, -1.0, True, backend),
                dict(q_scale=scale, d_scale=d.scale, q_kind="" if scale is None else kind, d_kind=kind, dim=24),
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
            )


def test_vmap_over_codes():
    q, d = tokens(4, 2, 5, 24), quantize(tokens(4, 3, 9, 24))
    ours = torch.vmap(maxsim)(q, d)
    torch.testing.assert_close(ours, torch.stack([maxsim(q[i], d[i]) for i in range(4)]))


def test_warmup_of_codes():
    for kind in KINDS:
        choice = latemax.warmup(dim=32, l_q=4, dtype=torch.float16, device=TRITON_DEVICE, d_kind=kind, backend="triton")
        assert choice.backend == "triton"
        latemax.warmup(dim=32, l_q=4, device="cpu", d_kind=kind, q_kind=kind)
        latemax.warmup(dim=32, l_q=4, device="cpu", d_kind=kind, layout="list", train=True)
    with pytest.raises(TypeError, match="q may be QuantizedTokens only where d is"):
        latemax.warmup(device="cpu", q_kind="int8")
