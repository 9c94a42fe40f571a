"""Several stores into one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from . import catalog
from .files import CATALOG, StoreError
from .reader import PatchStore
from .writer import StoreWriter


def merge_stores(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """Copies the documents of stores, in their order, into a new store at ``out``.

    Everything is checked before anything is written; ``out`` is made whole: its documents appear in one commit a shard.

    Args:
        paths: of stores with one dim, dtype, kind of codes and of ids, and meta; no id may be in two.
        out: a folder that holds no store yet.

    Raises:
        ValueError: no paths, or an id that is in two stores; names both.
        StoreError: stores that do not go together, or ``out`` is a store; a ValueError too.
    """
    if isinstance(paths, (str, os.PathLike)) or not len(paths):
        raise ValueError(f"paths must be a list of at least one store, got {paths!r}")
    if (Path(out) / CATALOG).exists():
        raise StoreError(f"out must hold no store yet, got {out}")
    stores = [PatchStore(path) for path in paths]
    real = [store for store in stores if store.dim is not None]
    for store in stores:
        if store.meta != stores[0].meta:
            raise StoreError(
                f"stores must have one meta; {stores[0].path} has {stores[0].meta}, {store.path} has {store.meta}"
            )
    for store in real:
        for name in ("dim", "dtype", "codes", "id_type"):
            ours, first = getattr(store, name), getattr(real[0], name)
            if ours != first:
                raise StoreError(f"stores must have one {name}; {real[0].path} has {first}, {store.path} has {ours}")
    owner: dict[int | str, Path] = {}
    for store in real:
        for id in store.ids:
            if id in owner:
                raise ValueError(f"id {id!r} is in {owner[id]} and in {store.path}")
            owner[id] = store.path
    dtype, codes = (real[0].dtype, real[0].codes) if real else (None, None)
    with StoreWriter(out, dtype=dtype, codes=codes, meta=stores[0].meta) as writer:
        for store in real:
            snapshot = store.snapshot()
            with catalog.opened(snapshot.catalog) as db:
                for i, seq in enumerate(snapshot.seq.tolist()):
                    row = catalog.document_row(db, seq)
                    grid = None if row.rows is None else (row.rows, row.cols)
                    boxes = catalog.read_regions(db, row.regions)
                    meta = None if row.meta is None else catalog.parse_meta(snapshot.catalog, row.meta)
                    writer.add(
                        snapshot.document(i), row.id, grid, meta, regions=None if boxes is None else store.regions(i)
                    )
