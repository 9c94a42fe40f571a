"""Files of a store: what is written appears whole or not at all, and what is read is checked against the manifest."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
FORMAT, VERSION = "latemax.PatchStore", 1
PART = ".part"


class StoreError(ValueError):
    """A store that cannot be used as it is; the message names the file and why."""


class ShardEntry(NamedTuple):
    """A shard as the manifest records it."""

    file: str
    documents: int
    tokens: int
    bytes: int
    sha256: str


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside, syncs, renames and syncs the folder: a kill or a power cut leaves the old file or the new one."""
    part = path.with_name(path.name + PART)
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    shards = [entry._asdict() for entry in manifest["shards"]]
    text = json.dumps({"format": FORMAT, "version": VERSION, **manifest, "shards": shards}, indent=1)
    write_whole(folder / MANIFEST, text.encode() + b"\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest with its shards as ShardEntry.

    Raises:
        FileNotFoundError: no store there.
        StoreError: not a manifest, or of a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no store: there is no {MANIFEST}")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise StoreError(f"{path}: format must be {FORMAT!r}, got {manifest['format']!r}")
        if manifest["version"] != VERSION:
            raise StoreError(f"{path}: this latemax reads version {VERSION}, the store has {manifest['version']!r}")
        manifest["shards"] = [ShardEntry(**entry) for entry in manifest["shards"]]
        for key in ("dim", "dtype", "id_type", "meta"):
            manifest[key]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return manifest


def read_header(path: Path, entry: ShardEntry) -> tuple[dict[str, Any], int]:
    """Tensors of a safetensors file, {name: {dtype, shape, data_offsets}}, and where its data begins; sizes checked."""
    name = f"shard {entry.file}"
    if not path.is_file():
        raise StoreError(f"{name} is missing from {path.parent}")
    size = path.stat().st_size
    if size != entry.bytes:
        what = "truncated" if size < entry.bytes else "too long"
        raise StoreError(f"{name} of {path.parent} is {what}: {size} bytes, the manifest says {entry.bytes}")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes does not fit into {size}")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max(tensor["data_offsets"][1] for tensor in header.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{name} of {path.parent} is corrupt: its header is not safetensors: {error}") from error
    if 8 + length + end != size:
        raise StoreError(f"{name} of {path.parent} is corrupt: its header describes {8 + length + end} bytes of {size}")
    return header, 8 + length


def sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
