"""One rank of tests/test_distributed.py: python distributed_worker.py CASE RANK WORLD FOLDER. Writes FOLDER/RANK.pt."""

import os
import sys
import time

import torch
import torch.distributed as dist

import latemax.distributed as many
from latemax.store import PatchStore

DIM, K = 16, 7


def queries():
    return torch.randn(4, 5, DIM, generator=torch.Generator().manual_seed(1))


def documents():
    """Ragged, with equal documents far apart: ties across ranks."""
    generator = torch.Generator().manual_seed(2)
    found = [torch.randn(1 + i % 9, DIM, generator=generator) for i in range(40)]
    for i in range(0, 40, 8):
        found[i] = found[3]
    return found


def bounds(world):
    # uneven shards; the last rank has fewer documents than k
    return [0, *[18 + 17 * r for r in range(world - 1)], 40]


def batch(rank):
    """Uneven: rank r has r + 2 queries and r + 1 documents, longer on higher ranks."""
    generator = torch.Generator().manual_seed(10 + rank)
    q = torch.randn(rank + 2, 4, DIM, generator=generator)
    d = torch.randn(rank + 1, 6 + rank, DIM, generator=generator)
    mask = torch.rand(rank + 1, 6 + rank, generator=generator) < 0.8
    return q, d, mask if rank else None


def message(call):
    try:
        call()
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def together(rank, world, folder):
    found, q = {}, queries()
    a, b = bounds(world)[rank : rank + 2]
    mine = documents()[a:b]
    found["list"] = tuple(many.topk(q, mine, K))
    found["one query"] = tuple(many.topk(q[0], mine, K))
    found["store"] = tuple(many.topk(q, PatchStore(f"{folder}/store{rank}"), K))
    dense = documents()[3].expand(20 if rank == 0 else 0, -1, -1)
    found["empty shards"] = tuple(many.topk(q, dense, 20))
    for chunk in (None, 1):
        q_mine, d_mine, keep = batch(rank)
        q_mine.requires_grad_(), d_mine.requires_grad_()
        scores = many.in_batch(q_mine, d_mine, None, keep, chunk=chunk, normalize=True)
        (scores * (rank + 1)).sin().sum().backward()
        found[f"in batch, chunk {chunk}"] = (scores.detach(), q_mine.grad, d_mine.grad)
    found["no gradient"] = many.in_batch(q_mine.detach(), d_mine.detach(), None, keep, normalize=True)
    found["dim"] = message(lambda: many.topk(torch.ones(1, 2, 8 + rank), torch.ones(3, 2, 8 + rank), 1))
    found["k"] = message(lambda: many.topk(q, mine, 1 + rank))
    found["k too large"] = message(lambda: many.topk(q, mine, 41))
    found["dtype"] = message(lambda: many.in_batch(q, q.half() if rank else q))
    found["grads"] = message(lambda: many.in_batch(q, q.clone().requires_grad_(rank == 0)))
    found["one fails"] = message(lambda: many.topk(q, mine if rank else 5, 1))
    found["search fails"] = message(lambda: many.topk(q, mine, 3, backend="auto" if rank else "cuda"))
    found["timeout"] = message(lambda: many.topk(q, mine, 3, timeout=0))
    return found


def lost(rank, world, folder):
    slow, dying = dist.new_group(), dist.new_group()
    found = {}
    if rank == 0:
        start = time.perf_counter()
        found["late"] = message(lambda: many.topk(queries(), documents(), 3, group=slow, timeout=0.5))
        found["late seconds"] = time.perf_counter() - start
    else:
        time.sleep(1.0)
    dist.barrier()
    if rank == 1:
        os._exit(9)
    found["dead"] = message(lambda: many.in_batch(queries(), queries(), group=dying, timeout=20))
    return found


def main():
    case, rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    found = {"together": together, "lost": lost}[case](rank, world, folder)
    torch.save(found, f"{folder}/{rank}.pt")
    if case == "lost":
        # the group is broken: its teardown would wait for the dead
        os._exit(0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
