"""Several stores into one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from . import catalog
from .catalog import DocumentRow
from .commits import NewShard, discarding, record, write_shards
from .compact import tensors_of
from .files import CATALOG, StoreError
from .reader import PatchStore
from .writer import StoreWriter


def merge_stores(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """Copies the documents of stores, in their order, into a new store at ``out``.

    Everything is checked before anything is written, and all documents appear in one transaction.

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
    check_distinct(real)
    dtype, codes = (real[0].dtype, real[0].codes) if real else (None, None)
    with StoreWriter(out, dtype=dtype, codes=codes, meta=stores[0].meta) as writer:
        append(writer, real)


def check_distinct(stores: Sequence[PatchStore]) -> None:
    """ValueError where an id is in two stores, naming both."""
    owner: dict[int | str, Path] = {}
    for store in stores:
        for id in store.ids:
            if id in owner:
                raise ValueError(f"id {id!r} is in {owner[id]} and in {store.path}")
            owner[id] = store.path


def append(writer: StoreWriter, stores: Sequence[PatchStore]) -> None:
    """Adds the documents of stores in one transaction, a shard for each; tokens are copied a buffer at a time.

    A document whose id the writer's store has takes the place of that one. What the writer had gathered is committed
    first.

    Args:
        writer: of a store with the same dim, dtype, codes and kind of ids, or of an empty one.
        stores: to read.

    Raises:
        ValueError: an id that is in two of them. StoreError: stores that do not go together.
        OSError: the store is as it was.
    """
    writer.commit()
    stores = [store for store in stores if len(store)]
    if not stores:
        return
    check_distinct(stores)
    first, before = stores[0].snapshot().store, writer._store
    for row in [before, *(store.snapshot().store for store in stores)]:
        for name in ("dim", "dtype", "codes", "id_type"):
            if row.dim is not None and getattr(row, name) != getattr(first, name):
                raise StoreError(f"stores must have one {name}, got {getattr(row, name)} and {getattr(first, name)}")
    assert first.dtype is not None and first.dim is not None
    parts = []
    for snapshot in (store.snapshot() for store in stores):
        tokens, every = int(snapshot.ends[-1]), range(len(snapshot))
        parts.append(NewShard(tensors_of(snapshot, every, first.dtype), tokens, first.dtype))
        if first.codes:
            parts.append(NewShard(tensors_of(snapshot, every, first.codes), tokens, first.codes, "codes"))
    written = write_shards(writer.path, parts, dim=first.dim)
    places = [row.shard for row in written if row.kind == "tokens"]
    with discarding(writer.path), catalog.opened(writer.path / CATALOG, write=True) as db:
        rows: list[DocumentRow] = []
        removed: list[DocumentRow] = []
        regions: set[bytes] = set()
        for shard, store in zip(places, stores, strict=True):
            snapshot = store.snapshot()
            with catalog.opened(snapshot.catalog) as theirs:
                for i, seq in enumerate(snapshot.seq.tolist()):
                    row = catalog.document_row(theirs, seq)
                    boxes = catalog.read_regions(theirs, row.regions)
                    regions |= set() if boxes is None else {boxes}
                    new = pos = before.next_seq + len(rows)
                    old = writer._ids.get(row.id)
                    if old is not None:
                        removed.append(catalog.document_row(db, old))
                        pos = removed[-1].pos
                    rows.append(row._replace(seq=new, pos=pos, removed=None, shard=shard, start=int(snapshot.ends[i])))
        ids = [row.id for row in rows if isinstance(row.id, int)]
        after = before._replace(
            format_version=first.format_version, dim=first.dim, dtype=first.dtype, id_type=first.id_type,
            next_id=max([before.next_id, *(id + 1 for id in ids)]),
        )  # fmt: skip
        record(db, before, after, shards=written, documents=rows, regions=regions, removed=removed)
    # the writer goes on from there
    writer._open(None, None, None)
