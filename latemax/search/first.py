"""What first stages share: rows of every document, kept in step with a store, saved and loaded."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latemax._progress import Bar
from latemax.arguments import arrays, check
from latemax.search import corpus as corpora
from latemax.search import stream
from latemax.search.tokens import floats

FORMAT_VERSION = 1


class Column:
    """One tensor of a first stage: [rows, *shape]."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32):
        self.shape, self.dtype = shape, dtype


class FirstStage:
    """A first stage: names candidates for every query, for `two_stage` to score exactly.

    A subclass says what it keeps of a document (`_columns`, `_lengths`, `_encode`) and how a query finds candidates
    (`_first`); this class reads the corpus in chunks, keeps up with a store, saves and loads.

    Args:
        corpus: as in `latemax.topk`, without a mask; read once.
        memory: bytes that chunks of tokens may take together. progress: a bar on stderr.

    Attributes:
        dim: of the corpus's tokens. generation: of the store it was built from or updated to; None for other corpora.

    Raises:
        TypeError, ValueError: as `latemax.topk`; a token with NaN or infinity, named: it would rank anywhere.
    """

    # constructor's arguments that decide the rows; attributes of the same names
    SETTINGS: ClassVar[tuple[str, ...]] = ()
    # bytes that encoding takes for each number of a token
    WORKING: ClassVar[int] = 4
    # tensors that encoding needs, drawn or learned in `_prepare`; attributes of the same names
    LEARNED: ClassVar[tuple[str, ...]] = ()

    def __init__(self, corpus: Any, memory: int = 1 << 30, progress: bool = False):
        check.check_positive("memory", memory)
        found = corpora.of(corpus)
        self.dim, self.memory, self.progress = found.dim, memory, progress
        self._prepare(found)
        lengths = self._lengths(found)
        self._set(found, lengths, self._rows(found, lengths))

    # what a subclass says

    def _prepare(self, corpus: corpora.Corpus) -> None:
        """Draws or learns what `_encode` needs."""

    def _columns(self) -> dict[str, Column]:
        raise NotImplementedError

    def _lengths(self, corpus: corpora.Corpus) -> Tensor:
        """Rows of every document, int64 [n_d]."""
        return torch.ones(len(corpus), dtype=torch.int64)

    def _encode(self, tokens: Tensor, offsets: Tensor, lengths: Tensor, out: dict[str, Tensor]) -> None:
        """Fills the rows of documents.

        Args:
            tokens: floats [t, dim] on the corpus's device. offsets: int64 [n + 1] on the CPU.
            lengths: of the n documents, in rows. out: one [rows, *shape] on the CPU for each column.
        """
        raise NotImplementedError

    def _first(self, q: Tensor, q_mask: Tensor | None, n: int, within: Tensor | None) -> Tensor:
        """int64 [n_q, n or fewer], best first; n is at most the number of documents to choose from."""
        raise NotImplementedError

    def _changed(self) -> None:
        """Called whenever the rows have been set."""

    # what users call

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def bytes_per_document(self) -> float:
        """Bytes of rows that a document takes on average."""
        total = sum(column.numel() * column.element_size() for column in self.columns.values())
        return total / max(1, len(self))

    def first(
        self, q: Tensor | np.ndarray, q_mask: Tensor | np.ndarray | None, n: int,
        within: Tensor | np.ndarray | None = None,
    ) -> Tensor:  # fmt: skip
        """Candidates of every query.

        Args:
            q: [n_q, l_q, dim], tensor or array. q_mask: [n_q, l_q] or None.
            n: how many.
            within: the documents to choose from, int64 indices or a bool mask [n_d]; None is all.

        Returns:
            int64 [n_q, n], best first; -1 where fewer were found.

        Raises:
            TypeError, ValueError: q is not [n_q, l_q, dim] of this dim, q_mask is not of its shape, n is not at least
                1, or within names a document that is not there.
        """
        q = arrays.as_tensor("q", q)
        check.check_tokens("q", q, (3,), "[n_q, l_q, dim]")
        check.check_positive("n", n)
        if q.shape[-1] != self.dim:
            raise ValueError(f"q must have the dim of the corpus, {self.dim}; got {q.shape[-1]}")
        q, q_mask = q.detach(), check.as_mask("q_mask", q_mask, "q", q)
        if q_mask is not None:
            # a masked token influences nothing, whatever it holds
            q = q.masked_fill(~q_mask.unsqueeze(-1), 0)
        if within is not None:
            within = corpora.numbered(within, len(self))
        room = min(n, len(self) if within is None else len(within))
        found = torch.full((len(q), n), -1, dtype=torch.int64)
        if room and len(q):
            came = self._first(q, q_mask, room, within)
            found[:, : came.shape[1]] = came
        return found

    __call__ = first

    def check(self, corpus: corpora.Corpus) -> None:
        """Checks that this first stage describes a corpus.

        Raises:
            ValueError: another number of documents, another dim, or another generation of the store.
        """
        if (len(self), self.dim) != (len(corpus), corpus.dim):
            raise ValueError(
                f"first must be of this corpus, {len(corpus)} documents of dim {corpus.dim}; it is of {len(self)} of "
                f"dim {self.dim}: call its update(store), or build it again"
            )
        if isinstance(corpus, corpora.Stored) and self._identity is not None:
            now = corpus.snapshot.identity
            if now != self._identity:
                raise ValueError(
                    f"first must be of generation {corpus.snapshot.generation} of {corpus.path}; it is of another "
                    f"generation, {self.generation}, or of another store: call its update(store)"
                )

    def update(self, store: Any) -> None:
        """Follows a store: documents that were removed leave, new and replaced ones are read, others stay.

        After `StoreWriter.compact` the documents that it moved are read again; of a store that is not a later
        generation of the one it was built from, all are.

        Args:
            store: a `PatchStore`, refreshed; or any other corpus, of which all documents are read.

        Raises:
            TypeError, ValueError: as `latemax.topk`; a corpus of another dim; a token that is read and holds NaN or
                infinity.
        """
        found = corpora.of(store)
        if found.dim != self.dim:
            raise ValueError(f"store must have the dim of this first stage, {self.dim}; got {found.dim}")
        old, lengths = self._known(found), self._lengths(found)
        fresh = (old < 0).nonzero().flatten()
        added = self._rows(corpora.Subset(found, fresh), lengths[fresh])
        offsets = offsets_of(lengths)
        kept = (old >= 0).nonzero().flatten()
        columns = {}
        for name, column in self.columns.items():
            columns[name] = new = column.new_empty(int(offsets[-1]), *column.shape[1:])
            new[ragged_index(offsets, fresh)] = added[name]
            new[ragged_index(offsets, kept)] = column[ragged_index(self.offsets, old[kept])]
        self._set(found, lengths, columns)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to one file, which appears whole or not at all; it may be in the store's folder.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "latemax first stage": FORMAT_VERSION,
            "kind": type(self).__name__,
            "settings": {name: getattr(self, name) for name in self.SETTINGS},
            "learned": {name: getattr(self, name) for name in self.LEARNED},
            "columns": self.columns,
            "offsets": self.offsets,
            "dim": self.dim,
            "generation": self.generation,
            "identity": self._identity,
            "seq": self._seq,
        }
        path = Path(path)
        # not a file of tempfile, which only its owner may read
        scratch = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        try:
            with open(scratch, "xb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(scratch)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Any:
        """Reads what `save` wrote; the rows stay on the file's own pages until they are used.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no first stage, one of another class or version, or a damaged file; names it.
        """
        with open(path, "rb"):
            pass
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            version = content["latemax first stage"]
        except Exception as error:
            raise ValueError(f"{path} is no first stage: {str(error).splitlines()[0]}") from error
        if version != FORMAT_VERSION or content.get("kind") != cls.__name__:
            raise ValueError(
                f"{path} must hold a {cls.__name__} of version {FORMAT_VERSION}, got {content.get('kind')!r} of "
                f"version {version!r}"
            )
        self = cls.__new__(cls)
        try:
            for name in cls.SETTINGS:
                setattr(self, name, content["settings"][name])
            for name in cls.LEARNED:
                setattr(self, name, content["learned"][name])
            self.columns, self.offsets, self.dim = content["columns"], content["offsets"], content["dim"]
            self.generation, self._identity, self._seq = content["generation"], content["identity"], content["seq"]
        except KeyError as error:
            raise ValueError(f"{path} is damaged: it has no {error}") from error
        self.memory, self.progress = 1 << 30, False
        self._changed()
        return self

    # inside

    def _set(self, corpus: corpora.Corpus, lengths: Tensor, columns: dict[str, Tensor]) -> None:
        self.columns, self.offsets = columns, offsets_of(lengths)
        stored = isinstance(corpus, corpora.Stored)
        self.generation: int | None = corpus.snapshot.generation if stored else None
        self._identity: str | None = corpus.snapshot.identity if stored else None
        # the store's own number of each document's row, which a replacement changes
        self._seq: Tensor | None = torch.from_numpy(corpus.snapshot.seq.copy()) if stored else None
        self._changed()

    def _known(self, corpus: corpora.Corpus) -> Tensor:
        """The number here of every document of a corpus, int64 [n_d]; -1 for those to be read."""
        unknown = torch.full((len(corpus),), -1, dtype=torch.int64)
        if not isinstance(corpus, corpora.Stored) or self._seq is None or not len(self._seq):
            return unknown
        if not corpus.snapshot.follows(self.generation, self._identity):
            return unknown
        rising, order = self._seq.sort()
        wanted = torch.from_numpy(corpus.snapshot.seq.copy())
        at = torch.searchsorted(rising, wanted).clamp_(max=len(rising) - 1)
        return torch.where(rising[at] == wanted, order[at], unknown)

    def _rows(self, corpus: corpora.Corpus, lengths: Tensor) -> dict[str, Tensor]:
        """The columns of all documents of a corpus."""
        offsets = offsets_of(lengths)
        total = int(offsets[-1])
        columns = {name: torch.empty(total, *c.shape, dtype=c.dtype) for name, c in self._columns().items()}
        # two buffers of tokens, what encoding makes of them, and a few numbers a token
        row = 2 * corpus.token_bytes + self.WORKING * corpus.dim + 64
        bar = Bar(len(corpus), f"{type(self).__name__} ") if self.progress and len(corpus) else None
        with torch.no_grad():
            for (a, b), tokens in stream.chunks(corpus, corpora.runs(corpus, self.memory, row, 0), corpus.device):
                out = {name: column[int(offsets[a]) : int(offsets[b])] for name, column in columns.items()}
                numbers = floats(tokens)
                check_finite(numbers, corpus, a)
                self._encode(numbers, corpus.offsets[a : b + 1] - corpus.offsets[a], lengths[a:b], out)
                if bar is not None:
                    bar.tick(b - a)
        return columns


def finite(tokens: Tensor) -> bool:
    """Whether tokens have neither NaN nor infinity."""
    # they stay in a sum, which takes one pass; a sum of finite numbers may overflow
    total = tokens.sum(dtype=torch.promote_types(tokens.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tokens.isfinite().all())


def check_finite(tokens: Tensor, corpus: corpora.Corpus, first: int) -> None:
    """ValueError that names a token which is not finite; tokens [t, dim]: of the corpus, from document ``first`` on."""
    if finite(tokens):
        return
    token = int((~tokens.isfinite().all(-1)).nonzero()[0]) + int(corpus.offsets[first])
    document = int(torch.searchsorted(corpus.offsets, token, right=True)) - 1
    number = int(corpus.documents[document]) if isinstance(corpus, corpora.Subset) else document
    raise ValueError(
        f"corpus must be finite: token {token - int(corpus.offsets[document])} of document {number} holds NaN or "
        "infinity"
    )


def offsets_of(lengths: Tensor) -> Tensor:
    """int64 [n + 1] of int64 [n]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def ragged_index(offsets: Tensor, documents: Tensor) -> Tensor:
    """The rows of documents, one document after the other: int64."""
    first, lengths = offsets[documents], offsets[documents + 1] - offsets[documents]
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (first - before).repeat_interleave(lengths)


def owners(offsets: Tensor) -> Tensor:
    """The number of its document for every token: int64 [t]."""
    return torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
