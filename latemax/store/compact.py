"""Compaction: documents that are left move into whole shards, in their order, and old generations are forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from . import catalog
from .catalog import DocumentRow, StoreRow
from .commits import NewShard, clear_generations, discarding, record, write_shards
from .files import CATALOG
from .packed import DTYPES, empty, token_bytes
from .shards import CODES
from .snapshot import Snapshot

# Bytes of tokens in memory at once.
BUFFER = 1 << 24
Documents = range


def compact(folder: Path, store: StoreRow, shard_bytes: int) -> StoreRow:
    """Rewrites what is in shards with gaps or in small ones; the caller is the store's only writer.

    Returns:
        The store's row afterwards.
    """
    snapshot = Snapshot(folder, hold=False)
    parts = _plan(snapshot, shard_bytes)
    if parts:
        assert store.dtype is not None and store.dim is not None
        wanted = []
        for part in parts:
            tokens = int(snapshot.ends[part.stop] - snapshot.ends[part.start])
            wanted.append(NewShard(tensors_of(snapshot, part, store.dtype), tokens, store.dtype))
            if store.codes:
                wanted.append(NewShard(tensors_of(snapshot, part, store.codes), tokens, store.codes, "codes"))
        written = write_shards(folder, wanted, dim=store.dim)
        moved = [row for row in written if row.kind == "tokens"]
        with discarding(folder), catalog.opened(folder / CATALOG, write=True) as db:
            rows: list[DocumentRow] = []
            removed: list[DocumentRow] = []
            for shard, part in zip(moved, parts, strict=True):
                start = 0
                for i in part:
                    row = catalog.document_row(db, int(snapshot.seq[i]))
                    removed.append(row)
                    rows.append(row._replace(seq=store.next_seq + len(rows), shard=shard.shard, start=start))
                    start += row.length
            store = record(db, store, store, shards=written, documents=rows, removed=removed)
    clear_generations(folder)
    return store


def _plan(snapshot: Snapshot, shard_bytes: int) -> list[Documents]:
    """The documents of every shard to be written; a shard that is whole and at least half full stays."""
    if snapshot.store.dim is None:
        return []
    row = token_bytes(DTYPES[snapshot.store.dtype], snapshot.store.dim)
    found: list[Documents] = []
    # a stretch of documents between shards that stay, and whether it is one whole shard
    begin, whole = 0, 0
    runs = list(snapshot.runs())
    for number, (shard, start, first, last) in enumerate(runs):
        covers = start == 0 and int(snapshot.ends[last] - snapshot.ends[first]) == shard.row.tokens
        stays = covers and shard.row.tokens * row * 2 >= shard_bytes
        if not stays:
            whole += 1 if covers else 2
        ends = stays or number + 1 == len(runs)
        if ends:
            stop = first if stays else last
            # one small shard with nothing to join it to stays as well
            if whole > 1:
                found += _split(snapshot, range(begin, stop), max(1, shard_bytes // row))
            begin, whole = last, 0
    return found


def _split(snapshot: Snapshot, documents: Documents, tokens: int) -> list[Documents]:
    """Consecutive parts, each ended by the document that reaches the number of tokens."""
    found, begin = [], documents.start
    while begin < documents.stop:
        stop = int(snapshot.ends.searchsorted(snapshot.ends[begin] + tokens))
        stop = min(max(stop, begin + 1), documents.stop)
        found.append(range(begin, stop))
        begin = stop
    return found


def tensors_of(snapshot: Snapshot, documents: Documents, dtype: str) -> Iterator[Tensor]:
    """The tokens of consecutive documents, or their codes, in the order of a shard and a buffer at a time."""
    dim = snapshot.store.dim
    assert dim is not None
    rows = max(1, BUFFER // token_bytes(DTYPES[dtype], dim))
    for name in CODES if dtype == "int8" else ("tokens",):
        for part in _split(snapshot, documents, rows):
            count = int(snapshot.ends[part.stop] - snapshot.ends[part.start])
            tokens = empty(DTYPES[dtype], count, dim)
            out = tokens if isinstance(tokens, Tensor) else getattr(tokens, name)
            snapshot.read_part(name, part.start, part.stop, out)
            yield out
