"""vLLM needs a GPU to install: a stand-in, written from its documentation and source, gives the host's results."""

import sys
import types

import torch
from hypothesis import strategies as st
from parity.common import cases, cast, compare, side, tried

import latemax.compat
from latemax.compat import vllm as ours


def compute_maxsim_score_batched(q_embs, d_embs, max_batch_size=64, max_score_matrix_elements=64_000_000):
    """Pairs in float32, padded by batches; padding never wins, and the sum is over the query's own tokens."""
    if len(q_embs) != len(d_embs) or max_batch_size <= 0 or max_score_matrix_elements <= 0:
        raise ValueError("lengths and limits")
    scores = []
    for q, d in zip(q_embs, d_embs, strict=True):
        if q.ndim != 2 or d.ndim != 2 or q.shape[1] != d.shape[1]:
            raise ValueError("shapes")
        scores.append((q.float() @ d.float().T).amax(dim=1).sum())
    return scores


@cases(
    data=st.data(),
    n=st.integers(1, 8),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float64, torch.bfloat16])] * 2),
    shared=st.booleans(),
)
def check_pairs(data, n, dtypes, shared):
    (q, _), (d, _) = (data.draw(side(n=n, forms=("list",))) for _ in "qd")
    q, d = cast(q, dtypes[0]), cast(d, dtypes[1])
    if shared:
        q = [q[i // 3] for i in range(n)]
    compare(
        "compute_maxsim_score_batched",
        lambda: torch.stack(compute_maxsim_score_batched(q, d)),
        lambda: torch.stack(ours.compute_maxsim_score_batched(q, d)),
    )


def check_patch():
    for name in ("vllm", "vllm.v1", "vllm.v1.pool", "vllm.v1.pool.late_interaction"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = types.SimpleNamespace(name=name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    module = sys.modules["vllm.v1.pool.late_interaction"]
    module.compute_maxsim_score_batched = compute_maxsim_score_batched
    q, d = [torch.randn(3, 8)] * 4, [torch.randn(n, 8) for n in (1, 2, 3, 4)]
    with latemax.compat.patch("vllm"):
        assert module.compute_maxsim_score_batched is not compute_maxsim_score_batched
        torch.testing.assert_close(module.compute_maxsim_score_batched(q, d), compute_maxsim_score_batched(q, d))
    assert module.compute_maxsim_score_batched is compute_maxsim_score_batched
    tried["patch"] += 1
