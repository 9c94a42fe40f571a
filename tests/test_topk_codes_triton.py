"""`topk` from codes whose bounds Triton computes: codes where the scoring runs, tokens on the host."""

import pytest
import torch
from common import GPU, TRITON_DEVICE
from test_topk_codes import assert_same, clustered, queries

from latemax import quantize, topk
from latemax.ops.backends import triton_bounds
from latemax.search import bounded
from latemax.store import Packed


@pytest.fixture
def calls(monkeypatch):
    """Bounds by Triton, which the CPU leaves to the native kernel; (documents, coarse) of each call."""
    found, real, forward = [], bounded.bound_corpus, triton_bounds.forward

    def counted(b, launch, lower, upper, *, coarse):
        found.append((b.n_d, coarse))
        forward(b, launch, lower, upper, coarse=coarse)

    monkeypatch.setattr(triton_bounds, "forward", counted)
    monkeypatch.setattr(bounded, "bound_corpus", lambda *args, **given: real(*args, **given | {"backend": "triton"}))
    return found


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "cosine"])
def test_the_answer_is_that_of_the_tokens(normalize, calls):
    items = clustered(200, spread=0.1)
    (flat, offsets), q = Packed.of(items), queries(items, 1)
    codes, options = quantize(flat).to(TRITON_DEVICE), dict(normalize=normalize, device=TRITON_DEVICE)
    found = topk(q, (flat, offsets), 3, codes=(codes, offsets.to(TRITON_DEVICE)), **options)
    assert_same(found, topk(q, (flat, offsets), 3, codes="off", **options))
    assert found.stats["rescored"] < 100 and sum(n for n, _ in calls) >= 20
    # the first pass rounds the query where norms of codes are needed anyway
    assert calls[0][1] == normalize


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_takes_triton_by_itself(dtype, monkeypatch):
    items = [x.to(dtype) for x in clustered(2000)]
    (flat, offsets), q = Packed.of(items), queries(items, 2).to(dtype)
    seen, forward = [], triton_bounds.forward
    monkeypatch.setattr(triton_bounds, "forward", lambda *args, **given: seen.append(1) or forward(*args, **given))
    for codes in (quantize(flat), quantize(flat.cuda())):
        found = topk(q, (flat, offsets), 5, codes=(codes, offsets.to(codes.device)), device="cuda")
        assert_same(found, topk(q, (flat, offsets), 5, codes="off", device="cuda"))
        assert found.stats["rescored"] < 1000
    assert seen
