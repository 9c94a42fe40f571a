"""Transactions that make a new generation, and what clears the old ones."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from . import catalog, locks, shards
from .catalog import INT64, CommitRow, DocumentRow, ShardRow, StoreRow
from .files import CATALOG, StoreError, sync_folder

# a catalogue in the making
NEW = CATALOG + ".new"


def record(
    db: sqlite3.Connection,
    before: StoreRow,
    after: StoreRow,
    *,
    shards: Sequence[ShardRow] = (),
    documents: Sequence[DocumentRow] = (),
    regions: Iterable[bytes] = (),
    removed: Sequence[DocumentRow] = (),
) -> StoreRow:
    """Makes the generation after ``before``: adds documents in committed shards, and removes some.

    Args:
        before: the store as it must still be.
        after: what it becomes; ``generation`` and ``next_seq`` are set here.
        documents: by rising seq from ``before.next_seq`` on; ``added`` is set here.
        regions: boxes that the documents name. removed: rows as they are.

    Returns:
        The store's new row.
    """
    if catalog.read_store(db) != before:
        raise StoreError(f"{catalog.file_of(db)} was changed while a writer was at work: close it and open another")
    generation = before.generation + 1
    documents = [row._replace(added=generation) for row in documents]
    if any(row.removed is not None for row in removed):
        raise StoreError(f"{catalog.file_of(db)} is damaged: a document was removed twice")
    count, tokens = db.execute(
        "SELECT documents, tokens FROM commits WHERE generation = ?", (before.generation,)
    ).fetchone()
    added = np.array([(r.seq, r.pos, r.shard, r.start, r.length) for r in documents], dtype=INT64)
    commit = CommitRow(
        generation,
        catalog.nonce(),
        count + len(documents) - len(removed),
        tokens + sum(r.length for r in documents) - sum(r.length for r in removed),
        added.tobytes(),
        np.sort(np.array([r.seq for r in removed], dtype=INT64)).tobytes(),
    )
    row = after._replace(generation=generation, next_seq=before.next_seq + len(documents))
    catalog.insert(db, "shards", shards)
    db.executemany(
        "INSERT OR IGNORE INTO regions VALUES (?, ?)", ((catalog.regions_digest(boxes), boxes) for boxes in regions)
    )
    catalog.insert(db, "documents", (old._replace(removed=generation) for old in removed))
    catalog.insert(db, "documents", documents)
    catalog.insert(db, "commits", [commit])
    catalog.replace_store(db, row)
    return row


class NewShard(NamedTuple):
    """A shard to be written. ``tensors``: in the order of the file, of ``tokens`` tokens in all."""

    tensors: Iterable[Tensor]
    tokens: int
    dtype: str
    kind: str = "tokens"


def write_shards(folder: Path, parts: Sequence[NewShard], *, dim: int) -> list[ShardRow]:
    """Writes shards of consecutive numbers, synced and ready to be committed.

    The names are on the disk as pending before the files are; they are cleared again if anything fails.
    """
    with catalog.opened(folder / CATALOG, write=True) as db:
        number = db.execute("SELECT coalesce(max(shard), -1) + 1 FROM shards").fetchone()[0]
        rows = [
            ShardRow(
                n, f"shard-{n:06d}-{os.urandom(4).hex()}.safetensors", "pending", part.kind, part.dtype, dim, 0, 0, b""
            )
            for n, part in enumerate(parts, number)
        ]
        catalog.insert(db, "shards", rows)
    with discarding(folder):
        for i, part in enumerate(parts):
            size, digest = shards.write(
                folder / rows[i].name, part.tensors, dtype=part.dtype, tokens=part.tokens, dim=dim
            )
            rows[i] = rows[i]._replace(state="committed", tokens=part.tokens, size=size, sha256=digest)
        sync_folder(folder)
    return rows


@contextmanager
def discarding(folder: Path) -> Iterator[None]:
    """Clears pending files where the block fails; what fails to be cleared is left to the next writer."""
    try:
        yield
    except BaseException:
        with suppress(OSError, StoreError):
            clear_pending(folder)
        raise


def clear_pending(folder: Path) -> None:
    """Deletes the files that were named but not committed, then their names."""
    with catalog.opened(folder / CATALOG) as db:
        pending = [row for row in catalog.read_shards(db).values() if row.state == "pending"]
        if not pending:
            return
        named = {shard for (shard,) in db.execute("SELECT DISTINCT shard FROM documents")}
    for row in pending:
        if row.shard in named:
            raise StoreError(f"{folder / CATALOG} is damaged: documents are in {row.name}, which was never committed")
    for row in pending:
        (folder / row.name).unlink(missing_ok=True)
    # a file that came back after a power cut must still have its name here
    sync_folder(folder)
    with catalog.opened(folder / CATALOG, write=True) as db:
        db.executemany("DELETE FROM shards WHERE shard = ? AND state = 'pending'", [(row.shard,) for row in pending])


def clear_generations(folder: Path) -> None:
    """Forgets every generation that no reader holds but the last, its documents, and shards that nothing names then."""
    with locks.closed_gate(folder) as held:
        if held is None:
            return
        with catalog.opened(folder / CATALOG, write=True) as db:
            last = catalog.read_store(db).generation
            known = [generation for (generation,) in db.execute("SELECT generation FROM commits ORDER BY generation")]
            kept = [generation for generation in known if generation in held or generation == last]
            if kept != known:
                _keep(db, kept)
    clear_pending(folder)


def _keep(db: sqlite3.Connection, kept: list[int]) -> None:
    """Leaves the generations ``kept`` (rising) of the catalogue."""
    commits, before = [], np.zeros((0, 5), dtype=INT64)
    for generation in kept:
        commit, documents = catalog.layout(db, generation)
        added = documents[~np.isin(documents[:, 0], before[:, 0])]
        removed = before[:, 0][~np.isin(before[:, 0], documents[:, 0])]
        commits.append(commit._replace(added=added.tobytes(), removed=removed.tobytes()))
        before = documents
    db.execute("DELETE FROM commits")
    catalog.insert(db, "commits", commits)
    ended = db.execute("SELECT seq, added, removed FROM documents WHERE removed IS NOT NULL").fetchall()
    if not all(type(x) is int for span in ended for x in span):
        raise StoreError(f"{catalog.file_of(db)} is damaged: documents are removed at no generation")
    spans = np.array(ended, dtype=np.int64).reshape(-1, 3)
    generations = np.array([*kept, np.iinfo(np.int64).max])
    dead = generations[generations.searchsorted(spans[:, 1])] >= spans[:, 2]
    db.executemany("DELETE FROM documents WHERE seq = ?", ((seq,) for seq in spans[dead, 0].tolist()))
    db.execute("DELETE FROM regions WHERE digest NOT IN (SELECT regions FROM documents WHERE regions IS NOT NULL)")
    used = {shard for (shard,) in db.execute("SELECT DISTINCT shard FROM documents")}
    rows = catalog.read_shards(db)
    used |= {shard + 1 for shard in used if shard + 1 in rows and rows[shard + 1].kind == "codes"}
    unused = [row for row in rows.values() if row.shard not in used]
    catalog.insert(db, "shards", [row._replace(state="pending") for row in unused])


def create_new(folder: Path, meta: str) -> None:
    """An empty catalogue under a name of its own, which `os.replace` makes the store's."""
    for left in (folder / NEW, folder / (NEW + "-journal")):
        left.unlink(missing_ok=True)
    catalog.create(folder / NEW, meta)


def make_catalog(folder: Path, meta: str) -> None:
    """An empty catalogue, which appears whole or not at all."""
    create_new(folder, meta)
    os.replace(folder / NEW, folder / CATALOG)
    sync_folder(folder)
    sync_folder(folder.absolute().parent)
