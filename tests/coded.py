"""Corpora for tests of `topk` from 8-bit codes, and the comparison with the search of the tokens."""

import torch

from latemax import PatchStore, StoreWriter, topk

DIM = 16
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def clustered(n=500, seed=0, spread=0.3, tokens=12):
    """Documents around directions of their own, as images are: bounds tell most of them apart."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens, (n,), generator=generator).tolist()
    found = []
    for length in lengths:
        direction = torch.randn(DIM, generator=generator)
        found.append(direction + spread * torch.randn(length, DIM, generator=generator))
    return found


def queries(items, n_q=3, l_q=5, seed=9):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, len(items), (n_q,), generator=generator).tolist()
    return torch.stack([items[i].float()[0] + 0.3 * torch.randn(l_q, DIM, generator=generator) for i in chosen])


def store_of(folder, items, dtype=torch.float32, **options):
    with StoreWriter(folder, dtype=dtype, **{"codes": "int8", "shard_bytes": 20_000} | options) as writer:
        for item in items:
            writer.add(item.to(dtype))
    return PatchStore(folder)


def assert_same(found, expected):
    assert torch.equal(found.indices, expected.indices)
    assert found.scores.dtype == expected.scores.dtype
    bits = torch.int64 if found.scores.dtype == torch.float64 else torch.int32
    assert torch.equal(found.scores.view(bits), expected.scores.view(bits))
    assert (found.argmax is None) == (expected.argmax is None)
    assert found.argmax is None or torch.equal(found.argmax, expected.argmax)


def compare(q, store, k=5, **options):
    """(with codes, without), which must be the same."""
    found, expected = topk(q, store, k, **options), topk(q, store, k, codes="off", **options)
    assert expected.stats is None and found.stats is not None
    assert_same(found, expected)
    return found, expected
