"""Random shapes, masks, dtypes and strides against the oracle."""

import torch
from common import TRITON_DEVICE, exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import latemax

FLOATS = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@st.composite
def calls(draw, longest):
    n_q, n_d = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    l_q, l_d, dim = draw(st.integers(1, longest)), draw(st.integers(0, longest)), draw(st.integers(1, 70))
    own, q_masked, d_masked = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tokens(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        axes = draw(st.permutations(range(len(shape))))
        # the same values laid out in a drawn order of axes
        return x.permute(axes).contiguous().permute([axes.index(i) for i in range(len(shape))])

    def mask(x, masked):
        return (
            torch.rand(x.shape[:-1], generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9])) if masked else None
        )

    q, d = tokens(n_q, l_q, dim), tokens(*((n_q,) if own else ()), n_d, l_d, dim)
    dtypes = draw(FLOATS), draw(FLOATS)
    return (q.to(dtypes[0]), d.to(dtypes[1]), mask(q, q_masked), mask(d, d_masked)), dict(normalize=draw(st.booleans()))


def check(call, backend, device):
    tensors, options = call
    q, d, q_mask, d_mask = (None if x is None else x.to(device) for x in tensors)
    scores, argmax = latemax.maxsim(q, d, q_mask, d_mask, return_argmax=True, backend=backend, **options)
    truth, best = exact(q, d, q_mask, d_mask, return_argmax=True, **options)
    # the inputs are what they are after rounding; products and sums are float32 or better
    torch.testing.assert_close(scores.double(), truth, rtol=1e-4, atol=1e-2 if not options["normalize"] else 1e-4)
    assert torch.equal(argmax < 0, best < 0)
    valid = argmax >= 0
    if valid.any():
        a, b = q.double(), d.double()
        if options["normalize"]:
            a, b = torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)
        sims = torch.einsum("qic,qkjc->qkij" if d.dim() == 4 else "qic,kjc->qkij", a, b)
        at, want = (sims.gather(-1, i.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)[valid] for i in (argmax, best))
        torch.testing.assert_close(at, want, rtol=1e-4, atol=1e-3)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls(60))
def test_cpu(call):
    check(call, "cpu", "cpu")


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls(40))
def test_triton(call):
    check(call, "triton", TRITON_DEVICE)
