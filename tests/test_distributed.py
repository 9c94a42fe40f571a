"""Ranks together give what one process gives, bit for bit; where they disagree, fail or die: an error and no hang."""

import os
import pathlib
import subprocess
import sys

import distributed_worker as worker
import pytest
import torch

import latemax
from latemax.store import StoreWriter

HERE = pathlib.Path(__file__).parent


def launch(case, world, folder):
    """What every rank found; None for a rank that died."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "distributed_worker.py", case, str(rank), str(world), folder],
            stderr=subprocess.PIPE, env=environment, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    results = [pathlib.Path(folder) / f"{rank}.pt" for rank in range(world)]
    found = [torch.load(path) if path.exists() else None for path in results]
    return found, errors


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder, world = tmp_path_factory.mktemp("ranks"), 3
    bounds = worker.bounds(world)
    for rank in range(world):
        with StoreWriter(folder / f"store{rank}", shard_bytes=1000) as writer:
            for document in worker.documents()[bounds[rank] : bounds[rank + 1]]:
                writer.add(document)
    found, errors = launch("together", world, str(folder))
    assert None not in found, "\n".join(errors)
    return found


@pytest.mark.parametrize("kind", ["list", "store"])
def test_topk_equals_one_process_bit_for_bit(together, kind):
    whole = latemax.topk(worker.queries(), worker.documents(), worker.K)
    for rank in together:
        assert torch.equal(rank[kind][0], whole.scores) and torch.equal(rank[kind][1], whole.indices)
        assert torch.equal(rank["one query"][0], whole.scores[0])


def test_ties_and_empty_shards(together):
    scores, indices = together[0]["empty shards"]
    assert torch.equal(indices, torch.arange(20).expand(4, -1))
    assert (scores == scores[:, :1]).all()
    assert all(torch.equal(rank["empty shards"][1], indices) for rank in together)


@pytest.mark.parametrize("chunk", [None, 1])
def test_in_batch_scores_and_gradients_equal_one_process(together, chunk):
    batches = [worker.batch(rank) for rank in range(3)]
    for q, d, _ in batches:
        q.requires_grad_(), d.requires_grad_()
    loss = 0
    for rank, (q, _, _) in enumerate(batches):
        scores = torch.cat([latemax.maxsim(q, d, None, keep, normalize=True) for _, d, keep in batches], 1)
        assert torch.equal(together[rank][f"in batch, chunk {chunk}"][0], scores)
        assert torch.equal(together[rank]["no gradient"], scores)
        loss = loss + (scores * (rank + 1)).sin().sum()
    loss.backward()
    for rank, (q, d, _) in enumerate(batches):
        _, q_grad, d_grad = together[rank][f"in batch, chunk {chunk}"]
        torch.testing.assert_close(q_grad, q.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(d_grad, d.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "dim",
            "ValueError: topk: all ranks must have the same shape of q; rank 0 has [1, 2, 8], rank 1",
        ),
        ("k", "ValueError: topk: all ranks must have the same k; rank 0 has 1, rank 1 has 2"),
        ("k too large", "ValueError: k must be at most the number of documents of all ranks, 40; got 41"),
        ("dtype", "ValueError: in_batch: all ranks must have the same dtype of d; rank 0 has torch.float32"),
        (
            "grads",
            "ValueError: in_batch: all ranks must have the same need of gradients (q, d); rank 0",
        ),
        ("timeout", "ValueError: timeout must be a number of seconds above 0, got 0"),
    ],
)
def test_ranks_that_disagree_raise_alike(together, case, words):
    for rank in together:
        assert rank[case].startswith(words), rank[case]


@pytest.mark.parametrize(("case", "own"), [("one fails", "TypeError: corpus"), ("search fails", "RuntimeError")])
def test_where_one_rank_fails_all_raise(together, case, own):
    assert together[0][case].startswith(own)
    for rank in together[1:]:
        assert rank[case].startswith("RuntimeError: topk: rank 0: "), rank[case]


def test_a_late_and_a_dead_rank_end_the_wait(tmp_path):
    found, errors = launch("lost", 2, str(tmp_path))
    assert found[1] is None and found[0] is not None, errors
    assert "topk: rank 0 of 2 lost another rank" in found[0]["late"] and "within 0.5 s" in found[0]["late"]
    assert found[0]["late seconds"] < 10
    assert "in_batch: rank 0 of 2 lost another rank" in found[0]["dead"]


def test_it_must_be_set_up():
    import latemax.distributed

    with pytest.raises(RuntimeError, match="init_process_group first"):
        latemax.distributed.topk(worker.queries(), worker.documents(), 1)
