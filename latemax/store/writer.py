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
from .catalog import FORMAT_VERSION, WITH_CODES, DocumentRow
from .commits import NewShard, clear_pending, discarding, make_catalog, record, write_shards
from .compact import compact
from .documents import (
    NAMES,
    Document,
    Place,
    as_tokens,
    check_grid,
    check_id,
    check_meta,
    check_regions,
    codes_of,
)
from .files import CATALOG, StoreError, refuse_leftovers
from .locks import GATE, WriterLock
from .packed import Tokens, token_bytes
from .shards import in_file_order


class StoreWriter:
    """Makes a store or changes one. One writer at a time; readers may come and go.

    Changes gather in memory; `commit` writes new tokens as one shard and then records everything in one transaction of
    the catalogue, which makes a new generation. A writer killed before that leaves the store as it was. Leaving the
    ``with`` block commits, also after an exception: what was added was whole.

    Args:
        path: the folder; made if missing.
        dtype: of the tokens, float16, bfloat16 or float32, or "int8" for a store that keeps only 8-bit codes;
            None takes the store's own, or the first document's.
        codes: "int8" also keeps 8-bit codes of float tokens, in shards of their own, from which `latemax.topk` finds
            the same documents faster; None takes the store's own.
        shard_bytes: changes are committed as soon as new tokens reach this many bytes; `compact` makes shards of this
            size.
        meta: a JSON object, kept for the store as a whole; must be equal where the store exists already.

    Attributes:
        path, shard_bytes: as given. dim, dtype, id_type: of the store, None until its first document. codes, meta: as
            stored.

    Raises:
        StoreError: another writer is at work, the store is damaged or of the old format, or meta, dtype or codes is not
            the store's.

    Example:
        >>> with StoreWriter("pages", dtype=torch.float16) as writer:
        ...     writer.add(tokens, "page-1", grid=(16, 16), meta={"year": 2024})
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        codes: str | None = None,
        shard_bytes: int = 1 << 28,
        meta: Mapping[str, Any] | None = None,
    ):
        dtype = torch.int8 if isinstance(dtype, str) and dtype == "int8" else dtype
        if dtype is not None and dtype not in NAMES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or 'int8', got {dtype!r}")
        if codes not in (None, "int8"):
            raise ValueError(f"codes must be 'int8' or None, got {codes!r}")
        if codes and dtype == torch.int8:
            raise ValueError("codes must be None where dtype is 'int8': the store has codes alone then")
        if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
            raise ValueError(f"shard_bytes must be an int >= 1, got {shard_bytes!r}")
        text = None if meta is None else check_meta(meta)
        self.path, self.shard_bytes = Path(path), shard_bytes
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = WriterLock(self.path)
        self._pid = os.getpid()
        try:
            self._open(dtype, codes, text)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, dtype: Any, codes: str | None, meta: str | None) -> None:
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
        if codes and stored and codes != store.codes:
            raise StoreError(f"codes must be the store's own, {store.codes}, or None; got {codes!r}")
        if meta is not None and json.loads(meta) != self.meta:
            raise StoreError(f"meta must be what {self.path} was made with, {self.meta}; got {json.loads(meta)}")
        self.dim: int | None = store.dim
        self.dtype: torch.dtype | None = stored or dtype
        self.codes: str | None = store.codes if stored else codes
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
        tokens: Tokens | np.ndarray,
        id: int | str | None = None,
        grid: tuple[int, int] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        regions: Tensor | np.ndarray | None = None,
        quantize: bool = False,
    ) -> None:
        """Appends one document.

        Args:
            tokens: [l, dim], l >= 0, in the store's dtype (convert first: nothing is rounded in silence); copied. A
                tensor or an array (bfloat16 by ``ml_dtypes``); QuantizedTokens in a store of dtype "int8".
            id: an int of 64 bits or a string, one kind a store, each once; None takes the next number, which no
                document had before.
            grid: (rows, cols) of patches, rows · cols = l.
            meta: a JSON object of the document, for `PatchStore.document_meta` and `PatchStore.where`.
            regions: float32 [l, 4] instead of a grid: left, top, right, bottom of every token as fractions of the
                image, NaN for a token that is not a patch.
            quantize: tokens are floats, to be quantized; for a store of dtype "int8". NaN and infinity are refused.

        Raises:
            TypeError, ValueError: naming the argument; the store is as it was.
            StoreError: the writer is closed.
        """
        self._usable()
        content = as_tokens(tokens, self.dim, self.dtype, quantize)
        id = self._new_id(id)
        if grid is not None and regions is not None:
            raise ValueError("grid or regions may be given, not both")
        document = Document(
            content,
            None if grid is None else check_grid(grid, len(content)),
            None if regions is None else check_regions(regions, len(content)),
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
        if not isinstance(tokens, Place):
            self.dim = tokens.shape[1]
            self.dtype = tokens.dtype if isinstance(tokens, Tensor) else torch.int8
            self._bytes += _bytes(tokens)
        self.id_type = type(id).__name__
        if isinstance(id, int):
            self._next_id = max(self._next_id, id + 1)
        self._added[id] = document
        self._ids[id] = None
        if self._bytes >= self.shard_bytes:
            self.commit()

    def add_packed(
        self,
        tokens: Tokens | np.ndarray,
        offsets: Tensor | np.ndarray,
        ids: Sequence[int | str] | None = None,
        *,
        quantize: bool = False,
    ) -> None:
        """Appends contiguous documents, all or none: everything is checked before the first is kept.

        Args:
            tokens: [t_d, dim]; document i is ``tokens[offsets[i] : offsets[i + 1]]``.
            offsets: int32 or int64 [n_d + 1].
            ids: one per document, as in `add`; None numbers them. quantize: as in `add`.

        Raises:
            TypeError, ValueError, StoreError: as `add`.
        """
        self._usable()
        tokens, offsets = as_tensor("tokens", tokens), as_tensor("offsets", offsets)
        packed.check(tokens, offsets)
        tokens = as_tokens(tokens, self.dim, self.dtype, quantize)
        documents = packed.Packed(tokens, offsets).documents()
        if ids is not None and len(ids) != len(documents):
            raise ValueError(f"ids must hold one per document, {len(documents)}; got {len(ids)}")
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
            self._put(id, Document(document, None, None, None, None))

    def replace(
        self,
        tokens: Tokens | np.ndarray | None,
        id: int | str,
        grid: tuple[int, int] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        regions: Tensor | np.ndarray | None = None,
        quantize: bool = False,
    ) -> None:
        """Gives a document other tokens, or another grid, regions or metadata; it keeps its place in the order.

        Args:
            tokens, grid, meta, regions, quantize: as in `add`; None keeps what the document has. A grid takes the place
                of regions, and the other way round.
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
            content = as_tokens(tokens, self.dim, self.dtype, quantize)
        length = old.length if isinstance(content, Place) else len(content)
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
        elif not isinstance(old.content, Place):
            self._bytes -= _bytes(old.content)
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
        if not isinstance(content, Place):
            self._bytes -= _bytes(content)

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
        fresh = [x.content for x in self._added.values() if not isinstance(x.content, Place)]
        written = []
        if fresh:
            assert self.dtype is not None and self.dim is not None
            count = sum(map(len, fresh))
            parts = [NewShard(in_file_order(fresh), count, NAMES[self.dtype])]
            if self.codes:
                codes = [codes_of(x) for x in fresh if isinstance(x, Tensor)]
                parts.append(NewShard(in_file_order(codes), count, self.codes, "codes"))
            written = write_shards(self.path, parts, dim=self.dim)
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
            format_version=WITH_CODES if self.codes or self.dtype == torch.int8 else FORMAT_VERSION,
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


def _bytes(tokens: Tokens) -> int:
    dtype = tokens.dtype if isinstance(tokens, Tensor) else torch.int8
    return len(tokens) * token_bytes(dtype, tokens.shape[1])
