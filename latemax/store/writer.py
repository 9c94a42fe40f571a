"""``StoreWriter``: appends to a store so that a kill at any moment leaves the last committed state."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import packed
from .files import MANIFEST, PART, ShardEntry, StoreError, read_manifest, sync_folder, write_manifest, write_whole
from .reader import PatchStore

NAMES = {dtype: name for name, dtype in packed.DTYPES.items()}
LOCK = "writer.lock"


class StoreWriter:
    """Makes a store or appends to one. One writer at a time; readers may come and go.

    Documents gather in memory; `commit` writes them as one shard (beside, synced, renamed) and then replaces the
    manifest in the same way. A writer killed before that leaves the store as it was. Leaving the ``with`` block
    commits, also after an exception: what was added was whole.

    Args:
        path: the folder; made if missing.
        dtype: of the tokens, float16, bfloat16 or float32; None takes the store's own, or the first document's.
        shard_bytes: a shard is committed as soon as its tokens reach this many bytes.
        meta: kept in a new store's manifest (anything json can write); must be equal where the store exists already.

    Raises:
        ImportError: safetensors is missing.
        StoreError: another writer is at work, the store is damaged, or meta or dtype is not the store's.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        shard_bytes: int = 1 << 28,
        meta: Mapping[str, Any] | None = None,
    ):
        try:
            import safetensors  # noqa: F401
        except ImportError as error:
            raise ImportError('writing a store needs safetensors: pip install "latemax[store]"') from error
        if dtype is not None and dtype not in NAMES:
            raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
        if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
            raise ValueError(f"shard_bytes must be an int >= 1, got {shard_bytes!r}")
        self.path, self.shard_bytes = Path(path), shard_bytes
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / LOCK, "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StoreError(f"another writer is at work on {self.path}") from error
        try:
            self._open(dtype, meta)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, dtype: torch.dtype | None, meta: Mapping[str, Any] | None) -> None:
        self.dim, self.dtype, self.id_type, self.meta = None, dtype, None, dict(meta or {})
        self._shards: list[ShardEntry] = []
        self._ids: set[int | str] = set()
        if (self.path / MANIFEST).exists():
            store = PatchStore(self.path)
            if dtype is not None and dtype != store.dtype:
                raise StoreError(f"dtype must be the store's own, {store.dtype}, or None; got {dtype}")
            if meta is not None and self.meta != store.meta:
                raise StoreError(f"meta must be what {self.path} was made with, {store.meta}; got {self.meta}")
            self.dim, self.dtype, self.id_type, self.meta = store.dim, store.dtype, store.id_type, store.meta
            self._shards, self._ids = read_manifest(self.path)["shards"], set(store.ids)
        # what a killed writer left without naming it in the manifest
        known = {entry.file for entry in self._shards}
        for left in (*self.path.glob(f"*{PART}"), *self.path.glob("shard-*.safetensors")):
            if left.name not in known:
                left.unlink()
        self._documents: list[Tensor] = []
        self._new_ids: list[int | str] = []
        self._bytes = 0

    def __len__(self) -> int:
        """Documents of the store, those not yet committed included."""
        return len(self._ids)

    def __contains__(self, id: int | str) -> bool:
        return id in self._ids

    def add(self, tokens: Tensor, id: int | str | None = None) -> None:
        """Appends one document.

        Args:
            tokens: [l, dim], l >= 0, in the store's dtype (convert first: nothing is rounded in silence); copied.
            id: an int of 64 bits or a string, one kind a store, each once; None is the number of the document.

        Raises:
            TypeError, ValueError: naming the argument; the store is as it was.
        """
        if not isinstance(tokens, Tensor) or tokens.dtype not in NAMES:
            came = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens must be a float16, bfloat16 or float32 tensor, got {came}")
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be [l, dim], got shape {list(tokens.shape)}")
        if self.dtype not in (None, tokens.dtype):
            raise TypeError(f"tokens must have the store's dtype, {self.dtype}; got {tokens.dtype}")
        if self.dim not in (None, tokens.shape[1]):
            raise ValueError(f"tokens must have the store's dim, {self.dim}; got shape {list(tokens.shape)}")
        id = len(self) if id is None else id
        if isinstance(id, bool) or not isinstance(id, (int, str)):
            raise TypeError(f"id must be an int or a string, got {type(id).__name__}")
        if self.id_type not in (None, type(id).__name__):
            raise TypeError(f"id must be like the store's others, {self.id_type}; got {type(id).__name__} {id!r}")
        if isinstance(id, int) and not -(1 << 63) <= id < 1 << 63:
            raise ValueError(f"id must fit into 64 bits, got {id}")
        if id in self._ids:
            raise ValueError(f"id {id!r} is in the store already")
        self.dim, self.dtype, self.id_type = tokens.shape[1], tokens.dtype, type(id).__name__
        # a copy: the caller may reuse its memory before the commit
        self._documents.append(tokens.detach().to("cpu", copy=True).contiguous())
        self._ids.add(id)
        self._new_ids.append(id)
        self._bytes += tokens.numel() * tokens.element_size()
        if self._bytes >= self.shard_bytes:
            self.commit()

    def add_packed(self, tokens: Tensor, offsets: Tensor, ids: Sequence[int | str] | None = None) -> None:
        """Appends documents that lie end to end: tokens [t_d, dim], offsets [n_d + 1]; ids: one a document, or None."""
        packed.check(tokens, offsets)
        documents = packed.Packed(tokens, offsets).documents()
        if ids is not None and len(ids) != len(documents):
            raise ValueError(f"ids must hold one a document, {len(documents)}; got {len(ids)}")
        for i, document in enumerate(documents):
            self.add(document, None if ids is None else ids[i])

    def commit(self) -> None:
        """Puts what was added since the last commit on the disk, for good."""
        if not self._documents:
            return
        from safetensors.torch import save

        tokens, offsets = packed.Packed.of(self._documents)
        tensors = {"tokens": tokens, "offsets": offsets}
        if self.id_type == "int":
            tensors["ids"] = torch.tensor(self._new_ids, dtype=torch.int64)
        else:
            parts = [id.encode() for id in self._new_ids]
            tensors["id_bytes"] = torch.from_numpy(np.frombuffer(b"".join(parts), np.uint8).copy())
            tensors["id_offsets"] = torch.tensor([0, *map(len, parts)], dtype=torch.int64).cumsum(0)
        data = save(tensors)
        name = f"shard-{len(self._shards):06d}.safetensors"
        entry = ShardEntry(name, len(offsets) - 1, len(tokens), len(data), hashlib.sha256(data).hexdigest())
        write_whole(self.path / name, data)
        shards = [*self._shards, entry]
        write_manifest(
            self.path,
            {
                "dim": self.dim,
                "dtype": NAMES[self.dtype],
                "id_type": self.id_type,
                "meta": self.meta,
                "shards": shards,
            },
        )
        self._shards, self._documents, self._new_ids, self._bytes = shards, [], [], 0

    def close(self) -> None:
        """Commits and lets the next writer in."""
        if self._lock.closed:
            return
        try:
            self.commit()
            sync_folder(self.path)
        finally:
            self._lock.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()
