"""Locks of a store: one writer, and the generations that readers hold.

All are ``flock`` locks on small files of the folder, which a process that dies gives back. ``readers.lock`` is the
gate: a reader holds it shared while it opens a generation; clearing old generations takes it exclusively.
``readers-N.lock`` is held shared by every reader of generation N; readers make it. A reader that may not write there
holds the gate instead, and nothing is cleared meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from .files import StoreError

WRITER, GATE = "writer.lock", "readers.lock"
GENERATION = re.compile(r"readers-(\d+)\.lock")
# Seconds that clearing waits for readers which are just opening the store.
PATIENCE = 5.0
# A file system without flock, or a folder nobody may write to.
UNAVAILABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
Result = TypeVar("Result")


class Lock:
    """An open lock file. Closing gives the lock back once no forked child has the descriptor either."""

    def __init__(self, fd: int):
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self):
        self.close()


class WriterLock(Lock):
    """The writer's lock; it ends with its owner, whatever forked children have of it."""

    def __init__(self, folder: Path):
        self._pid = os.getpid()
        super().__init__(os.open(folder / WRITER, os.O_RDWR | os.O_CREAT, 0o666))
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise StoreError(f"another writer is at work on {folder}") from error
        except BaseException:
            self.close()
            raise
        _writers.add(self)

    def close(self) -> None:
        if self.fd >= 0 and os.getpid() == self._pid:
            # a child that has just been forked has the descriptor still
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        super().close()


_writers: weakref.WeakSet[WriterLock] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in list(_writers)])


def _open(path: Path) -> int | None:
    """A descriptor of a lock file, made where it is missing; None where the folder cannot be written to."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        return None
    try:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        return None


def _share(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in UNAVAILABLE:
            raise


def hold(folder: Path, read: Callable[[], tuple[int, Result]]) -> tuple[Result, Lock | None]:
    """What ``read`` returns next to its generation, and the lock that keeps this generation where it is.

    None instead of a lock where the folder is read-only and has no lock files: nobody can clear it either.
    """
    gate = _open(folder / GATE)
    if gate is None:
        return read()[1], None
    lock = Lock(gate)
    _share(gate)
    generation, result = read()
    fd = _open(folder / f"readers-{generation}.lock")
    if fd is None:
        return result, lock
    held = Lock(fd)
    _share(fd)
    # not only closed: a child forked meanwhile has the descriptor too
    fcntl.flock(gate, fcntl.LOCK_UN)
    return result, held


@contextmanager
def closed_gate(folder: Path) -> Iterator[set[int] | None]:
    """The generations that readers hold, with no reader opening one in the block; None where the gate stays open.

    Lock files that nobody holds are deleted.
    """
    gate = Lock(os.open(folder / GATE, os.O_RDWR | os.O_CREAT, 0o666))
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(gate.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                gate.close()
                yield None
                return
            time.sleep(0.01)
    try:
        held = set()
        for name in os.listdir(folder):
            if found := GENERATION.fullmatch(name):
                lock = Lock(os.open(folder / name, os.O_RDWR))
                try:
                    fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(folder / name)
                except BlockingIOError:
                    held.add(int(found[1]))
                lock.close()
        yield held
    finally:
        fcntl.flock(gate.fd, fcntl.LOCK_UN)
        gate.close()
