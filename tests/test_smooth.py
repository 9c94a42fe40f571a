"""The smooth maximum against the float64 oracle, and the oracle against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from common import GPU, TRITON_DEVICE, masks, problem

import latemax
from latemax import reference
from latemax.ops.backends import smooth

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")]
# backend, device, similarities in a block
WAYS = [
    pytest.param(("cpu", "cpu", smooth.BLOCK), id="one-block"),
    pytest.param(("cpu", "cpu", 200), id="blocks"),
    pytest.param(("triton", TRITON_DEVICE, 0), id="triton"),
    pytest.param(("auto", "cuda", 0), id="cuda", marks=ON_GPU),
]
SHAPES = [(1, 1, 1, 1, 1), (3, 4, 5, 17, 16), (1, 2, 33, 70, 48)]


def gradients(score, q, d, g):
    leaves = [x.detach().requires_grad_() for x in (q, d)]
    scores = score(*leaves)
    return [scores.detach(), *torch.autograd.grad((scores * g).sum(), leaves)]


def truth(q_mask, d_mask, **options):
    return lambda q, d: reference.smooth_maxsim(q.double(), d.double(), q_mask, d_mask, **options)


def assert_like(ours, theirs, dtype=torch.float32):
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.double(), y.double(), **close)


def test_the_oracle_is_its_formula():
    q, d = (x.double() for x in problem((2, 3, 4, 9, 16)))
    sims = torch.einsum("qic,kjc->qkij", q, d)
    for tau in (0.05, 1.0, 20.0):
        best = sims.amax(-1, keepdim=True)
        expected = (best.squeeze(-1) + tau * ((sims - best) / tau).exp().sum(-1).log()).sum(-1)
        torch.testing.assert_close(reference.smooth_maxsim(q, d, tau=tau), expected)
    near = reference.smooth_maxsim(q, d, tau=1e-4)
    torch.testing.assert_close(near, reference.maxsim(q, d), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_scores_and_gradients(way, shape, own, normalize, masked, monkeypatch):
    backend, device, block = way
    monkeypatch.setattr(smooth, "BLOCK", block)
    q, d = problem(shape, own=own, device=device)
    q_mask, d_mask = masks(q, d) if masked else (None, None)
    if masked:
        q[~q_mask], d[~d_mask] = math.nan, math.inf
    g = torch.randn(shape[:2], generator=torch.Generator().manual_seed(1)).to(device)
    options = dict(tau=0.3, normalize=normalize, empty_score=-2.0)
    ours = gradients(lambda q, d: latemax.smooth_maxsim(q, d, q_mask, d_mask, backend=backend, **options), q, d, g)
    assert ours[0].dtype == torch.float32
    assert_like(ours, gradients(truth(q_mask, d_mask, **options), q, d, g))
    if masked:
        assert (ours[1][~q_mask] == 0).all() and (ours[2][~d_mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]])
def test_dtypes(way, dtype):
    backend, device, _ = way
    q, d = problem((2, 3, 5, 17, 16), dtype=dtype, device=device)
    g = torch.ones(2, 3, device=device)
    ours = gradients(lambda q, d: latemax.smooth_maxsim(q, d, tau=0.5, backend=backend), q, d, g)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours[1].dtype == ours[2].dtype == dtype
    assert_like(ours, gradients(truth(None, None, tau=0.5), q, d, g), dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_lists(backend):
    generator = torch.Generator().manual_seed(0)
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    q = [torch.randn(n, 8, generator=generator).to(device) for n in (3, 1, 20)]
    d = [torch.randn(n, 8, generator=generator).to(device) for n in (5, 0, 40, 1)]
    keep = [(torch.rand(len(x), generator=generator) < 0.7).to(device) for x in d]
    keep[3][:] = False
    own = torch.randn(3, 2, 6, 8, generator=generator).to(device)
    for documents, mask in ((d, keep), (d, None), (torch.stack([d[0], d[0]]), None), (own, None), (d[0], None)):
        options = dict(tau=0.4, empty_score=-5.0)
        items = [*documents] if isinstance(documents, list) else [documents]
        leaves = [x.clone().requires_grad_() for x in (*q, *items)]

        def score(function, leaves, documents=documents, mask=mask, **given):
            rest = leaves[3:] if isinstance(documents, list) else leaves[3]
            if documents is own and function is not latemax.smooth_maxsim:
                return torch.stack([function(x, rest[a], **given) for a, x in enumerate(leaves[:3])])
            return function(leaves[:3], rest, None, mask, **given)

        ours = score(latemax.smooth_maxsim, leaves, backend=backend, **options)
        wide = [x.detach().double().requires_grad_() for x in leaves]
        theirs = score(reference.smooth_maxsim, wide, **options)
        g = torch.randn(ours.shape, generator=generator).to(device)
        grads = torch.autograd.grad((ours * g).sum(), leaves)
        expected = torch.autograd.grad((theirs * g).sum(), wide, allow_unused=True, materialize_grads=True)
        assert_like([ours.detach(), *grads], [theirs.detach(), *expected])


def test_shapes_of_one_query_and_one_document():
    q, d = problem((2, 3, 4, 9, 16))
    scores = latemax.smooth_maxsim(q, d, tau=0.1)
    torch.testing.assert_close(latemax.smooth_maxsim(q[0], d, tau=0.1), scores[0])
    torch.testing.assert_close(latemax.smooth_maxsim(q, d[1], tau=0.1), scores[:, 1])
    torch.testing.assert_close(latemax.smooth_maxsim(q[0].numpy(), d[1].numpy(), tau=0.1), scores[0, 1])
    assert latemax.smooth_maxsim(q, d[:0], tau=0.1).shape == (2, 0)
    assert (latemax.smooth_maxsim(q, d[:, :0], tau=0.1, empty_score=-4.0) == -4).all()


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_infinities_and_nan(backend):
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    q, d = torch.ones(1, 2, 4, device=device), torch.ones(4, 3, 4, device=device)
    d[1] = -math.inf  # all similarities -inf
    d[2, 1] = -math.inf  # one of them
    d[3, 2, 0] = math.nan
    q, d = q.requires_grad_(), d.requires_grad_()
    scores = latemax.smooth_maxsim(q, d, tau=1.0, backend=backend)
    assert scores[0, 1] == -math.inf and scores[0, 3].isnan()
    torch.testing.assert_close(scores[0, [0, 2]], 8 + 2 * torch.tensor([3.0, 2.0], device=device).log())
    if backend == "reference":
        return
    assert torch.autograd.grad(scores[0, 3], q)[0].isnan().all()
    rest = latemax.smooth_maxsim(q, d[:3], tau=1.0, backend=backend)
    for n, expected in ((1, 0.0), (2, 1.0)):
        grad_q, grad_d = torch.autograd.grad(rest[0, n], (q, d), retain_graph=True)
        assert torch.equal(grad_q, torch.full_like(q, expected))
        assert (grad_d[[m for m in range(4) if m != n]] == 0).all() and not grad_d.isnan().any()


def test_small_tau_does_not_overflow():
    q, d = problem((2, 3, 4, 30, 64))
    q, d = 100 * q, 100 * d
    scores = latemax.smooth_maxsim(q, d, tau=1e-6)
    torch.testing.assert_close(scores, latemax.maxsim(q, d))


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
def test_gradcheck(normalize):
    q, d = (x.double().requires_grad_() for x in problem((2, 3, 3, 5, 4)))
    assert torch.autograd.gradcheck(lambda q, d: latemax.smooth_maxsim(q, d, tau=0.7, normalize=normalize), (q, d))


def test_compile_opcheck_vmap_and_second_derivatives():
    q, d = (x.requires_grad_() for x in problem((2, 3, 4, 9, 16)))
    q_mask, d_mask = masks(q, d)

    def loss(q, d):
        return latemax.smooth_maxsim(q, d, q_mask, d_mask, tau=0.5).square().sum()

    torch._dynamo.reset()
    d_mask[:, 1] = True
    grads = [torch.autograd.grad(run(q, d), (q, d)) for run in (loss, torch.compile(loss, fullgraph=True))]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)
    torch.library.opcheck(torch.ops.latemax.smooth_maxsim, (q, d, q_mask, d_mask, 0.5, True, -1.0))
    batched = torch.vmap(lambda x: latemax.smooth_maxsim(x, d.detach(), tau=0.5))(q.detach().unsqueeze(1))
    torch.testing.assert_close(batched.squeeze(1), latemax.smooth_maxsim(q, d, tau=0.5).detach())
    (first,) = torch.autograd.grad(loss(q, d), q, create_graph=True)
    with pytest.raises(RuntimeError, match="smooth_maxsim has no second derivative"):
        first.sum().backward()


def test_memory_is_that_of_a_block(monkeypatch):
    """No tensor of all similarities, [l_q, l_d], is made, also not for one long document."""
    monkeypatch.setattr(smooth, "BLOCK", 1 << 12)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x._base is None:
                    largest = max(largest, x.untyped_storage().nbytes() // 4)
            return out

    q, d = problem((1, 1, 64, 4096, 4))
    b = latemax.arguments.batch.batch_of(q, d, None, None)[0]
    with Watch():
        scores = q.new_empty(1, 1)
        smooth.forward(b, 0.5, scores)
        smooth.backward(b, 0.5, torch.ones(1, 1), latemax.ops.problem.Needs(True, True))
    assert largest <= d.numel(), largest
    torch.testing.assert_close(scores, reference.smooth_maxsim(q, d, tau=0.5))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "tau must be a Python float, got torch.Tensor", dict(tau=torch.tensor(0.1))),
        (TypeError, "tau must be a Python float, got builtins.bool", dict(tau=True)),
        (TypeError, "tau must be a Python float, got builtins.str", dict(tau="1")),
        (ValueError, "tau must be finite and at least 1e-06, got 0.0", dict(tau=0.0)),
        (ValueError, "tau must be finite and at least 1e-06, got -1.0", dict(tau=-1)),
        (ValueError, "tau must be finite and at least 1e-06, got nan", dict(tau=math.nan)),
        (ValueError, "tau must be finite and at least 1e-06, got inf", dict(tau=math.inf)),
        (RuntimeError, "backend='cuda' cannot run: .* no smooth maximum", dict(tau=1.0, backend="cuda")),
        (ValueError, "backend must be one of", dict(tau=1.0, backend="gpu")),
        (ValueError, "q and d must have the same dim", dict(tau=1.0, q=torch.ones(2, 3, 5))),
    ],
)
def test_errors(error, message, options):
    q, d = problem((2, 2, 4, 9, 16))
    with pytest.raises(error, match=message):
        latemax.smooth_maxsim(options.pop("q", q), d, **options)
