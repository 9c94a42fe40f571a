"""``catalog.sqlite``: its tables, their rows with a digest each, and one connection a transaction.

A connection lives for one transaction: nothing is held across a fork, and closing a file elsewhere in the process can
drop no lock of ours. Writers use the rollback journal with synchronous=EXTRA: the folder is synced after the journal is
deleted, so that a committed transaction stays committed through a power cut.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints
from urllib.parse import quote

import numpy as np

from .files import StoreError, is_plain
from .packed import DTYPES

# 2: the store has codes. A store without them keeps version 1.
FORMAT_VERSION, WITH_CODES = 1, 2
# Seconds to wait for another process's transaction.
BUSY = 60.0
INT64 = np.dtype("<i8")
# What sqlite says of a damaged file may quote bytes of it that are no text.
ERRORS = (sqlite3.Error, UnicodeDecodeError)


class StoreRow(NamedTuple):
    """The store as a whole: one row."""

    format_version: int
    generation: int
    dim: int | None  # None, as dtype and id_type: no document was ever committed
    dtype: str | None
    id_type: str | None
    next_id: int
    next_seq: int
    meta: str

    @property
    def codes(self) -> str | None:
        """ "int8" where every shard of tokens has a shard of their codes after it, else None."""
        return "int8" if self.format_version == WITH_CODES and self.dtype != "int8" else None


class CommitRow(NamedTuple):
    """A generation that can be opened, and what it changed since the one before.

    nonce: random, so that a generation is not taken for one of the same number after an old catalogue was put back.
    added: int64 [n, 5] of seq, pos, shard, start, length; removed: int64 [m] of seq. The same facts are in
    ``documents``; as arrays they open in a twentieth of the time.
    """

    generation: int
    nonce: str
    documents: int
    tokens: int
    added: bytes
    removed: bytes


class ShardRow(NamedTuple):
    shard: int
    name: str
    state: str  # pending or committed
    kind: str  # what it holds: "tokens", which documents name, or "codes" of the tokens of the shard before
    dtype: str
    dim: int
    tokens: int
    size: int
    sha256: bytes


class DocumentRow(NamedTuple):
    """A document of the generations ``added`` … ``removed`` - 1. A replacement keeps ``pos``, which is the order."""

    seq: int
    pos: int
    id: int | str
    added: int
    removed: int | None
    shard: int
    start: int
    length: int
    rows: int | None
    cols: int | None
    regions: bytes | None
    meta: str | None


TABLES: dict[str, type] = {"store": StoreRow, "commits": CommitRow, "shards": ShardRow, "documents": DocumentRow}
# What a value may be, by table and field; a digest can be made to fit by who writes the row.
TYPES = {
    table: [set(get_args(kind) or [kind]) for kind in get_type_hints(row).values()] for table, row in TABLES.items()
}
KEYS = {"commits": "generation", "shards": "shard", "documents": "seq"}
SCHEMA = (
    *(
        f"CREATE TABLE {table} ("
        + ", ".join(f"{field} INTEGER PRIMARY KEY" if field == KEYS.get(table) else field for field in row._fields)
        + ", digest)"
        for table, row in TABLES.items()
    ),
    # boxes of documents' tokens, once each: documents.regions is their digest
    "CREATE TABLE regions (digest PRIMARY KEY, boxes)",
    "CREATE INDEX documents_id ON documents (id)",
)


def nonce() -> str:
    return os.urandom(16).hex()


def digest(row: tuple) -> bytes:
    # ascii(), as repr() depends on the Unicode tables of the Python at hand; not of megabytes, which it would escape
    row = tuple(_mark(x) if isinstance(x, bytes) and len(x) > 64 else x for x in row)
    return _mark(ascii(row).encode())


def _mark(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def regions_digest(boxes: bytes) -> bytes:
    return _mark(boxes)


@contextmanager
def opened(path: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection in one transaction; committed at the end of the block, rolled back after an exception.

    Raises:
        StoreError: whatever sqlite says, with the path.
    """
    try:
        db = _connect(path, "rw") if write else _reader(path)
    except ERRORS as error:
        raise _damaged(path, error) from error
    try:
        if write:
            db.execute("PRAGMA synchronous = EXTRA")
            db.execute("BEGIN IMMEDIATE")
        yield db
        if write:
            db.execute("COMMIT")
    except ERRORS as error:
        raise _damaged(path, error) from error
    finally:
        # an open transaction is rolled back
        db.close()


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(f"{path} cannot be used: {type(error).__name__}: {error}")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    address = f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}"
    # autocommit: transactions begin where we say so
    db = sqlite3.connect(address, uri=True, timeout=BUSY, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA cell_size_check = ON")
        db.execute("PRAGMA temp_store = MEMORY")
    except BaseException:
        db.close()
        raise
    return db


def _reader(path: Path) -> sqlite3.Connection:
    for attempt in (1, 2):
        db = _connect(path, "ro")
        try:
            db.execute("BEGIN")
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return db
        except sqlite3.OperationalError:
            db.close()
            journal = path.with_name(path.name + "-journal")
            if attempt == 2 or not journal.exists():
                raise
            # a writer was killed in its transaction: only a connection that may write can roll it back
            recovering = _connect(path, "rw")
            try:
                recovering.execute("BEGIN IMMEDIATE")
            finally:
                recovering.close()
        except BaseException:
            db.close()
            raise
    raise AssertionError("not reached")


def create(path: Path, meta: str) -> None:
    """A catalogue without documents; the file is synced, its folder is not."""
    db = _connect(path, "rwc")
    try:
        db.execute("PRAGMA synchronous = EXTRA")
        db.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA:
            db.execute(statement)
        insert(db, "store", [StoreRow(FORMAT_VERSION, 0, None, None, None, 0, 0, meta)])
        insert(db, "commits", [CommitRow(0, nonce(), 0, 0, b"", b"")])
        db.execute("COMMIT")
    except sqlite3.Error as error:
        raise _damaged(path, error) from error
    finally:
        db.close()


def insert(db: sqlite3.Connection, table: str, rows: Iterable[tuple]) -> None:
    """Adds rows, or puts them in the place of those of the same key."""
    marks = ", ".join("?" * (len(TABLES[table]._fields) + 1))
    db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", ((*row, digest(row)) for row in rows))


def replace_store(db: sqlite3.Connection, row: StoreRow) -> None:
    db.execute("DELETE FROM store")
    insert(db, "store", [row])


def select(db: sqlite3.Connection, table: str, where: str = "", values: tuple = ()) -> Iterator[Any]:
    """Rows of a table by their key, each checked against its digest and for the types of its values.

    Raises:
        StoreError: a damaged row.
    """
    kind, types = TABLES[table], TYPES[table]
    fields = ", ".join(kind._fields)
    order = f" ORDER BY {KEYS[table]}" if table in KEYS else ""
    for *values_, mark in db.execute(f"SELECT {fields}, digest FROM {table} {where}{order}", values):
        row = kind(*values_)
        if mark != digest(row) or not all(type(x) in allowed for x, allowed in zip(row, types, strict=True)):
            key = f" {row[kind._fields.index(KEYS[table])]!r}" if table in KEYS else ""
            raise StoreError(f"{file_of(db)} is damaged: row{key} of {table} is not as it was written")
        yield row


def document_row(db: sqlite3.Connection, seq: int) -> DocumentRow:
    rows = list(select(db, "documents", "WHERE seq = ?", (seq,)))
    if len(rows) != 1:
        raise StoreError(f"{file_of(db)} is damaged: it has no row {seq} of documents")
    return rows[0]


def file_of(db: sqlite3.Connection) -> str:
    return db.execute("PRAGMA database_list").fetchone()[2]


def read_store(db: sqlite3.Connection) -> StoreRow:
    """The store's row, after the version and the schema were checked.

    Raises:
        StoreError: another version, another schema, or a damaged row.
    """
    versions = db.execute("SELECT format_version FROM store").fetchall()
    if len(versions) != 1:
        raise StoreError(f"{file_of(db)} is damaged: {len(versions)} rows in store")
    if versions[0][0] not in (FORMAT_VERSION, WITH_CODES):
        raise StoreError(
            f"{file_of(db)}: this latemax reads versions {FORMAT_VERSION} and {WITH_CODES}, the store has "
            f"{versions[0][0]!r}"
        )
    found = db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid").fetchall()
    if [sql for (sql,) in found] != list(SCHEMA):
        raise StoreError(f"{file_of(db)} is damaged: its tables are not those of a store")
    (row,) = select(db, "store")
    if row.dtype not in (None, *DTYPES) or (row.dtype == "int8" and row.format_version != WITH_CODES):
        raise StoreError(f"{file_of(db)}: dtype {row.dtype!r} is unknown in version {row.format_version}")
    if row.id_type not in (None, "int", "str"):
        raise StoreError(f"{file_of(db)}: id_type {row.id_type!r} is unknown")
    if len({row.dim is None, row.dtype is None, row.id_type is None}) != 1 or (row.dim or 1) < 1:
        raise StoreError(f"{file_of(db)} is damaged: dim {row.dim!r}, dtype {row.dtype!r}, id_type {row.id_type!r}")
    parse_meta(Path(file_of(db)), row.meta)
    return row


def parse_meta(path: Path, text: str) -> dict[str, Any]:
    """The JSON object of a row of the catalogue at ``path``."""
    try:
        meta = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: metadata is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise StoreError(f"{path} is damaged: metadata is not a JSON object but {type(meta).__name__}")
    return meta


def read_shards(db: sqlite3.Connection) -> dict[int, ShardRow]:
    """Every shard by its number, pending ones too."""
    shards = {row.shard: row for row in select(db, "shards")}
    for row in shards.values():
        if row.state not in ("pending", "committed"):
            raise StoreError(f"{file_of(db)} is damaged: shard {row.name!r} is {row.state!r}")
        if not is_plain(row.name):
            raise StoreError(f"{file_of(db)}: a shard must be a file of the store's folder, got {row.name!r}")
    return shards


def read_regions(db: sqlite3.Connection, mark: bytes | None) -> bytes | None:
    """The boxes that a document's row names: float32 [l, 4]."""
    if mark is None:
        return None
    found = db.execute("SELECT boxes FROM regions WHERE digest = ?", (mark,)).fetchone()
    if found is None or not isinstance(found[0], bytes) or regions_digest(found[0]) != mark:
        raise StoreError(f"{file_of(db)} is damaged: regions {mark!r}")
    return found[0]


def layout(db: sqlite3.Connection, generation: int) -> tuple[CommitRow, np.ndarray]:
    """A generation and its documents: int64 [n, 5] of seq, pos, shard, start, length, by rising seq.

    Raises:
        StoreError: no such generation (compaction took it), or a damaged one.
    """
    commits = list(select(db, "commits", "WHERE generation <= ?", (generation,)))
    if not commits or commits[-1].generation != generation:
        raise StoreError(f"{file_of(db)} has no generation {generation} any more")
    try:
        added = np.concatenate([np.frombuffer(commit.added, INT64).reshape(-1, 5) for commit in commits])
        removed = np.concatenate([np.frombuffer(commit.removed, INT64) for commit in commits])
    except (ValueError, TypeError) as error:
        raise StoreError(f"{file_of(db)} is damaged: commits: {error}") from error
    if (np.diff(added[:, 0]) <= 0).any() or not np.isin(removed, added[:, 0]).all():
        raise StoreError(f"{file_of(db)} is damaged: commits name documents twice, or some that are not there")
    if len(removed):
        added = added[~np.isin(added[:, 0], removed)]
    last = commits[-1]
    if len(added) != last.documents or int(added[:, 4].sum()) != last.tokens:
        raise StoreError(f"{file_of(db)} is damaged: generation {generation} has not its number of documents or tokens")
    return last, added


def to_json(name: str, value: object) -> str:
    """What json keeps of a value.

    Raises:
        TypeError, ValueError: naming the argument, where json cannot write it.
    """
    try:
        # once through json, so that tuples, keys that are no strings and subclasses compare as they are stored
        text = json.dumps(json.loads(json.dumps(value, allow_nan=False)), ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be text that UTF-8 can write: {error}") from error
    except TypeError as error:
        raise TypeError(f"{name} must be what json can write: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be what json can write: {error}") from error
    return text
