"""What only a GPU can show: graph capture, tensors of over 2^31 elements, memory, no hidden synchronisation."""

import pytest
import torch
from common import GPU, assert_argmax, exact, masks, problem

import latemax
from latemax.ops.backends import cuda
from latemax.ops.backends.base import capability

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if GPU else 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 100, 32, 300, 128), (8, 8, 32, 300, 128), (2, 4, 1030, 1030, 96), (4, 4, 200, 512, 768)]
)
def test_real_sizes(shape, dtype):
    q, d = problem(shape, dtype=dtype, device="cuda")
    q_mask, d_mask = masks(q, d, keep=0.9)
    for masked in ((None, None), (q_mask, d_mask)):
        scores, argmax = latemax.maxsim(q, d, *masked, return_argmax=True)
        torch.testing.assert_close(scores, exact(q, d, *masked).float(), rtol=1e-4, atol=1e-1)
        assert_argmax(argmax, q, d, *masked)


def assert_close_to_exact(q, d, q_mask=None, d_mask=None, *, backend, normalize=False):
    scores, argmax = latemax.maxsim(
        q, d, q_mask, d_mask, normalize=normalize, return_argmax=True, backend=backend, empty_score=-1.0
    )
    clean = [x if keep is None else x.masked_fill(~keep[..., None], 0) for x, keep in ((q, q_mask), (d, d_mask))]
    truth = exact(*clean, q_mask, d_mask, normalize=normalize, empty_score=-1.0)
    torch.testing.assert_close(scores.double(), truth, rtol=1e-4, atol=2e-2)
    assert_argmax(argmax, *clean, q_mask, d_mask, normalize)


# every dim with a ring of its own, on both sides of each group of query tokens
@pytest.mark.skipif(not cuda.status()[0], reason=cuda.status()[1])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("l_q", [20, 40, 100, 200])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256, 320, 512, 640, 704, 768])
def test_every_dim_of_the_cuda_kernels(dim, l_q, own):
    if dim > cuda.most_dims(capability(torch.device("cuda"))):
        pytest.skip(f"dim {dim} does not fit this GPU's shared memory")
    q, d = problem((5, 40, l_q, 300, dim), own=own, dtype=torch.bfloat16, device="cuda")
    for masked in ((None, None), masks(q, d, keep=0.9)):
        for normalize in (False, True):
            assert_close_to_exact(q, d, *masked, backend="cuda", normalize=normalize)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize(
    "shape", [(3, 2, 15, 33, 96), (5, 2, 32, 129, 64), (2, 3, 17, 196, 128), (1, 2, 140, 70, 48)], ids=str
)
def test_masked_bfloat16_on_triton(shape, normalize):
    """Masks, poison and tile boundaries on the tensor cores: in float32 the products are not wgmma's."""
    for own in (False, True):
        q, d = problem(shape, own=own, dtype=torch.bfloat16, device="cuda")
        q_mask, d_mask = masks(q, d)
        d_mask[..., 1, :] = False
        q[~q_mask], d[~d_mask] = float("nan"), float("inf")
        assert_close_to_exact(q, d, q_mask, d_mask, backend="triton", normalize=normalize)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_bfloat16_nan_and_infinities_on_triton(value):
    q, d = problem((2, 3, 20, 200, 64), dtype=torch.bfloat16, device="cuda")
    d[1, 77, 3], d[2, 190] = value, value
    scores, argmax = latemax.maxsim(q, d, return_argmax=True, backend="triton")
    truth, where = exact(q, d, return_argmax=True)
    torch.testing.assert_close(scores.double(), truth, equal_nan=True, rtol=1e-4, atol=2e-2)
    assert torch.equal(argmax[:, 1:], where[:, 1:])


