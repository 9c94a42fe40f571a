"""``PatchStore``: a packed corpus on disk as it was at one commit."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .documents import check_id
from .packed import DTYPES, Packed, Tokens
from .shards import Shard
from .snapshot import Snapshot
from .verify import verify


class PatchStore(Sequence):
    """A ragged corpus on disk: a folder with a catalogue and safetensors shards, as it was at one commit.

    ``store[i]`` is document i, and ``store["page-1"]`` the document of that id: [l, dim], a tensor, or QuantizedTokens
    in a store of dtype int8. Opening reads the catalogue and every shard's size and header, but no token; `verify`
    checks every byte. What a writer commits, removes or compacts later changes nothing here until `refresh`. Copies,
    pickles and the workers of a DataLoader open the same folder at the same commit.

    Args:
        path: the folder; it may be read-only.

    Attributes:
        path: the folder. generation: the commit's number.
        dim, dtype: of the tokens; float16, bfloat16, float32 or int8. None where no document was ever committed.
        codes: "int8" where the store has 8-bit codes next to its tokens, else None.
        id_type: "int" or "str". meta: the JSON object that the writer gave the store.
        offsets: int64 [n_d + 1] into all tokens, as if they were concatenated. n_tokens: of all documents.

    Raises:
        FileNotFoundError: no store there.
        StoreError: a ValueError that names the file and what is wrong with it.

    Example:
        >>> store = PatchStore("pages")
        >>> scores, indices = latemax.topk(q, store, 10, within=store.where("year >= ?", 2020))
        >>> [store.ids[i] for i in indices]
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._snapshot = Snapshot(self.path)

    def __reduce__(self) -> tuple:
        return _reopen, (os.path.abspath(self.path), self.generation, self._snapshot.identity)

    def snapshot(self) -> Snapshot:
        """What is read now; `refresh` leaves it as it is."""
        return self._snapshot

    def refresh(self) -> bool:
        """Moves on to the last commit; True where there was a newer one.

        Calls that other threads have begun end on the commit they began on.

        Raises:
            FileNotFoundError, StoreError: as opening; the store then stays where it was.
        """
        old = self._snapshot
        new = Snapshot(self.path, known={shard.name: shard for shard in old.files})
        if new.identity == old.identity:
            return False
        self._snapshot = new
        return True

    @property
    def generation(self) -> int:
        return self._snapshot.generation

    @property
    def dim(self) -> int | None:
        return self._snapshot.store.dim

    @property
    def dtype(self) -> torch.dtype | None:
        dtype = self._snapshot.store.dtype
        return None if dtype is None else DTYPES[dtype]

    @property
    def codes(self) -> str | None:
        return self._snapshot.store.codes

    @property
    def id_type(self) -> str | None:
        return self._snapshot.store.id_type

    @property
    def meta(self) -> dict[str, Any]:
        return json.loads(self._snapshot.store.meta)

    @property
    def model_id(self) -> str | None:
        """The model that made the tokens, ``meta["model_id"]``; None where the store does not say."""
        return self.meta.get("model_id")

    @property
    def space(self) -> str | None:
        """What the tokens may be compared with, ``meta["space"]``, as `PatchEncoder.space`; None likewise."""
        return self.meta.get("space")

    @property
    def offsets(self) -> Tensor:
        return self._snapshot.offsets

    @property
    def shards(self) -> list[Shard]:
        """The files that hold documents of this commit and their codes, in the order they were written."""
        return self._snapshot.files

    @property
    def n_tokens(self) -> int:
        return int(self._snapshot.ends[-1])

    @property
    def ids(self) -> list[int] | list[str]:
        """The id of every document, in order."""
        return self._snapshot.ids

    def __len__(self) -> int:
        return len(self._snapshot)

    def _index(self, i: int) -> int:
        index, n = operator.index(i), len(self)
        if not -n <= index < n:
            raise IndexError(f"document {index} of {n}")
        return index % n

    def __getitem__(self, key: int | str) -> Tokens:  # type: ignore[override]
        """The tokens of a document by its number or its string id: a copy, [l, dim].

        Raises:
            IndexError, KeyError: no such document. TypeError: another kind of key.
        """
        if isinstance(key, str):
            return self._snapshot.document(self.find(key))
        if not hasattr(key, "__index__"):
            raise TypeError(f"a store is asked for the number or the id of a document, got {type(key).__name__}")
        return self._snapshot.document(self._index(key))

    def floats(self, i: int) -> Tensor:
        """The tokens of document i, a copy, [l, dim]; of a store of dtype int8 the float32 values of its codes."""
        tokens = self._snapshot.document(self._index(i))
        return tokens if isinstance(tokens, Tensor) else tokens.dequantize()

    def __contains__(self, id: object) -> bool:
        """Whether there is a document of that id."""
        return isinstance(id, (int, str)) and bool(self._snapshot.find([check_id(id)])[0] >= 0)

    def find(self, id: int | str) -> int:
        """The number of the document of an id.

        Raises:
            KeyError: naming an id that the store does not have. TypeError: not an int or a string.
        """
        id = check_id(id)
        (found,) = self._snapshot.find([id]).tolist()
        if found < 0:
            raise KeyError(f"no document {id!r} in {self.path}")
        return found

    def where(self, condition: str, *values: object) -> Tensor:
        """The documents for which a condition is true: int64, rising, for ``within=`` of `latemax.topk`.

        Args:
            condition: comparisons of ``id`` and of the documents' metadata keys (bare, or in double quotes) with
                ``= != < <= > >=``, AND, OR, NOT, IN, LIKE, BETWEEN, IS NULL, parentheses, numbers, 'text' and ``?``.
                An absent key is NULL.
            values: one for each ``?``: numbers, strings or None.

        Raises:
            TypeError, ValueError: a condition with anything else in it, or values that do not fit it.

        Example:
            >>> store.where("label IN ('cat', 'dog') AND (year >= ? OR year IS NULL)", 2020)
        """
        return torch.from_numpy(self._snapshot.where(condition, values))

    def document_meta(self, i: int) -> dict[str, Any]:
        """The JSON object that document i was added with, {} if none."""
        return self._snapshot.meta(self._index(i))

    def metas(self) -> list[dict[str, Any]]:
        """The JSON objects of all documents, in order; much faster than `document_meta` of each."""
        return self._snapshot.metas()

    def grid(self, i: int) -> tuple[int, int] | None:
        """(rows, cols) of document i's patches, or None if it was added without."""
        row, _ = self._snapshot.row(self._index(i))
        return None if row.rows is None else (row.rows, row.cols)

    def regions(self, i: int) -> Tensor | None:
        """float32 [l, 4] of document i: left, top, right, bottom of every token as fractions of the image.

        NaN for a token that is not a patch; None if the document was added without.
        """
        _, boxes = self._snapshot.row(self._index(i))
        return None if boxes is None else torch.from_numpy(np.frombuffer(boxes, "<f4").astype(np.float32)).view(-1, 4)

    def __repr__(self) -> str:
        return (
            f"PatchStore({str(self.path)!r}: {len(self)} documents, {self.n_tokens} tokens, dim {self.dim}, "
            f"{str(self.dtype).removeprefix('torch.')}{f' with {self.codes} codes' if self.codes else ''}, "
            f"{len(self.shards)} shard{'s' * (len(self.shards) != 1)}, generation {self.generation})"
        )

    def packed(self) -> Iterator[Packed]:
        """All documents in order as (tokens [t, dim], offsets int64 [n + 1]), on the files' own pages.

        One for each shard, or for each stretch of one between removed or replaced documents. Tokens may not be written.
        """
        snapshot = self._snapshot
        for shard, start, first, last in snapshot.runs():
            offsets = snapshot.offsets[first : last + 1] - snapshot.offsets[first]
            yield Packed(shard.tokens[start : start + int(offsets[-1])], offsets)

    def read(self, first: int, last: int, out: Tokens) -> None:
        """Documents first … last - 1 into out [t, dim]; contiguous, on the CPU; maps no pages.

        ``out`` has the store's dtype, or is QuantizedTokens where the store has codes.
        """
        self._snapshot.read(first, last, out)

    def verify(self) -> None:
        """Checks every row of the catalogue and every byte of the shards against their digests.

        Raises:
            StoreError: naming what differs.
        """
        verify(self._snapshot)


def _reopen(path: str, generation: int, identity: str) -> PatchStore:
    store = PatchStore.__new__(PatchStore)
    store.path = Path(path)
    store._snapshot = Snapshot(store.path, generation, identity)
    return store
