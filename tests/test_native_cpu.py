"""The native CPU kernel: every instruction set that runs here, threads, and how it is chosen.

The operator's tests run on it too (id "cpu-native") and on the torch path (id "cpu-torch").
"""

import math

import pytest
import torch
from common import assert_argmax, exact, masks, problem, run_backward, run_forward

import latemax
from latemax import reference
from latemax.arguments import rows
from latemax.ops import dispatch, operator
from latemax.ops.backends import blocks, native

USABLE, WHY = native.status()
needs_native = pytest.mark.skipif(not USABLE, reason=WHY)
LEVELS = list(enumerate(native.levels()))


def outputs(q, d):
    n_q, n_d = len(q), d.shape[-3]
    return torch.full((n_q, n_d), math.nan), torch.full((n_q, n_d, q.shape[1]), -99, dtype=torch.int32)


@needs_native
@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 17, 16), (3, 2, 33, 70, 129), (2, 5, 17, 31, 7), (1, 2, 130, 65, 300)], ids=str
)
def test_every_instruction_set(shape, own, dtype, level):
    q, d = problem(shape, own=own, dtype=dtype)
    q_mask, d_mask = masks(q, d)
    q[~q_mask], d[~d_mask] = math.nan, math.nan
    d_mask[..., 1, :] = False
    for normalize in (False, True):
        scores, argmax = outputs(q, d)
        options = dict(normalize=normalize, empty_score=-3.0)
        run_forward(native, q, d, scores, argmax, q_mask=q_mask, d_mask=d_mask, launch=level[0], **options)
        truth = exact(q, d, q_mask, d_mask, **options)
        torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=1e-4)
        assert_argmax(argmax, q.nan_to_num(0), d.nan_to_num(0), q_mask, d_mask, normalize)
        g = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))
        sides = dict(normalize=normalize, needs_q=True, needs_d=True)
        ours = run_backward(native, g, q, d, argmax, launch=level[0], **sides)
        theirs = run_backward(blocks, g, q, d, argmax, **sides)
        for x, y in zip(ours, theirs, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-4)


@needs_native
def test_the_fast_path_equals_the_full_path():
    """The fast path skips validation: the same bits, and None for every call that it must not take."""
    q, d = problem((3, 5, 33, 40, 64))
    whole = latemax.maxsim(q, d, return_argmax=True)[0]
    for x, y, at in ((q, d, ...), (q[1], d, 1), (q, d[2], (..., 2)), (q[1], d[2], (1, 2))):
        short = latemax.maxsim(x, y)
        assert short.shape == whole[at].shape and torch.equal(short, whole[at])
        assert torch.equal(short, operator.fast_path(x, y, False, -math.inf, "auto"))
    refused = [
        (q.double(), d), (q, d.clone().requires_grad_()), (torch.nn.Parameter(q), d), ([*q], d), (q, d[None]),
        (q[..., :3], d), (q, d.to_sparse()), (q[:, :0], d), (q[..., :0], d[..., :0]), (q[0, 0], d),
        (q, d.to("meta")),
        (torch.nested.nested_tensor([q[0], q[1]]), d), (q, torch.nested.nested_tensor([d[0], d[1]])),
        (torch.view_as_complex(q.reshape(3, 33, 32, 2)).conj().imag, d[..., :32]),
    ]  # fmt: skip
    for x, y in refused:
        assert operator.fast_path(x, y, False, -math.inf, "auto") is None
    assert operator.fast_path(q, d, False, -math.inf, "reference") is None
    with torch.no_grad():
        assert operator.fast_path(q.clone().requires_grad_(), d, False, -math.inf, "cpu") is not None


@needs_native
@pytest.mark.parametrize("dim", [2, 3])
def test_freed_memory_is_refused(dim):
    q, d = torch.ones(2, 4), torch.ones(*(1,) * (dim - 2), 3, 4)
    d.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        latemax.maxsim(q, d)


@needs_native
def test_threads_change_no_bit():
    q, d = problem((3, 17, 20, 90, 64))
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            a, b = q.clone().requires_grad_(), d.clone().requires_grad_()
            scores = latemax.maxsim(a, b, normalize=True)
            scores.square().sum().backward()
            runs.append((scores.detach(), a.grad, b.grad))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for x, y in zip(runs[0], other, strict=True):
            assert torch.equal(x, y)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_zero_rows_are_those_of_torch(dtype, threads):
    """Also where only one number is not 0, anywhere in the row, be it subnormal or NaN, and where zeros have signs."""
    before, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    torch.set_num_threads(threads)
    try:
        for shape in ((3, 700, 128), (5, 40, 33), (2, 3, 7, 5), (9, 1), (11,), (40, 0, 8), (0, 4), (2, 3, 0)):
            x = torch.randn(shape, generator=generator).to(dtype)
            x = x.where(torch.rand(shape[:-1], generator=generator).lt(0.5).unsqueeze(-1), -0.0)
            flat = x.view(-1, shape[-1]) if x.numel() else x.new_empty(0, 1)
            values = (0.0, math.nan, torch.finfo(dtype).smallest_normal / 4, -math.inf)
            for r in range(0, len(flat), 5):
                flat[r] = 0.0
                flat[r, (r * 7) % shape[-1]] = values[r // 5 % 4]
            for y in (x, x[..., 1:], x[1::2], x.mT if len(shape) > 1 else x, x[..., :0], x.flip(0)[:1]):
                truth = y.ne(0).any(-1)
                for found in (rows.nonzero_rows(y), *([rows._by_torch(y)] if y.shape[-1] else [])):
                    assert truth.all() if found is None else torch.equal(found, truth)
                ours = native.nonzero_rows(y)
                if ours is not None:
                    assert torch.equal(ours[0], truth) and ours[1] == bool(truth.all())
                else:
                    assert y.shape[-1] == 0 or y.stride(-1) != 1
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_score_depends_neither_on_padding_nor_on_other_documents(normalize, dtype):
    q, d = problem((2, 5, 12, 70, 64), dtype=dtype)
    scores = latemax.maxsim(q, d, normalize=normalize)
    for start in (0, 3, 11):
        # tokens with gaps between them, at other places in vectors and tiles of rows
        at = torch.arange(70) + start + torch.arange(70) // 3 * (start > 0)
        padded = torch.full((5, 200, 64), torch.nan, dtype=dtype)
        padded[:, at] = d
        keep = torch.zeros(5, 200, dtype=torch.bool)
        keep[:, at] = True
        assert torch.equal(latemax.maxsim(q, padded, None, keep, normalize=normalize), scores)
    assert torch.equal(latemax.maxsim(q[1:], d[3:4], normalize=normalize), scores[1:, 3:4])


@needs_native
def test_explain_names_the_kernel_and_torch_takes_float64():
    q, d = problem((1, 2, 3, 5, 8))
    choice = latemax.explain(q, d)
    assert choice.backend == "cpu" and choice.native and LEVELS[-1][1] in choice.why
    double = latemax.explain(q.double(), d.double())
    assert not double.native and double.notes == ("the native kernel does not take float64",)


@pytest.mark.torch_path
def test_without_the_build_explain_says_why():
    q, d = problem((1, 2, 3, 5, 8))
    choice = latemax.explain(q, d)
    assert choice.backend == "cpu" and not choice.native
    assert choice.notes == ("the native kernel cannot be loaded: removed by a test",)
    assert "removed by a test" in dispatch.backend_status()["cpu"][1]
    torch.testing.assert_close(latemax.maxsim(q, d), reference.maxsim(q, d))
