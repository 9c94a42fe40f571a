"""Shards: immutable safetensors files of tokens. Written once and synced, read by position or by memory map."""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .catalog import ShardRow
from .files import DESCRIPTORS, StoreError
from .packed import DTYPES

SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# Tokens begin at a multiple of this, so that mapped rows are aligned for vector loads.
ALIGNMENT = 64
_keys = itertools.count()


def as_bytes(x: Tensor) -> memoryview:
    return memoryview(np.asarray(x.view(-1).view(torch.uint8))) if x.numel() else memoryview(b"")


def header(dtype: str, tokens: int, dim: int) -> bytes:
    """The first bytes of a shard: all before its tokens."""
    size = tokens * dim * DTYPES[dtype].itemsize
    text = json.dumps(
        {"tokens": {"dtype": SAFETENSORS[dtype], "shape": [tokens, dim], "data_offsets": [0, size]}},
        separators=(",", ":"),
    ).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, documents: Iterable[Tensor], *, dtype: str, tokens: int, dim: int) -> tuple[int, bytes]:
    """Writes a new shard of contiguous CPU documents [l, dim], ``tokens`` in all, and syncs the file.

    Returns:
        Its size in bytes and its SHA-256.
    """
    digest, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in itertools.chain([memoryview(header(dtype, tokens, dim))], map(as_bytes, documents)):
            digest.update(part)
            size += len(part)
            while part:
                part = part[os.write(fd, part) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    return size, digest.digest()


class Shard:
    """One committed file of a store, checked against its row of the catalogue.

    Raises:
        StoreError: naming the file, where it is missing, of another size, or its header says something else.
    """

    def __init__(self, folder: Path, row: ShardRow):
        self._key = next(_keys)
        self.path, self.row = folder / row.name, row
        self.dtype: torch.dtype = DTYPES[row.dtype]
        self._map: weakref.ref[mmap.mmap] | None = None
        try:
            with DESCRIPTORS.borrow(self._key, self.path) as fd:
                size = os.fstat(fd).st_size
                if size != row.size:
                    what = "truncated" if size < row.size else "too long"
                    raise StoreError(f"{self._name} is {what}: {size} bytes, the catalogue says {row.size}")
                self._data = self._check_header(fd, size)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise StoreError(f"shard {row.name} is missing from {folder}") from error

    def __del__(self):
        DESCRIPTORS.forget(self._key)

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def _name(self) -> str:
        return f"shard {self.row.name} of {self.path.parent}"

    def _check_header(self, fd: int, size: int) -> int:
        """Where the tokens begin."""
        expected = header(self.row.dtype, self.row.tokens, self.row.dim)
        if size < 8:
            raise StoreError(f"{self._name} is corrupt: its header is not safetensors: {size} bytes")
        if os.pread(fd, len(expected), 0) == expected:
            return len(expected)
        # another header of the same meaning: a shard of the old format, with its offsets and ids
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        try:
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes does not fit into {size}")
            tensors = json.loads(os.pread(fd, length, 8))
            found = tensors["tokens"]
            kind, shape, (begin, end) = found["dtype"], found["shape"], found["data_offsets"]
            last = max(tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise StoreError(f"{self._name} is corrupt: its header is not safetensors: {error}") from error
        wanted = SAFETENSORS[self.row.dtype], [self.row.tokens, self.row.dim]
        if (kind, shape) != wanted:
            raise StoreError(
                f"{self._name} is corrupt: tokens is {kind} {shape}, the catalogue says {wanted[0]} {wanted[1]}"
            )
        row = self.row.dim * self.dtype.itemsize
        if type(begin) is not int or begin < 0 or end != begin + self.row.tokens * row or 8 + length + last != size:
            raise StoreError(f"{self._name} is corrupt: its header describes other bytes than its {size}")
        return 8 + length + begin

    def read(self, start: int, out: Tensor) -> None:
        """Tokens ``start`` … of this shard into out [t, dim], contiguous on the CPU; leaves no pages mapped."""
        position = self._data + start * self.row.dim * self.dtype.itemsize
        view, done = as_bytes(out), 0
        with DESCRIPTORS.borrow(self._key, self.path) as fd:
            while done < len(view):
                count = os.preadv(fd, [view[done:]], position + done)
                if not count:
                    raise StoreError(f"{self._name} was truncated while it was open")
                done += count

    @property
    def tokens(self) -> Tensor:
        """[tokens, dim] on the file's own pages: nothing is read before it is used, and nothing may be written.

        The mapping lives as long as tensors of it do. Before Python 3.13 it keeps a descriptor.
        """
        if not self.row.tokens:
            return torch.empty(0, self.row.dim, dtype=self.dtype, device="cpu")
        mapped = None if self._map is None else self._map()
        if mapped is None:
            # read-only: Linux refuses a writable private map of more than the machine's memory
            untracked = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            with DESCRIPTORS.borrow(self._key, self.path) as fd:
                mapped = mmap.mmap(fd, self.row.size, prot=mmap.PROT_READ, **untracked)
            self._map = weakref.ref(mapped)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(mapped, dtype=self.dtype, count=self.row.tokens * self.row.dim, offset=self._data)
        return flat.view(self.row.tokens, self.row.dim)
