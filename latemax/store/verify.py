"""The whole of a store against its digests: every row of the catalogue, and every byte of the shards."""

from __future__ import annotations

import numpy as np

from . import catalog
from .catalog import INT64
from .files import StoreError, sha256
from .snapshot import Snapshot


def verify(snapshot: Snapshot) -> None:
    """Reads the catalogue, and the shards that the snapshot names.

    Raises:
        StoreError: naming what differs.
    """
    with catalog.opened(snapshot.catalog) as db:
        state = [text for (text,) in db.execute("PRAGMA integrity_check(1)")]
        if state != ["ok"]:
            raise StoreError(f"{snapshot.catalog} is damaged: {state[0]}")
        catalog.read_store(db)
        catalog.read_shards(db)
        commits = list(catalog.select(db, "commits"))
        generations = np.array([commit.generation for commit in commits], dtype=np.int64)
        rows, spans = [], []
        regions: set[bytes] = set()
        for row in catalog.select(db, "documents"):
            rows.append((row.seq, row.pos, row.shard, row.start, row.length))
            spans.append((row.added, np.iinfo(np.int64).max if row.removed is None else row.removed))
            if row.regions is not None:
                regions.add(row.regions)
        for mark in regions:
            catalog.read_regions(db, mark)
        if db.execute("SELECT count(*) FROM regions").fetchone()[0] < len(regions):
            raise StoreError(f"{snapshot.catalog} is damaged: regions are missing")
    documents = np.array(rows, dtype=INT64).reshape(-1, 5)
    span = np.array(spans, dtype=np.int64).reshape(-1, 2)
    # the generation from which on a document is there, and from which on it is not, of those that are left
    begin, end = generations.searchsorted(span[:, 0]), generations.searchsorted(span[:, 1])
    seen = begin < end
    for i, commit in enumerate(commits):
        added = documents[seen & (begin == i)]
        removed = documents[seen & (end == i)][:, 0]
        if commit.added != added.tobytes() or commit.removed != removed.tobytes():
            raise StoreError(f"{snapshot.catalog} is damaged: generation {commit.generation} has other documents")
    wrong = [shard.name for shard in snapshot.files if sha256(shard.path) != shard.row.sha256]
    if wrong:
        raise StoreError(
            f"{snapshot.folder}: wrong checksum (SHA-256), the bytes have changed: shard {', '.join(wrong)}"
        )
