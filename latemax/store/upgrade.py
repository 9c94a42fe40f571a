"""The format before the catalogue (manifest.json) brought up to date; the shards stay as they are."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from . import catalog
from .catalog import DocumentRow, ShardRow
from .commits import NEW, create_new, record
from .files import CATALOG, MANIFEST, SHARD, StoreError, is_plain, sha256, sync_folder
from .locks import WriterLock
from .packed import FLOATS

FORMAT, VERSION = "latemax.PatchStore", 1


def upgrade(path: str | os.PathLike[str]) -> None:
    """Makes the catalogue of a store of the old format; every byte is checked first, and no shard is written.

    The catalogue appears whole or not at all, and the manifest goes after it: killed at any moment, the store is of
    one format or the other, and the same call goes on. A store that has a catalogue already is left as it is.

    Raises:
        FileNotFoundError: no store there.
        StoreError: a damaged manifest or shard, named; another writer is at work.
    """
    folder = Path(path)
    if not folder.is_dir() or not ((folder / MANIFEST).exists() or (folder / CATALOG).exists()):
        raise FileNotFoundError(f"{folder} holds no store: there is neither {CATALOG} nor {MANIFEST}")
    lock = WriterLock(folder)
    try:
        if not (folder / CATALOG).exists():
            _make(folder)
        # without it a store of the new format
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
    finally:
        lock.close()


def _make(folder: Path) -> None:
    try:
        manifest = _manifest(folder / MANIFEST)
        meta = catalog.to_json("meta", manifest["meta"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder / MANIFEST} is damaged: {type(error).__name__}: {error}") from error
    shards, documents = [], []
    for number, entry in enumerate(manifest["shards"]):
        size, digest = (folder / entry["file"]).stat().st_size, sha256(folder / entry["file"])
        if size != entry["bytes"] or digest.hex() != entry["sha256"]:
            raise StoreError(f"shard {entry['file']} of {folder} is damaged: its checksum is not the manifest's")
        dtype, dim, tokens = manifest["dtype"], manifest["dim"], entry["tokens"]
        shards.append(ShardRow(number, entry["file"], "committed", "tokens", dtype, dim, tokens, size, digest))
        for id, a, b in _documents(folder / entry["file"], manifest["id_type"], entry):
            seq = len(documents)
            documents.append(DocumentRow(seq, seq, id, 0, None, number, a, b - a, None, None, None, None))
    ids = [row.id for row in documents]
    if len(set(ids)) != len(ids):
        raise StoreError(f"{folder / MANIFEST} is damaged: an id is in the store twice")
    create_new(folder, meta)
    with catalog.opened(folder / NEW, write=True) as db:
        before = catalog.read_store(db)
        next_id = max([len(ids), *(id + 1 for id in ids if isinstance(id, int))])
        after = before._replace(
            dim=manifest["dim"], dtype=manifest["dtype"], id_type=manifest["id_type"], next_id=next_id
        )
        record(db, before, after, shards=shards, documents=documents)
    os.replace(folder / NEW, folder / CATALOG)
    sync_folder(folder)


def _manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads(path.read_bytes())
    if manifest["format"] != FORMAT or manifest["version"] != VERSION:
        raise ValueError(f"format {manifest['format']!r} and version {manifest['version']!r} are unknown")
    if manifest["dtype"] not in FLOATS or manifest["id_type"] not in ("int", "str"):
        raise ValueError(f"dtype {manifest['dtype']!r} or id_type {manifest['id_type']!r} is unknown")
    numbers = [
        manifest["dim"],
        *(entry[key] for entry in manifest["shards"] for key in ("documents", "tokens", "bytes")),
    ]
    if not all(type(number) is int and number >= 0 for number in numbers) or not manifest["dim"]:
        raise ValueError("numbers must be ints >= 0")
    for entry in manifest["shards"]:
        if not is_plain(entry["file"]) or not SHARD.fullmatch(entry["file"]):
            raise ValueError(f"a shard must be a file of the store's folder, got {entry['file']!r}")
        if not (path.parent / entry["file"]).is_file():
            raise StoreError(f"shard {entry['file']} is missing from {path.parent}")
    return manifest


def _documents(path: Path, id_type: str, entry: dict[str, Any]) -> list[tuple[int | str, int, int]]:
    """(id, first token, the one after the last) of every document of an old shard."""
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise ImportError(
            'reading a store of the old format needs safetensors: pip install "latemax[store]"'
        ) from error
    try:
        tensors = load(path.read_bytes())
        offsets = tensors["offsets"]
        if offsets.dtype != torch.int64 or offsets.shape != (entry["documents"] + 1,):
            raise ValueError(f"offsets is {offsets.dtype} {list(offsets.shape)}")
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != entry["tokens"] or any(b < a for a, b in pairwise(bounds)):
            raise ValueError(f"its offsets do not run from 0 to {entry['tokens']}")
        ids: list[Any]
        if id_type == "int":
            ids = tensors["ids"].tolist()
        else:
            text = tensors["id_bytes"].numpy().tobytes()
            ids = [text[a:b].decode() for a, b in pairwise(tensors["id_offsets"].tolist())]
        return [(id, a, b) for id, (a, b) in zip(ids, pairwise(bounds), strict=True)]
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"shard {entry['file']} of {path.parent} is corrupt: {error}") from error
