"""``PatchStore``: a packed corpus on disk, read by memory map or into the caller's buffers."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import ShardEntry, StoreError, read_header, read_manifest, sha256
from .packed import DTYPES, Packed

SAFETENSORS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class Shard:
    """One file of a store: its documents are ``first`` … ``first + len(shard) - 1`` of the whole."""

    def __init__(self, folder: Path, entry: ShardEntry, dim: int, dtype: torch.dtype, id_type: str, first: int):
        self.path, self.entry, self.dim, self.dtype, self.first = folder / entry.file, entry, dim, dtype, first
        self._id_type = id_type
        self._header, self._data = read_header(self.path, entry)
        self._expect("tokens", SAFETENSORS[dtype], [entry.tokens, dim])
        self._expect("offsets", "I64", [entry.documents + 1])
        if id_type == "int":
            self._expect("ids", "I64", [entry.documents])
        else:
            self._expect("id_offsets", "I64", [entry.documents + 1])
        self._fd = os.open(self.path, os.O_RDONLY)
        self.offsets = self._load("offsets", torch.int64)  # [len + 1]
        if self.offsets[0] != 0 or self.offsets[-1] != entry.tokens or (self.offsets.diff() < 0).any():
            raise self._corrupt(f"its offsets do not run from 0 to {entry.tokens}")

    def __len__(self) -> int:
        return self.entry.documents

    def __del__(self):
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def _corrupt(self, why: str) -> StoreError:
        return StoreError(f"shard {self.entry.file} of {self.path.parent} is corrupt: {why}")

    def _expect(self, name: str, kind: str, shape: list[int]) -> None:
        came = self._header.get(name)
        if came is None:
            raise self._corrupt(f"it holds no {name}")
        if came["dtype"] != kind or came["shape"] != shape:
            raise self._corrupt(f"{name} is {came['dtype']} {came['shape']}, the manifest says {kind} {shape}")

    def _read(self, position: int, view: memoryview) -> None:
        """Fills the view from the file; pread, so that nothing of the file stays mapped."""
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], position + done)
            if not count:
                raise StoreError(f"shard {self.entry.file} of {self.path.parent} was truncated while it was open")
            done += count

    def _load(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self._header[name]
        values = torch.empty(tensor["shape"], dtype=dtype)
        self._read(self._data + tensor["data_offsets"][0], as_bytes(values))
        return values

    def ids(self) -> list[int] | list[str]:
        if self._id_type == "int":
            return self._load("ids", torch.int64).tolist()
        text, bounds = bytes(as_bytes(self._load("id_bytes", torch.uint8))), self._load("id_offsets", torch.int64)
        bounds = bounds.tolist()
        return [text[a:b].decode() for a, b in pairwise(bounds)]

    @cached_property
    def tokens(self) -> Tensor:
        """[tokens, dim] in the file's own pages: nothing is read before it is used, and nothing may be written."""
        if not self.entry.tokens:
            return torch.empty(0, self.dim, dtype=self.dtype)
        # read-only: Linux refuses a writable private map of more than the machine's memory
        mapped = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
        start = self._data + self._header["tokens"]["data_offsets"][0]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(mapped, dtype=self.dtype, count=self.entry.tokens * self.dim, offset=start)
        return flat.view(self.entry.tokens, self.dim)

    def read_tokens(self, start: int, out: Tensor) -> None:
        """Tokens ``start`` … of this shard into out [t, dim], contiguous on the CPU; leaves no pages mapped."""
        row = self.dim * self.dtype.itemsize
        self._read(self._data + self._header["tokens"]["data_offsets"][0] + start * row, as_bytes(out))


def as_bytes(x: Tensor) -> memoryview:
    return memoryview(np.asarray(x.view(-1).view(torch.uint8))) if x.numel() else memoryview(b"")


class PatchStore(Sequence):
    """A packed corpus on disk: a folder of safetensors shards and a manifest; ``store[i]`` is document i, [l_i, dim].

    Opening checks every file's presence, size, header and offsets against the manifest and reads no token; `verify`
    checks the bytes. The view is of one moment: what a writer commits later is seen by opening again.

    Args:
        path: the folder.

    Attributes:
        dim, dtype: of the tokens; float16, bfloat16 or float32. n_tokens: of all documents.
        offsets: int64 [n_d + 1] into all tokens. shards: in order. meta: what the writer noted.

    Raises:
        FileNotFoundError: no store there.
        StoreError: a ValueError that names the shard and what is wrong with it.

    Example:
        >>> with StoreWriter("pages") as writer:
        ...     writer.add(tokens, id="page-1")
        >>> latemax.topk(q, PatchStore("pages"), 10)
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        manifest = read_manifest(self.path)
        self.dim: int = manifest["dim"]
        self.dtype: torch.dtype = DTYPES[manifest["dtype"]]
        self.id_type: str = manifest["id_type"]
        self.meta: dict[str, Any] = manifest["meta"]
        self.shards: list[Shard] = []
        documents = 0
        for entry in manifest["shards"]:
            self.shards.append(Shard(self.path, entry, self.dim, self.dtype, self.id_type, documents))
            documents += entry.documents
        lengths = [torch.zeros(1, dtype=torch.int64), *(shard.offsets.diff() for shard in self.shards)]
        self.offsets: Tensor = torch.cat(lengths).cumsum(0)
        self._starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tensor:
        """[l_i, dim], on the file's own pages; not to be written."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        shard = self.shards[int(np.searchsorted(self._starts, index, "right")) - 1]
        a, b = shard.offsets[index - shard.first : index - shard.first + 2].tolist()
        return shard.tokens[a:b]

    def __repr__(self) -> str:
        return (
            f"PatchStore({str(self.path)!r}: {len(self)} documents, {self.n_tokens} tokens, dim {self.dim}, "
            f"{str(self.dtype).removeprefix('torch.')}, {len(self.shards)} shards)"
        )

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def ids(self) -> list[int] | list[str]:
        """One a document, in order."""
        return [item for shard in self.shards for item in shard.ids()]

    def packed(self) -> Iterator[Packed]:
        """The shards as (tokens [t, dim], offsets int64 [n + 1]), on the files' own pages."""
        return (Packed(shard.tokens, shard.offsets) for shard in self.shards)

    def read(self, first: int, last: int, out: Tensor) -> None:
        """Documents first … last - 1 into out [t, dim]; contiguous, on the CPU, of this dtype; maps no pages."""
        row = 0
        for shard in self.shards:
            a, b = max(first - shard.first, 0), min(last - shard.first, len(shard))
            if a < b:
                start, stop = int(shard.offsets[a]), int(shard.offsets[b])
                shard.read_tokens(start, out[row : row + stop - start])
                row += stop - start

    def verify(self) -> None:
        """Reads every byte against the shards' checksums.

        Raises:
            StoreError: naming every shard that differs.
        """
        wrong = [shard.entry.file for shard in self.shards if sha256(shard.path) != shard.entry.sha256]
        if wrong:
            raise StoreError(f"{self.path}: wrong checksum (SHA-256), the bytes have changed: shard {', '.join(wrong)}")