def test_bfloat16_edges_on_triton():
    for shape in ((1, 1, 1, 1, 8), (2, 3, 1, 1, 64), (3, 1, 33, 513, 72), (1, 2, 513, 15, 128), (2, 0, 4, 4, 16)):
        assert_close_to_exact(*problem(shape, dtype=torch.bfloat16, device="cuda"), backend="triton")
    q, d = problem((2, 3, 20, 40, 64), dtype=torch.bfloat16, device="cuda")
    assert (latemax.maxsim(q, d[:, :0], empty_score=-2.0, backend="triton") == -2).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_graph_capture_on_the_first_call_after_warmup(masked, normalize):
    latemax.warmup(dim=128, l_q=24, n_q=3, dtype=torch.bfloat16, q_masked=masked, d_masked=masked, normalize=normalize)
    q, d = problem((3, 50, 24, 77, 128), dtype=torch.bfloat16, device="cuda")
    q_mask, d_mask = masks(q, d) if masked else (None, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = latemax.maxsim(q, d, q_mask, d_mask, normalize=normalize)
    d.copy_(torch.randn_like(d))
    graph.replay()
    torch.testing.assert_close(scores, latemax.maxsim(q, d, q_mask, d_mask, normalize=normalize))


def test_training_step_is_captured():
    latemax.warmup(dim=64, l_q=16, n_q=4, dtype=torch.bfloat16, train=True)
    q, d = problem((4, 4, 16, 100, 64), dtype=torch.bfloat16, device="cuda")
    q.requires_grad_(), d.requires_grad_()
    q.grad, d.grad = torch.zeros_like(q), torch.zeros_like(d)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        latemax.maxsim(q, d).sum().backward()
    graph.replay()
    assert q.grad.abs().sum() > 0 and d.grad.abs().sum() > 0


def test_no_synchronisation_on_the_call_path():
    q, d = problem((2, 9, 20, 50, 128), dtype=torch.bfloat16, device="cuda")
    q_mask, d_mask = masks(q, d)
    q.requires_grad_(), d.requires_grad_()
    latemax.maxsim(q, d, q_mask.float(), d_mask, normalize=True).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        latemax.maxsim(q, d, q_mask.float(), d_mask, normalize=True).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["varlen", "rerank"])
def test_ragged_calls_neither_wait_nor_compile_after_warmup(layout):
    """Captured on the first call after warmup; a training step beside it waits for nothing."""
    latemax.warmup(dim=128, l_q=24, n_q=3, dtype=torch.bfloat16, layout=layout)
    q, d = problem((1, 1, 72, 900, 128), dtype=torch.bfloat16, device="cuda")
    q, d = q[0], d[0]
    cu_q = torch.tensor([0, 10, 50, 72], device="cuda")
    cu_d = torch.tensor([0, 300, 300, 777, 900], device="cuda", dtype=torch.int32)
    slots = torch.tensor([[0, 3, -1], [2, 2, 1], [3, 0, 2]], device="cuda")

    def call(q, d):
        if layout == "varlen":
            return latemax.maxsim_varlen(q, d, cu_q, cu_d, empty_score=0.0)
        return latemax.rerank(q.view(3, 24, 128), d, cu_d, slots, empty_score=0.0)

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = call(q, d)
    d.copy_(torch.randn_like(d))
    graph.replay()
    assert torch.equal(scores, call(q, d))
    a, b = q.clone().requires_grad_(), d.clone().requires_grad_()
    call(a, b).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(a, b).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_and_candidates_that_lie_stay_inside_the_tokens():
    """They are not looked at on the host: nothing outside is read, and a number that is no document scores NaN."""
    q, d = problem((1, 1, 8, 40, 64), device="cuda")
    broken = torch.tensor([0, 30, 20, 10**9], device="cuda")
    latemax.maxsim_varlen(q[0], d[0], torch.tensor([0, 8], device="cuda"), broken)
    offsets, slots = torch.tensor([0, 20, 40], device="cuda"), torch.tensor([[0, 2, -5, -1]], device="cuda")
    scores = latemax.rerank(q, d[0], offsets, slots, empty_score=-1.0)
    torch.cuda.synchronize()
    assert scores[0, 0].isfinite() and scores[0, 1:3].isnan().all() and scores[0, 3] == -1


