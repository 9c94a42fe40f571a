"""First stages and documents for their tests."""

import torch
import torch.nn.functional as F

from latemax import BinaryScan, Lemur, MeanPool, Muvera, PatchStore, RowPool, StoreWriter

DIM = 24
LEMUR = dict(width=64, documents=100, tokens=600, solve=256, epochs=6)
MAKE = {
    "MeanPool": lambda corpus, **options: MeanPool(corpus, engine="torch", **options),
    "RowPool": RowPool,
    "BinaryScan": BinaryScan,
    "Muvera": lambda corpus, **options: Muvera(corpus, engine="torch", repetitions=8, bits=3, **options),
    "Lemur": lambda corpus, **options: Lemur(corpus, engine="torch", **(LEMUR | options)),
}
KIND = {"MeanPool": MeanPool, "RowPool": RowPool, "BinaryScan": BinaryScan, "Muvera": Muvera, "Lemur": Lemur}


def pages(n=120, seed=0):
    """Ragged documents, each around a few directions of its own; one without a token."""
    made = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        length = int(torch.randint(3, 20, (), generator=made))
        own = torch.randn(4, DIM, generator=made)
        of = own[torch.randint(0, 4, (length,), generator=made)]
        found.append(F.normalize(of + 0.4 * torch.randn(length, DIM, generator=made), dim=-1).half())
    found[7:8] = [item[:0] for item in found[7:8]]
    return found


def questions(items, documents, seed=1):
    """Queries [n, 5, dim]: tokens of each document, with noise."""
    made = torch.Generator().manual_seed(seed)
    rows = [items[i][torch.randint(0, len(items[i]), (5,), generator=made)].float() for i in documents]
    return F.normalize(torch.stack(rows) + 0.05 * torch.randn(len(rows), 5, DIM, generator=made), dim=-1)


def stored(folder, items, ids=None):
    with StoreWriter(folder, shard_bytes=3000) as writer:
        for i, item in enumerate(items):
            writer.add(item, f"page-{i}" if ids is None else ids[i], grid=(1, len(item)) if len(item) else None)
    return PatchStore(folder)
