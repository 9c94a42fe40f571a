"""One generation of a store in memory: where every document is, and how it is read. Never changes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import catalog, locks, where
from .catalog import DocumentRow
from .files import StoreError, find_catalog
from .packed import DTYPES, Tokens, empty
from .shards import CODES, Shard

# Stretches of neighbours that are announced before the first is read.
ANNOUNCED = 512


class Snapshot:
    """The documents of a generation, in order, which stay readable as long as this object lives.

    Args:
        folder: of the store.
        generation: None is the last one.
        identity: that the snapshot must have; None takes any.
        known: shards that were opened before, by name.
        hold: False is for the store's only writer, which alone could clear the generation.

    Raises:
        FileNotFoundError, StoreError: as `PatchStore`.
    """

    def __init__(
        self,
        folder: Path,
        generation: int | None = None,
        identity: str | None = None,
        known: dict[str, Shard] | None = None,
        hold: bool = True,
    ):
        self.folder = folder
        self.catalog = find_catalog(folder)

        def read() -> tuple[int, tuple]:
            with catalog.opened(self.catalog) as db:
                store = catalog.read_store(db)
                wanted = store.generation if generation is None else generation
                commit, documents = catalog.layout(db, wanted)
                return wanted, (store, commit, documents, catalog.read_shards(db))

        found, self._lock = locks.hold(folder, read) if hold else (read()[1], None)
        self.store, commit, documents, rows = found
        self.generation = commit.generation
        self.identity = commit.nonce
        if identity not in (None, self.identity):
            raise StoreError(f"{self.catalog} is of another store: its generation {self.generation} is another one")
        self._place(documents, rows, known or {})

    def _place(self, documents: np.ndarray, rows: dict[int, catalog.ShardRow], known: dict[str, Shard]) -> None:
        """Sets order, offsets, shards and runs from int64 [n, 5] of seq, pos, shard, start, length."""
        pos = documents[:, 1]
        if (np.diff(pos) <= 0).any():
            documents = documents[np.argsort(pos, kind="stable")]
            if (np.diff(documents[:, 1]) == 0).any():
                raise StoreError(f"{self.catalog} is damaged: two documents have one position")
        self.seq, _, shard, start, length = documents.T
        numbers, index = np.unique(shard, return_inverse=True)
        for number in numbers.tolist():
            row = rows.get(number)
            if row is None or row.state != "committed":
                raise StoreError(f"{self.catalog} is damaged: documents are in shard {number}, which it does not have")
            if (row.kind, row.dtype, row.dim) != ("tokens", self.store.dtype, self.store.dim):
                raise StoreError(f"{self.catalog}: shard {row.name} does not hold tokens like the store's others")
            codes = rows.get(number + 1)
            wanted = ("committed", "codes", self.store.codes, row.dim, row.tokens)
            if self.store.codes and (codes is None or wanted != (codes.state, *codes[3:7])):
                raise StoreError(f"{self.catalog} is damaged: shard {row.name} has no codes")
        names = [rows[number] for number in numbers.tolist()]
        room = np.array([row.tokens for row in names], dtype=np.int64)
        if ((start < 0) | (length < 0) | (start + length > room[index])).any():
            raise StoreError(f"{self.catalog} is damaged: documents go beyond the end of their shards")
        self.shards = [known.get(row.name) or Shard(self.folder, row) for row in names]
        # of the shard at the same place of `shards`
        self.codes = None
        if self.store.codes:
            code_rows = [rows[number + 1] for number in numbers.tolist()]
            self.codes = [known.get(row.name) or Shard(self.folder, row) for row in code_rows]
        self.ends = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum(length, out=self.ends[1:])
        self.offsets = torch.from_numpy(self.ends)
        # a run: documents that follow each other in one shard without a gap, read in one go
        breaks = (index[1:] != index[:-1]) | (start[1:] != start[:-1] + length[:-1])
        first = np.flatnonzero(np.concatenate([[True], breaks])) if len(documents) else np.zeros(0, np.int64)
        self.run_first = np.append(first, len(documents))
        self.run_shard, self.run_start = index[first], start[first]

    def __len__(self) -> int:
        return len(self.seq)

    @property
    def files(self) -> list[Shard]:
        """The files that hold documents, in the order they were written."""
        return sorted([*self.shards, *(self.codes or [])], key=lambda shard: shard.row.shard)

    def read(self, first: int, last: int, out: Tokens) -> None:
        """Documents first … last - 1 into out [t, dim]; contiguous, on the CPU; maps no pages.

        ``out`` has the store's dtype, or is QuantizedTokens where the store has codes.
        """
        for name in ("tokens",) if isinstance(out, Tensor) else CODES:
            self.read_part(name, first, last, out if isinstance(out, Tensor) else getattr(out, name))

    def read_part(self, name: str, first: int, last: int, out: Tensor) -> None:
        """One tensor of documents first … last - 1: "tokens", "codes", "scale" or "error"."""
        row = 0
        for shard, at, count in self._pieces(name, first, last):
            shard.read(name, at, out[row : row + count])
            row += count

    def _pieces(self, name: str, first: int, last: int) -> Iterator[tuple[Shard, int, int]]:
        """(shard, first token in it, how many) of what documents first … last - 1 have of a tensor, in order."""
        shards = self.shards if name == "tokens" or self.codes is None else self.codes
        ends = self.ends
        run = int(self.run_first.searchsorted(first, "right")) - 1
        while first < last:
            begin, stop = int(self.run_first[run]), min(last, int(self.run_first[run + 1]))
            count = int(ends[stop] - ends[first])
            if count:
                yield shards[self.run_shard[run]], int(self.run_start[run] + ends[first] - ends[begin]), count
            first, run = stop, run + 1

    def read_some(self, documents: np.ndarray, out: Tokens) -> None:
        """Documents of rising number into out, neighbours in one go."""
        stretches = [
            (int(part[0]), int(part[-1]) + 1)
            for part in np.split(documents, np.flatnonzero(np.diff(documents) != 1) + 1)
            if len(part)
        ]
        if len(stretches) > 1:
            # so that a disk finds several at a time
            for first, last in stretches[:ANNOUNCED]:
                for name in ("tokens",) if isinstance(out, Tensor) else CODES:
                    for shard, at, count in self._pieces(name, first, last):
                        shard.announce(name, at, count)
        row = 0
        for first, last in stretches:
            count = int(self.ends[last] - self.ends[first])
            self.read(first, last, out[row : row + count])
            row += count

    def document(self, i: int) -> Tokens:
        assert self.store.dtype is not None and self.store.dim is not None
        out = empty(DTYPES[self.store.dtype], int(self.ends[i + 1] - self.ends[i]), self.store.dim)
        self.read(i, i + 1, out)
        return out

    def runs(self) -> Iterator[tuple[Shard, int, int, int]]:
        """(shard, first token in it, first document, the one after the last) of documents contiguous in a file."""
        for run in range(len(self.run_shard)):
            first, last = int(self.run_first[run]), int(self.run_first[run + 1])
            yield self.shards[self.run_shard[run]], int(self.run_start[run]), first, last

    @contextmanager
    def _db(self) -> Iterator[sqlite3.Connection]:
        with catalog.opened(self.catalog) as db:
            found = db.execute("SELECT nonce FROM commits WHERE generation = ?", (self.generation,)).fetchall()
            if found != [(self.identity,)]:
                raise StoreError(f"{self.catalog} was replaced while generation {self.generation} of it was open")
            yield db

    def row(self, i: int) -> tuple[DocumentRow, bytes | None]:
        """The catalogue's row of a document, and its regions."""
        with self._db() as db:
            row = catalog.document_row(db, int(self.seq[i]))
            return row, catalog.read_regions(db, row.regions)

    def meta(self, i: int) -> dict[str, Any]:
        row, _ = self.row(i)
        return {} if row.meta is None else catalog.parse_meta(self.catalog, row.meta)

    def metas(self) -> list[dict[str, Any]]:
        """The metadata of all documents, in order."""
        return [{} if text is None else catalog.parse_meta(self.catalog, text) for text in self._column("meta")]

    def grid_rows(self) -> np.ndarray:
        """Rows of every document's grid, int64; 0 where it has none."""
        return np.array([rows or 0 for rows in self._column("rows")], dtype=np.int64)

    def follows(self, generation: int | None, identity: str | None) -> bool:
        """Whether a generation is one of this store, as far as the store still knows."""
        with self._db() as db:
            return bool(
                db.execute(
                    "SELECT 1 FROM commits WHERE generation = ? AND nonce = ?", (generation, identity)
                ).fetchall()
            )

    @cached_property
    def ids(self) -> list[int] | list[str]:
        ids = self._column("id")
        kind = {"int": int, "str": str}.get(self.store.id_type or "")
        if not all(type(id) is kind for id in ids):
            raise StoreError(f"{self.catalog} is damaged: ids must be {self.store.id_type}")
        return ids

    def _column(self, name: str) -> list[Any]:
        """One value of every document's row, in order."""
        with self._db() as db:
            found = db.execute(
                f"SELECT seq, {name} FROM documents "
                "WHERE added <= ?1 AND (removed IS NULL OR removed > ?1) ORDER BY seq",
                (self.generation,),
            ).fetchall()
        order = self.seq.argsort()
        if [seq for seq, _ in found] != self.seq[order].tolist():
            raise StoreError(f"{self.catalog} is damaged: its documents are not those of its commits")
        values: list[Any] = [None] * len(found)
        for at, (_, value) in zip(order.tolist(), found, strict=True):
            values[at] = value
        return values

    @cached_property
    def _by_seq(self) -> tuple[np.ndarray, np.ndarray | None]:
        """seq, rising, and the document of each; None where documents are in that order."""
        if (np.diff(self.seq) > 0).all():
            return self.seq, None
        order = self.seq.argsort()
        return self.seq[order], order

    def _documents(self, seq: np.ndarray) -> np.ndarray:
        """The documents of rows of this generation."""
        rising, order = self._by_seq
        at = rising.searchsorted(seq)
        if (at >= len(rising)).any() or (rising[at] != seq).any():
            raise StoreError(f"{self.catalog} is damaged: its documents are not those of its commits")
        return at if order is None else order[at]

    def find(self, ids: list[int] | list[str]) -> np.ndarray:
        """The documents of ids, in their order; -1 where there is none."""
        found = np.full(len(ids), -1, dtype=np.int64)
        live = "id = ?1 AND added <= ?2 AND (removed IS NULL OR removed > ?2)"
        with self._db() as db:
            for i, id in enumerate(ids):
                rows = list(catalog.select(db, "documents", f"WHERE {live}", (id, self.generation)))
                if [row.id for row in rows] != [id]:
                    # an index with damage must neither hide a document nor name another
                    rows = list(catalog.select(db, "documents", f"NOT INDEXED WHERE {live}", (id, self.generation)))
                if len(rows) > 1:
                    raise StoreError(f"{self.catalog} is damaged: {len(rows)} documents have the id {id!r}")
                if rows:
                    (found[i],) = self._documents(np.array([row.seq for row in rows], dtype=np.int64))
        return found

    def where(self, condition: str, values: tuple) -> np.ndarray:
        """Documents for which the condition is true, rising."""
        sql, bound = where.translate(condition, values)
        with self._db() as db:
            found = where.run(
                db,
                "SELECT seq FROM documents NOT INDEXED "
                f"WHERE added <= ? AND (removed IS NULL OR removed > ?) AND ({sql})",
                (self.generation, self.generation, *bound),
                len(self),
            )
        return np.sort(self._documents(np.array(found, dtype=np.int64)))