@pytest.mark.skipif(GPU and free_bytes() < 12e9, reason="needs 12 GB of free GPU memory")
def test_more_than_two_to_the_31_elements():
    """17,000 documents of 1,024 × 128: 2.2 billion elements, 4.5 GB; the last one must be scored right."""
    d = torch.empty(17_000, 1024, 128, dtype=torch.bfloat16, device="cuda").normal_()
    q = torch.randn(1, 32, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    scores, argmax = latemax.maxsim(q, d, return_argmax=True)
    for i in (0, 16_384, 16_999):
        torch.testing.assert_close(scores[:, i : i + 1], exact(q, d[i : i + 1]).float(), rtol=1e-4, atol=1e-1)
        assert_argmax(argmax[:, i : i + 1], q, d[i : i + 1])
    scores[:, -1].sum().backward()
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize("train", [False, True])
def test_peak_memory(train):
    """Forward: the scores. Training: winners and gradients besides. Never the similarities, never a copy of d."""
    q, d = problem((64, 64, 32, 512, 128), dtype=torch.bfloat16, device="cuda")
    q.requires_grad_(train), d.requires_grad_(train)
    latemax.maxsim(q[:2], d[:2])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores = latemax.maxsim(q, d)
    if train:
        scores.sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    allowed = scores.numel() * 4 + 1e6
    if train:
        # winners, the two gradients, and the float32 parts of grad_q
        allowed += 64 * 64 * 32 * 4 + (q.numel() + d.numel()) * 2 + 16 * q.numel() * 4
    assert extra <= allowed, f"{extra / 1e6:.1f} MB used, {allowed / 1e6:.1f} MB allowed"


def test_backward_repeats_bit_for_bit_at_real_size():
    q, d = problem((32, 32, 32, 300, 128), dtype=torch.bfloat16, device="cuda")
    runs = []
    for _ in range(3):
        a, b = q.clone().requires_grad_(), d.clone().requires_grad_()
        latemax.maxsim(a, b, normalize=True).square().sum().backward()
        runs.append((a.grad, b.grad))
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))


def test_the_tensors_device_is_used_whichever_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    q, d = problem((1, 3, 8, 20, 64), device="cuda:1")
    assert latemax.maxsim(q, d).device == torch.device("cuda:1")


def test_float32_precision_follows_torch():
    """ "highest" is IEEE float32 (errors of 1e-6); "high" may use TF32 (errors of 1e-3)."""
    q, d = problem((1, 20, 32, 300, 128), device="cuda")
    truth, before = exact(q, d), torch.get_float32_matmul_precision()
    try:
        errors = {}
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors[precision] = ((latemax.maxsim(q, d) - truth).abs() / truth).max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 2e-6 and errors["highest"] < errors["high"] < 2e-3


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd"])
def test_lists_are_scored_where_they_are_without_waiting(aligned):
    wide = torch.randn(20_000, 128 if aligned else 131, device="cuda").bfloat16()[:, :128]
    d = [wide[i : i + 400] for i in range(0, 20_000, 400)]
    q = [x.bfloat16() for x in torch.randn(2, 7, 128, device="cuda")]
    masks = [torch.ones(400, dtype=torch.bool, device="cuda"), *[None] * 49]
    expected = latemax.maxsim(torch.stack(q), torch.stack(d))
    assert torch.equal(latemax.maxsim(torch.stack(q), d, backend="triton"), expected)
    assert torch.equal(latemax.maxsim(q, d, backend="triton"), expected)
    assert torch.equal(latemax.maxsim(q, d, None, masks, backend="triton"), expected)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = latemax.maxsim(q, d, None, masks, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 1 << 17  # the documents are 5 MB
    assert torch.equal(scores, expected)


def test_a_capture_refuses_lists():
    q, d = torch.randn(2, 5, 64, device="cuda"), [torch.randn(7, 64, device="cuda")]
    refused = None
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            latemax.maxsim(q, d)
        except RuntimeError as error:
            refused = str(error)
    assert refused is not None and refused.startswith("d is a list, which a CUDA graph cannot capture")
