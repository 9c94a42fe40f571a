"""``Searcher``: exact top-k over stores by the actors of a Ray cluster, each with a part of the documents."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latemax.arguments import arrays, check
from latemax.ray import cluster
from latemax.search import TopK, topk
from latemax.search import corpus as corpora
from latemax.search.exact import Within
from latemax.search.merge import best
from latemax.search.scan import is_one
from latemax.search.spaces import unwrapped
from latemax.store import PatchStore
from latemax.store.documents import check_id

# How often one call replaces the same actor.
TRIES = 3


class Piece(NamedTuple):
    """Documents a … b - 1 of a store; ``first``: the number of document 0 among those of all stores."""

    store: PatchStore
    first: int
    a: int
    b: int


class Part:
    """An actor: searches its documents."""

    def __init__(self, pieces: list[Piece], threads: int):
        torch.set_num_threads(threads)
        self.pieces = pieces

    def topk(self, q: Any, k: int, q_mask: Any, within: Tensor | None, options: dict[str, Any]) -> TopK:
        """The k best of its documents, or all where it has fewer; indices count those of all stores."""
        found = []
        for piece in self.pieces:
            documents = torch.arange(piece.a, piece.b)
            if within is not None:
                mine = within[(within >= piece.first + piece.a) & (within < piece.first + piece.b)]
                documents = mine - piece.first
            if len(documents):
                part = topk(q, piece.store, min(k, len(documents)), q_mask, within=documents, **options)
                found.append(TopK(part.scores.cpu(), part.indices.cpu() + piece.first, _cpu(part.argmax)))
        return _merged(found, k)


class Searcher:
    """Exact top-k over stores, as if their documents were one corpus in the order of the stores.

    Each actor has an equal part of the tokens, of one store or several, reads them from the disk and returns its k
    best. Scores and indices equal those of one process bit for bit if the score of a document does not depend on its
    batch mates (true of the native kernels). An actor that dies is replaced by one that opens the same generation of
    the same stores, and the call goes on.

    Args:
        stores: `PatchStore` or paths, under the same names on every machine; at least one with documents, all of one
            dim and dtype.
        num_actors: how many parts; None is one per store. num_cpus, num_gpus: of each; with a GPU it scores there.
        timeout: seconds that a call waits for the slowest actor.

    Attributes:
        generations: of the stores, which calls see until `refresh`.

    Raises:
        ImportError: Ray is missing.
        TypeError, ValueError, FileNotFoundError, StoreError: as `PatchStore`; stores that do not go together.

    Example:
        >>> with latemax.ray.Searcher(["pages-1", "pages-2"], num_actors=8) as searcher:
        ...     scores, indices = searcher.topk(q, 10)
        ...     store, i = searcher.place(int(indices[0, 0]))
    """

    def __init__(
        self, stores: Sequence[Any], *, num_actors: int | None = None, num_cpus: float = 1, num_gpus: float = 0,
        timeout: float = 600.0,
    ):  # fmt: skip
        if isinstance(stores, (str, os.PathLike, PatchStore)) or not len(stores):
            raise ValueError(f"stores must be a list of at least one store or path, got {stores!r}")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        self.stores = [store if isinstance(store, PatchStore) else PatchStore(store) for store in stores]
        self.timeout = timeout
        num_actors = len(self.stores) if num_actors is None else num_actors
        check.check_positive("num_actors", num_actors)
        self._corpus = _Stores(self.stores)
        self._needs = dict(num_cpus=num_cpus, num_gpus=num_gpus)
        self._parts = _split(self.stores, self._corpus, num_actors)
        self._ray = cluster.imported()
        self._actors = [self._start(i) for i in range(len(self._parts))]

    @property
    def generations(self) -> list[int]:
        return [store.generation for store in self.stores]

    def __len__(self) -> int:
        """Documents of all stores."""
        return len(self._corpus)

    def place(self, index: int) -> tuple[PatchStore, int]:
        """The store of a document, and its number there."""
        return self._corpus.place(index)

    def topk(
        self,
        q: Any,
        k: int,
        q_mask: Any = None,
        *,
        within: Within = None,
        timeout: float | None = None,
        **options: Any,
    ) -> TopK:
        """As `latemax.topk` over all stores.

        Args:
            q, k, q_mask: as there. within: indices or a mask over the documents of all stores, or ids, each of which
                must be in one store.
            timeout: seconds; None is the searcher's.
            options: normalize, empty_score, return_argmax, q_weights, reduce, memory, backend, as there.

        Returns:
            TopK on the CPU; indices count documents over all stores in their order.

        Raises:
            TypeError, ValueError: as `latemax.topk`.
            TimeoutError: naming the actors that did not answer in time, which are replaced before the next call.
            RuntimeError: an actor failed, or died three times.
        """
        wrong = options.keys() - {
            "normalize",
            "empty_score",
            "return_argmax",
            "q_weights",
            "reduce",
            "memory",
            "backend",
        }
        if wrong:
            raise TypeError(f"topk of a Searcher takes no {', '.join(sorted(wrong))}")
        check.check_positive("k", k)
        for store in self.stores:
            tokens, mask = unwrapped(q, q_mask, store)
        tokens = arrays.as_tensors("q", tokens)
        documents = corpora.chosen(within, self._corpus)
        corpora.at_most(k, self._corpus, documents)
        one_query = is_one(tokens)
        if self._needs["num_gpus"]:
            options["device"] = "cuda"
        wanted: list[tuple[int, Tensor | None]] = []
        for i, pieces in enumerate(self._parts):
            if documents is None:
                wanted.append((i, None))
                continue
            begin, end = pieces[0].first + pieces[0].a, pieces[-1].first + pieces[-1].b
            mine = documents[(documents >= begin) & (documents < end)]
            if len(mine):
                wanted.append((i, mine))
        arguments = self._ray.put((tokens, k, mask, options))
        found = self._gather(wanted, arguments, self.timeout if timeout is None else timeout)
        result = _merged(found, k)
        return result.row(0) if one_query else result

    def refresh(self) -> bool:
        """Moves on to the stores' last commits; True where there was a newer one. Actors are started again."""
        if not any([store.refresh() for store in self.stores]):
            return False
        number = len(self._parts)
        self.close()
        self._corpus = _Stores(self.stores)
        self._parts = _split(self.stores, self._corpus, number)
        self._actors = [self._start(i) for i in range(len(self._parts))]
        return True

    def pids(self) -> list[int]:
        """The process of every actor."""
        return self._ray.get([actor.pid.remote() for actor in self._actors])

    def close(self) -> None:
        """Ends the actors."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, i: int) -> Any:
        threads = max(1, int(self._needs["num_cpus"]))
        actor = self._ray.remote(_Actor).options(max_restarts=0, **self._needs)
        return actor.remote(self._parts[i], threads)

    def _describe(self, i: int) -> str:
        pieces = [f"{piece.a}..{piece.b - 1} of {piece.store.path}" for piece in self._parts[i]]
        return f"actor {i} (documents {', '.join(pieces)})"

    def _gather(self, wanted: list[tuple[int, Tensor | None]], arguments: Any, timeout: float) -> list[TopK]:
        """The answer of every actor, in order; of those that die, the answer of who replaces them."""
        if not self._actors:
            raise RuntimeError("this searcher is closed")
        ray, deadline = self._ray, time.monotonic() + timeout
        within, found, died = dict(wanted), {}, dict.fromkeys(dict(wanted), 0)

        def ask(i: int) -> Any:
            return self._actors[i].topk.remote(arguments, within[i])

        waiting = {ask(i): i for i in within}
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                slow = sorted(waiting.values())
                for i in slow:
                    ray.kill(self._actors[i])
                    self._actors[i] = self._start(i)
                names = ", ".join(self._describe(i) for i in slow)
                raise TimeoutError(f"topk: no answer within {timeout:g} s from {names}")
            for answer in done:
                i = waiting.pop(answer)
                try:
                    found[i] = ray.get(answer)
                except ray.exceptions.RayActorError as error:
                    died[i] += 1
                    self._actors[i] = self._start(i)
                    if died[i] == TRIES:
                        raise RuntimeError(f"topk: {self._describe(i)} died {TRIES} times") from error
                    waiting[ask(i)] = i
                except ray.exceptions.RayTaskError as error:
                    # what topk says of wrong arguments is the same everywhere
                    if isinstance(error.cause, (TypeError, ValueError)):
                        raise error.cause from None
                    raise RuntimeError(f"topk: {self._describe(i)} failed: {error.cause}") from error
        return [found[i] for i in sorted(found)]


class _Actor(Part):
    """What Ray runs: a part whose arguments are in the object store."""

    def topk(self, arguments: Any, within: Tensor | None) -> TopK:  # type: ignore[override]
        q, k, q_mask, options = arguments
        return super().topk(q, k, q_mask, within, options)

    def pid(self) -> int:
        return os.getpid()


class _Stores(corpora.Corpus):
    """The documents of several stores, one after the other."""

    def __init__(self, stores: Sequence[PatchStore]):
        real = [store for store in stores if store.dim is not None]
        if not any(len(store) for store in real):
            raise ValueError("stores must hold at least one document")
        for store in real:
            for name in ("dim", "dtype"):
                ours, first = getattr(store, name), getattr(real[0], name)
                if ours != first:
                    raise ValueError(
                        f"stores must have one {name}; {real[0].path} has {first}, {store.path} has {ours}"
                    )
        self.stores = list(stores)
        dim, dtype = real[0].dim, real[0].dtype
        assert dim is not None and dtype is not None
        self.dim, self.dtype, self.device = dim, dtype, torch.device("cpu")
        lengths = torch.cat([store.offsets.diff() for store in stores])
        self.offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self.starts = [0]
        for store in stores:
            self.starts.append(self.starts[-1] + len(store))

    def place(self, index: int) -> tuple[PatchStore, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        at = bisect_right(self.starts, index) - 1
        return self.stores[at], index - self.starts[at]

    def find(self, ids: Sequence[object]) -> Tensor:
        plain: Any = [check_id(id) for id in ids]
        found = torch.full((len(plain),), -1)
        for start, store in zip(self.starts, self.stores, strict=False):
            here = torch.from_numpy(store.snapshot().find(plain))
            twice = ((here >= 0) & (found >= 0)).nonzero().flatten().tolist()
            if twice:
                raise ValueError(f"within must name ids of one store each; {plain[twice[0]]!r} is in two")
            found = torch.where(here >= 0, here + start, found)
        if len(found) and int(found.min()) < 0:
            raise ValueError(f"within names id {plain[int(found.argmin())]!r}, which no store has")
        return found


def _split(stores: Sequence[PatchStore], corpus: _Stores, parts: int) -> list[list[Piece]]:
    """Consecutive documents of about the same number of tokens for each part; fewer parts where documents are few."""
    targets = torch.arange(1, parts) * int(corpus.offsets[-1]) / parts
    ends = [*torch.searchsorted(corpus.offsets, targets.to(torch.int64)).tolist(), len(corpus)]
    found, begin = [], 0
    for end in ends:
        pieces = []
        for store, start in zip(stores, corpus.starts, strict=False):
            a, b = max(begin - start, 0), min(end - start, len(store))
            if a < b:
                pieces.append(Piece(store, start, a, b))
        if pieces:
            found.append(pieces)
        begin = max(begin, end)
    return found


def _cpu(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.cpu()


def _merged(parts: list[TopK], k: int) -> TopK:
    """The k best [n_q, k] of parts whose documents follow each other."""
    parts = [part if part.scores.dim() == 2 else _batch(part) for part in parts]
    scores, indices = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
    # within a part equal scores are in order of index already, and the parts are in order
    order = best(scores, torch.arange(scores.shape[1]).expand_as(scores), k)
    result = TopK(order.scores, indices.gather(1, order.indices))
    if parts[0].argmax is not None:
        argmax = torch.cat([part.argmax for part in parts if part.argmax is not None], 1)
        result.argmax = argmax.gather(1, order.indices.unsqueeze(-1).expand(-1, -1, argmax.shape[-1]))
    return result


def _batch(part: TopK) -> TopK:
    return TopK(part.scores[None], part.indices[None], None if part.argmax is None else part.argmax[None])
