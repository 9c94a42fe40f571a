"""``StoreWriter``: changes a store so that a kill at any moment leaves the last committed state."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latemax.arguments.arrays import as_tensor

from . import catalog, packed
from .catalog import DocumentRow
from .commits import clear_pending, discarding, record, write_shards
from .compact import compact
from .documents import (
    NAMES,
    Document,
    Place,
    check_grid,
    check_id,
    check_meta,
    check_regions,
    check_tokens,
)
from .files import CATALOG, StoreError, refuse_leftovers, sync_folder
from .locks import GATE, WriterLock

NEW = CATALOG + ".new"


class StoreWriter:
    """Makes a store or changes one. One writer at a time; readers may come and go.

    Changes gather in memory; `commit` writes new tokens as one shard and then records everything in one transaction of
    the catalogue, which makes a new generation. A writer killed before that leaves the store as it was. Leaving the
    ``with`` block commits, also after an exception: what was added was whole.

    Args:
        path: the folder; made if missing.
        dtype: of the tokens, float16, bfloat16 or float32; None takes the store's own, or the first document's.
        shard_bytes: changes are committed as soon as new tokens reach this many bytes; `compact` makes shards of this
            size.
        meta: a JSON object, kept for the store as a whole; must be equal where the store exists already.

    Attributes:
        path, shard_bytes: as given. dim, dtype, id_type: of the store, None until its first document. meta: as stored.

    Raises:
        StoreError: another writer is at work, the store is damaged or of the old format, or meta or dtype is not the
            store's.

    Example:
        >>> with StoreWriter("pages", dtype=torch.float16) as writer:
        ...     writer.add(tokens, "page-1", grid=(16, 16), meta={"year": 2024})
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        shard_bytes: int = 1 << 28,
        meta: Mapping[str, Any] | None = None,
    ):
        if dtype is not None and dtype not in NAMES:
            raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
        if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
            raise ValueError(f"shard_bytes must be an int >= 1, got {shard_bytes!r}")
        text = None if meta is None else check_meta(meta)
        self.path, self.shard_bytes = Path(path), shard_bytes
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = WriterLock(self.path)
        self._pid = os.getpid()
        try:
            self._open(dtype, text)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, dtype: torch.dtype | None, meta: str | None) -> None:
        if not (self.path / CATALOG).exists():
            refuse_leftovers(self.path)
            make_catalog(self.path, meta or "{}")
        # readers lock it; where they may not write they cannot make it
        open(self.path / GATE, "ab").close()
        with catalog.opened(self.path / CATALOG) as db:
            self._store = store = catalog.read_store(db)
            live = catalog.layout(db, store.generation)[1][:, 0]
            rows = db.execute("SELECT id, seq FROM documents WHERE removed IS NULL").fetchall()
            (last,) = db.execute("SELECT max(seq) FROM documents").fetchone()
        self.meta: dict[str, Any] = json.loads(store.meta)
        stored = None if store.dtype is None else packed.DTYPES[store.dtype]
        if None not in (dtype, stored) and dtype != stored:
            raise StoreError(f"dtype must be the store's own, {stored}, or None; got {dtype}")
        if meta is not None and json.loads(meta) != self.meta:
            raise StoreError(f"meta must be what {self.path} was made with, {self.meta}; got {json.loads(meta)}")
        self.dim: int | None = store.dim
        self.dtype: torch.dtype | None = stored or dtype
        self.id_type: str | None = store.id_type
        # None: not committed yet
        self._ids: dict[int | str, int | None] = dict(rows)
        wrong = len(self._ids) != len(live) or sorted(seq for _, seq in rows) != live.tolist()
        wrong = wrong or any(type(id).__name__ != store.id_type for id in self._ids)
        if wrong or (last is not None and last >= store.next_seq):
            raise StoreError(f"{self.path / CATALOG} is damaged: its documents are not those of its commits")
        clear_pending(self.path)
        self._next_id = store.next_id
        self._added: dict[int | str, Document] = {}
        self._removed: set[int] = set()
        self._bytes = 0

    def __len__(self) -> int:
        """Documents of the store, with what is not yet committed."""
        return len(self._ids)

    def __contains__(self, id: object) -> bool:
        return id in self._ids

    def _usable(self) -> None:
        if self._lock.fd < 0 or os.getpid() != self._pid:
            raise StoreError(f"this writer of {self.path} is closed")

    def add(
        self,
        tokens: Tensor | np.ndarray,
        id: int | str | None = None,
        grid: tuple[int, int] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        regions: Tensor | np.ndarray | None = None,
    ) -> None:
        """Appends one document.

        Args:
            tokens: [l, dim], l >= 0, in the store's dtype (convert first: nothing is rounded in silence); copied. A
                tensor or an array (bfloat16 by ``ml_dtypes``).
            id: an int of 64 bits or a string, one kind a store, each once; None takes the next number, which no
                document had before.
            grid: (rows, cols) of patches, rows · cols = l.
            meta: a JSON object of the document, for `PatchStore.document_meta` and `PatchStore.where`.
            regions: float32 [l, 4] instead of a grid: left, top, right, bottom of every token as fractions of the
                image, NaN for a token that is no patch.

        Raises:
            TypeError, ValueError: naming the argument; the store is as it was.
            StoreError: the writer is closed.
        """
        self._usable()
        tokens = as_tensor("tokens", tokens)
        check_tokens(tokens, self.dim, self.dtype)
        id = self._new_id(id)
        if grid is not None and regions is not None:
            raise ValueError("grid or regions may be given, not both")
        document = Document(
            # a copy: the caller may reuse its memory before the commit
            tokens.detach().to("cpu", copy=True).contiguous(),
            None if grid is None else check_grid(grid, len(tokens)),
            None if regions is None else check_regions(regions, len(tokens)),
            None if meta is None else check_meta(meta),
            None,
        )
        self._put(id, document)

    def _new_id(self, id: int | str | None) -> int | str:
        id = check_id(self._next_id if id is None else id, self.id_type)
        if id in self._ids:
            raise ValueError(f"id {id!r} is in the store already")
        return id

    def _put(self, id: int | str, document: Document) -> None:
        tokens = document.content
        if isinstance(tokens, Tensor):
            self.dim, self.dtype = tokens.shape[1], tokens.dtype
            self._bytes += tokens.numel() * tokens.element_size()
        self.id_type = type(id).__name__
        if isinstance(id, int):
            self._next_id = max(self._next_id, id + 1)
        self._added[id] = document
        self._ids[id] = None
        if self._bytes >= self.shard_bytes:
            self.commit()

    def add_packed(
        self, tokens: Tensor | np.ndarray, offsets: Tensor | np.ndarray, ids: Sequence[int | str] | None = None
    ) -> None:
        """Appends contiguous documents, all or none: everything is checked before the first is kept.

        Args:
            tokens: [t_d, dim]; document i is ``tokens[offsets[i] : offsets[i + 1]]``.
            offsets: int32 or int64 [n_d + 1].
            ids: one a document, as in `add`; None numbers them.

        Raises:
            TypeError, ValueError, StoreError: as `add`.
        """
        self._usable()
        tokens, offsets = as_tensor("tokens", tokens), as_tensor("offsets", offsets)
        packed.check(tokens, offsets)
        check_tokens(tokens, self.dim, self.dtype)
        documents = packed.Packed(tokens, offsets).documents()
        if ids is not None and len(ids) != len(documents):
            raise ValueError(f"ids must hold one a document, {len(documents)}; got {len(ids)}")
        if ids is None:
            ids = range(self._next_id, self._next_id + len(documents))
        kind, checked = self.id_type, []
        for id in ids:
            found = check_id(id, kind)
            kind = type(found).__name__
            checked.append(self._new_id(found))
        if len(set(checked)) != len(checked):
            twice = next(id for i, id in enumerate(checked) if id in checked[:i])
            raise ValueError(f"id {twice!r} is in ids twice")
        for id, document in zip(checked, documents, strict=True):
            copy = document.detach().to("cpu", copy=True).contiguous()
            self._put(id, Document(copy, None, None, None, None))

    def replace(
        self,
        tokens: Tensor | np.ndarray | None,
        id: int | str,
        grid: tuple[int, int] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        regions: Tensor | np.ndarray | None = None,
    ) -> None:
        """Gives a document other tokens, or another grid, regions or metadata; it keeps its place in the order.

        Args:
            tokens, grid, meta, regions: as in `add`; None keeps what the document has. A grid takes the place of
                regions, and the other way round.
            id: of a document of the store.

        Raises:
            KeyError: no document of that id.
            TypeError, ValueError, StoreError: as `add`; also a kept grid or kept regions that do not fit new tokens.
        """
        self._usable()
        id = self._known(id)
        old = self._document(id)
        content = old.content
        if tokens is not None:
            tokens = as_tensor("tokens", tokens)
            check_tokens(tokens, self.dim, self.dtype)
            content = tokens.detach().to("cpu", copy=True).contiguous()
        length = old.length if tokens is None else len(tokens)
        if grid is not None and regions is not None:
            raise ValueError("grid or regions may be given, not both")
        new_grid = old.grid if grid is None and regions is None else grid
        boxes = None if regions is None else check_regions(regions, length)
        if new_grid is not None:
            new_grid = check_grid(new_grid, length)
        elif boxes is None and old.regions is not None:
            boxes = old.regions
            if len(boxes) != 16 * length:
                raise ValueError(f"regions must be given for {length} tokens; document {id!r} had {len(boxes) // 16}")
        text = old.meta if meta is None else check_meta(meta)
        seq = self._ids[id]
        if seq is not None:
            self._removed.add(seq)
        elif isinstance(old.content, Tensor):
            self._bytes -= old.content.numel() * old.content.element_size()
        self._put(id, Document(content, new_grid, boxes, text, old.pos))

    def remove(self, id: int | str) -> None:
        """Takes a document out; its tokens stay on the disk until `compact`.

        Raises:
            KeyError: no document of that id. StoreError: the writer is closed.
        """
        self._usable()
        id = self._known(id)
        seq = self._ids.pop(id)
        if seq is not None:
            self._removed.add(seq)
            return
        content = self._added.pop(id).content
        if isinstance(content, Tensor):
            self._bytes -= content.numel() * content.element_size()

    def _known(self, id: int | str) -> int | str:
        id = check_id(id)
        if id not in self._ids:
            raise KeyError(f"no document {id!r} in {self.path}")
        return id

    def _document(self, id: int | str) -> Document:
        """A document as it is now, committed or not."""
        seq = self._ids[id]
        if seq is None:
            return self._added[id]
        with catalog.opened(self.path / CATALOG) as db:
            row = catalog.document_row(db, seq)
            boxes = catalog.read_regions(db, row.regions)
        grid = None if row.rows is None else (row.rows, row.cols)
        return Document(Place(row.shard, row.start, row.length), grid, boxes, row.meta, row.pos)

    def commit(self) -> None:
        """Puts what was changed since the last commit on the disk, for good.

        Raises:
            OSError, StoreError: the store is as it was, and the changes are kept for another try.
        """
        self._usable()
        if not self._added and not self._removed:
            return
        fresh = [x.content for x in self._added.values() if isinstance(x.content, Tensor)]
        written = []
        if fresh:
            assert self.dtype is not None and self.dim is not None
            written = write_shards(self.path, [(fresh, sum(map(len, fresh)))], dtype=NAMES[self.dtype], dim=self.dim)
        rows, regions, start = [], set(), 0
        for seq, (id, document) in enumerate(self._added.items(), self._store.next_seq):
            place = document.content
            if not isinstance(place, Place):
                place = Place(written[0].shard, start, len(place))
                start += place.length
            mark = None
            if document.regions is not None:
                regions.add(document.regions)
                mark = catalog.regions_digest(document.regions)
            pos = seq if document.pos is None else document.pos
            rows.append(
                DocumentRow(seq, pos, id, 0, None, *place, *(document.grid or (None, None)), mark, document.meta)
            )
        after = self._store._replace(
            dim=self.dim,
            dtype=None if self.dim is None else NAMES[self.dtype],
            id_type=self.id_type,
            next_id=self._next_id,
        )
        with discarding(self.path), catalog.opened(self.path / CATALOG, write=True) as db:
            gone = [catalog.document_row(db, seq) for seq in sorted(self._removed)]
            store = record(db, self._store, after, shards=written, documents=rows, regions=regions, removed=gone)
        self._store = store
        self._ids.update((row.id, row.seq) for row in rows)
        self._added, self._removed, self._bytes = {}, set(), 0

    def compact(self) -> None:
        """Commits, then gives back the disk space of removed and replaced documents and joins small shards.

        Readers keep the generation that they opened; what it needs is given back by a `compact` after they are closed
        or refreshed.

        Raises:
            OSError, StoreError: as `commit`.
        """
        self.commit()
        self._store = compact(self.path, self._store, self.shard_bytes)
        with catalog.opened(self.path / CATALOG) as db:
            self._ids = dict(db.execute("SELECT id, seq FROM documents WHERE removed IS NULL").fetchall())

    def close(self) -> None:
        """Commits and lets the next writer in; a closed writer refuses changes."""
        if self._lock.fd < 0 or os.getpid() != self._pid:
            return
        try:
            self.commit()
        finally:
            self._lock.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
