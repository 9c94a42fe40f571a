"""A store of four documents, and how tests make and read documents."""

import pytest
import torch

from latemax.store import StoreWriter


def document(value, length=4, dim=8):
    return torch.full((length, dim), float(value))


def values(store):
    return [float(x[0, 0]) for x in store]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "store"
    with StoreWriter(path, meta={"model": "m"}) as writer:
        for i, id in enumerate("abcd"):
            writer.add(document(i), id, meta={"year": 2000 + i})
    return path
