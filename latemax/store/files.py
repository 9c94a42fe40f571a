"""Names and files of a store: what may be opened, how a folder is synced, how many descriptors are held."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CATALOG = "catalog.sqlite"
# The format before the catalogue; `upgrade` reads it.
MANIFEST = "manifest.json"
# Shards of this format (numbered, then 8 random hex digits) and of the one before.
SHARD = re.compile(r"shard-\d{6,}(-[0-9a-f]{8})?\.safetensors")
# Descriptors of shards that one process keeps open, over all its stores; macOS allows 256 in all.
MAX_OPEN = 64


class StoreError(ValueError):
    """A store that cannot be used as it is; the message names the file and why."""


def is_plain(name: object) -> bool:
    """Whether name is the name of a file in the store's own folder."""
    return isinstance(name, str) and "\0" not in name and name not in ("", ".", "..") and os.path.basename(name) == name


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: Path) -> bytes:
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.digest()


def find_catalog(folder: Path) -> Path:
    """The catalogue of a store.

    Raises:
        FileNotFoundError: no store there.
        StoreError: a store of the old format, or shards without a catalogue.
    """
    path = folder / CATALOG
    if path.exists():
        return path
    refuse_leftovers(folder)
    raise FileNotFoundError(f"{folder} holds no store: there is no {CATALOG}")


def refuse_leftovers(folder: Path) -> None:
    """StoreError where a folder without a catalogue holds what belongs to a store; nothing is touched."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    if MANIFEST in names:
        raise StoreError(f"{folder / MANIFEST} is of the old format: run `latemax store {folder} upgrade`")
    shards = [name for name in names if SHARD.fullmatch(name)]
    if shards:
        raise StoreError(
            f"{folder} holds shards ({len(shards)}: {shards[0]} …) but no {CATALOG}: restore it, or move them away"
        )


class Descriptors:
    """Files open for reading, at most ``limit`` idle ones; the least recently used is closed first."""

    def __init__(self, limit: int):
        self._limit = limit
        # key → [descriptor, uses]; an entry that was forgotten while in use is closed by its last user
        self._open: OrderedDict[int, list[int]] = OrderedDict()
        self._lock = threading.RLock()
        # a lock that another thread held at the fork would never be released in the child
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        for entry in self._open.values():
            entry[1] = 0

    @contextmanager
    def borrow(self, key: int, path: Path) -> Iterator[int]:
        with self._lock:
            entry = self._open.get(key)
            if entry is None:
                for other in list(self._open)[: max(0, len(self._open) + 1 - self._limit)]:
                    self.forget(other, idle=True)
                entry = self._open[key] = [os.open(path, os.O_RDONLY), 0]
            entry[1] += 1
            self._open.move_to_end(key)
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                if not entry[1] and self._open.get(key) is not entry:
                    os.close(entry[0])

    def forget(self, key: int, *, idle: bool = False) -> None:
        """Closes a file; one in use is closed when its last user returns it, or kept where only idle ones may go."""
        with self._lock:
            entry = self._open.get(key)
            if entry is None or (idle and entry[1]):
                return
            del self._open[key]
            if not entry[1]:
                os.close(entry[0])


DESCRIPTORS = Descriptors(MAX_OPEN)
