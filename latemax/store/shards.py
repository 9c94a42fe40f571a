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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latemax.quantized import QuantizedTokens

from .catalog import ShardRow
from .files import DESCRIPTORS, StoreError
from .packed import DTYPES, Tokens

SAFETENSORS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int8: "I8"}
# Tokens begin at a multiple of this, so that mapped rows are aligned for vector loads.
ALIGNMENT = 64
# Bytes of a stretch that are announced before it is read; the system reads ahead by itself in longer ones.
MOST_ANNOUNCED = 1 << 20
# The tensors of a shard of codes.
CODES = ("scale", "error", "codes")
_keys = itertools.count()


def as_bytes(x: Tensor) -> memoryview:
    return memoryview(np.asarray(x.view(-1).view(torch.uint8))) if x.numel() else memoryview(b"")


class Part(NamedTuple):
    """A tensor of a shard: [tokens, dim], or [tokens] with width 1."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    width: int  # elements of a token
    begin: int  # bytes from the end of the header


def parts_of(dtype: str, tokens: int, dim: int) -> list[Part]:
    """The tensors of a shard, in the order of the file: wider elements first, so that all are aligned."""
    if dtype != "int8":
        return [Part("tokens", DTYPES[dtype], (tokens, dim), dim, 0)]
    return [
        Part("scale", torch.float32, (tokens,), 1, 0),
        Part("error", torch.float32, (tokens,), 1, 4 * tokens),
        Part("codes", torch.int8, (tokens, dim), dim, 8 * tokens),
    ]


def in_file_order(documents: Sequence[Tokens]) -> Iterator[Tensor]:
    """The tensors that `write` takes: of codes all scales first, then all errors."""
    for name in CODES:
        yield from (getattr(x, name) for x in documents if isinstance(x, QuantizedTokens))
    yield from (x for x in documents if isinstance(x, Tensor))


def header(dtype: str, tokens: int, dim: int) -> bytes:
    """The first bytes of a shard: all before its tensors."""
    parts = parts_of(dtype, tokens, dim)
    text = json.dumps(
        {
            part.name: {
                "dtype": SAFETENSORS[part.dtype],
                "shape": part.shape,
                "data_offsets": [part.begin, part.begin + tokens * part.width * part.dtype.itemsize],
            }
            for part in parts
        },
        separators=(",", ":"),
    ).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, tensors: Iterable[Tensor], *, dtype: str, tokens: int, dim: int) -> tuple[int, bytes]:
    """Writes a new shard of contiguous CPU tensors in the order of the file, ``tokens`` in all, and syncs the file.

    Returns:
        Its size in bytes and its SHA-256.
    """
    digest, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in itertools.chain([memoryview(header(dtype, tokens, dim))], map(as_bytes, tensors)):
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
        self._parts = {part.name: part for part in parts_of(row.dtype, row.tokens, row.dim)}
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
        """Where the tensors begin."""
        expected = header(self.row.dtype, self.row.tokens, self.row.dim)
        if size < 8:
            raise StoreError(f"{self._name} is corrupt: its header is not safetensors: {size} bytes")
        if os.pread(fd, len(expected), 0) == expected:
            return len(expected)
        if "tokens" not in self._parts:
            raise StoreError(f"{self._name} is corrupt: its header is not the one it was written with")
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
        dtype = DTYPES[self.row.dtype]
        wanted = SAFETENSORS[dtype], [self.row.tokens, self.row.dim]
        if (kind, shape) != wanted:
            raise StoreError(
                f"{self._name} is corrupt: tokens is {kind} {shape}, the catalogue says {wanted[0]} {wanted[1]}"
            )
        row = self.row.dim * dtype.itemsize
        if type(begin) is not int or begin < 0 or end != begin + self.row.tokens * row or 8 + length + last != size:
            raise StoreError(f"{self._name} is corrupt: its header describes other bytes than its {size}")
        return 8 + length + begin

    def announce(self, name: str, start: int, count: int) -> None:
        """Asks the system to read these tokens ahead, where it has posix_fadvise."""
        part = self._parts[name]
        row = part.width * part.dtype.itemsize
        if hasattr(os, "posix_fadvise"):
            with DESCRIPTORS.borrow(self._key, self.path) as fd:
                at = self._data + part.begin + start * row
                os.posix_fadvise(fd, at, min(count * row, MOST_ANNOUNCED), os.POSIX_FADV_WILLNEED)

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Tokens ``start`` … of one of the tensors into out, contiguous on the CPU; leaves no pages mapped."""
        part = self._parts[name]
        position = self._data + part.begin + start * part.width * part.dtype.itemsize
        view, done = as_bytes(out), 0
        with DESCRIPTORS.borrow(self._key, self.path) as fd:
            while done < len(view):
                count = os.preadv(fd, [view[done:]], position + done)
                if not count:
                    raise StoreError(f"{self._name} was truncated while it was open")
                done += count

    @property
    def tokens(self) -> Tokens:
        """[tokens, dim] on the file's own pages: nothing is read before it is used, and nothing may be written.

        The mapping lives as long as tensors of it do. Before Python 3.13 it keeps a descriptor.
        """
        found = [self._map_of(part) for part in self._parts.values()]
        if len(found) == 1:
            return found[0]
        scale, error, codes = found
        return QuantizedTokens(codes, scale, error, "int8", self.row.dim)

    def _map_of(self, part: Part) -> Tensor:
        if not self.row.tokens:
            return torch.empty(part.shape, dtype=part.dtype, device="cpu")
        mapped = None if self._map is None else self._map()
        if mapped is None:
            # read-only: Linux refuses a writable private map of more than the machine's memory
            untracked = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            with DESCRIPTORS.borrow(self._key, self.path) as fd:
                mapped = mmap.mmap(fd, self.row.size, prot=mmap.PROT_READ, **untracked)
            self._map = weakref.ref(mapped)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(
                mapped, dtype=part.dtype, count=self.row.tokens * part.width, offset=self._data + part.begin
            )
        return flat.view(part.shape)
