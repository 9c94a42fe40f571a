"""Helpers of the operator's tests: backends and their devices, random problems, the tolerance rule, programs."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latemax import reference
from latemax.ops.backends import cuda, native
from latemax.ops.problem import Batch, Needs, Outputs, Plan, Side

GPU = torch.cuda.is_available()
# the Triton kernels run on the GPU if there is one, else in the interpreter (see conftest.py)
TRITON_DEVICE = "cuda" if GPU else "cpu"
# The CUDA kernels take only half precision and int8 codes: problems there are bfloat16 unless a test says otherwise.
# Problems that they reject are skipped with their reason (see conftest.py).
CUDA_DEVICE = "cuda:0"
BACKENDS = [
    # backend="cpu" is the native kernel if it was built, else the torch path
    pytest.param(
        ("cpu", "cpu"),
        id="cpu-native",
        marks=pytest.mark.skipif(not native.status()[0], reason=native.status()[1]),
    ),
    pytest.param(("cpu", "cpu"), id="cpu-torch", marks=pytest.mark.torch_path),
    pytest.param(("triton", TRITON_DEVICE), id="triton"),
    pytest.param(
        ("cuda", CUDA_DEVICE),
        id="cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.cuda_kernels,
            pytest.mark.skipif(not cuda.status()[0], reason=cuda.status()[1]),
        ],
    ),
]
# (n_q, n_d, l_q, l_d, dim); some tests add the same shape with own candidates
SHAPES = [
    pytest.param((1, 1, 1, 1, 1), id="ones"),
    pytest.param((1, 3, 5, 17, 16), id="short"),
    pytest.param((3, 2, 1, 9, 4), id="one-token"),
    pytest.param((3, 2, 15, 33, 96), id="dim96"),
    pytest.param((5, 2, 32, 129, 64), id="packed"),
    pytest.param((2, 2, 17, 150, 128), id="patches"),
    pytest.param((1, 2, 140, 70, 48), id="long-query"),
    pytest.param((2, 1, 3, 20, 300), id="wide"),
]


def problem(shape, *, own=False, dtype=None, device="cpu", seed=0):
    dtype = dtype or (torch.bfloat16 if device == CUDA_DEVICE else torch.float32)
    n_q, n_d, l_q, l_d, dim = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n_q, l_q, dim, generator=generator)
    d = torch.randn(*((n_q,) if own else ()), n_d, l_d, dim, generator=generator)
    return q.to(device, dtype), d.to(device, dtype)


def run_forward(backend, q, d, scores, argmax, *, q_mask=None, d_mask=None, launch=None, **options):
    """Fills scores and argmax (of no element: not wanted) by one backend, whatever a choice would say."""
    b = batch(q, d, q_mask, d_mask, **options)
    backend.forward(b, Plan(backend.name, "", launch=launch), Outputs(scores, argmax if argmax.numel() else None))


def run_backward(backend, g, q, d, argmax, *, needs_q, needs_d, launch=None, **options):
    """(grad_q, grad_d)"""
    b = batch(q, d, None, None, **options)
    return backend.backward(b, Plan(backend.name, "", launch=launch), argmax, g, Needs(needs_q, needs_d))[:2]


def batch(
    q, d, q_mask, d_mask, q_offsets=None, d_offsets=None, candidates=None, normalize=False, empty_score=-math.inf
):
    return Batch(Side(q, q_mask, q_offsets), Side(d, d_mask, d_offsets), candidates, normalize, empty_score)


def masks(q, d, *, seed=0, keep=0.6):
    """Random holes, not prefixes; the first token of every query and document is always masked."""
    generator = torch.Generator().manual_seed(seed)
    q_mask = (torch.rand(q.shape[:-1], generator=generator) < keep).to(q.device)
    d_mask = (torch.rand(d.shape[:-1], generator=generator) < keep).to(d.device)
    q_mask[..., 0], d_mask[..., 0] = False, False
    return q_mask, d_mask


def exact(q, d, *args, **options):
    """The oracle in float64."""
    return reference.maxsim(q.double(), d.double(), *args, **options)


def assert_exact(ours, truth, torch_same_dtype):
    """err(ours) ≤ 2 × err(plain torch in the same dtype) + tiny against float64; inf and NaN in place.

    tiny: 4 ulp of the largest score.
    """
    tiny = 4 * torch.finfo(ours.dtype).eps
    assert ours.shape == truth.shape
    ours, truth, plain = ours.detach().double(), truth.detach().double(), torch_same_dtype.detach().double()
    finite = truth.isfinite()
    torch.testing.assert_close(ours[~finite], truth[~finite], equal_nan=True, rtol=0, atol=0)
    if finite.any():
        error = (ours - truth)[finite].abs().max().item()
        allowed = 2 * (plain - truth)[finite].abs().max().item() + tiny * truth[finite].abs().max().item()
        assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}"


def plain_torch(q, d, normalize=False):
    """What a user would write, in the dtype of the inputs, dense and unmasked: [n_q, n_d]."""
    if normalize:
        q, d = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(d, dim=-1)
    sims = torch.einsum("qic,qkjc->qkij" if d.dim() == 4 else "qic,kjc->qkij", q, d)
    return sims.amax(-1).sum(-1)


def assert_argmax(argmax, q, d, q_mask=None, d_mask=None, normalize=False):
    """Every argmax is a valid token with the maximum, by value in float64 up to float32 rounding."""
    _, best = exact(q, d, q_mask, d_mask, normalize=normalize, return_argmax=True)
    assert argmax.dtype == torch.int32 and argmax.shape == best.shape
    assert torch.equal(argmax < 0, best < 0)
    q, d = ((torch.nn.functional.normalize(x.double(), dim=-1) if normalize else x.double()) for x in (q, d))
    sims = torch.einsum("qic,qkjc->qkij" if d.dim() == 4 else "qic,kjc->qkij", q, d)
    if d_mask is not None:
        keep = d_mask if d.dim() == 4 else d_mask.unsqueeze(0)
        sims = sims.masked_fill(~keep.unsqueeze(2), -math.inf)
    at = [sims.gather(-1, i.clamp(min=0).long().unsqueeze(-1)).squeeze(-1) for i in (argmax, best)]
    won = best >= 0
    torch.testing.assert_close(at[0][won], at[1][won], rtol=1e-2 if q.dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def run_program(name, *arguments):
    """Runs tests/programs/``name``.py in a process of its own and returns what it printed."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.programs.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
