"""The kinds of corpus, behind one face: how long documents are, where they lie, and a run of them as packed tokens."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from latemax.arguments.check import as_mask, check_tokens
from latemax.store import Packed, PatchStore
from latemax.store.packed import check


class Corpus:
    """Documents in order. ``offsets``: int64 [n_d + 1] on the CPU, of tokens as if all lay end to end."""

    offsets: Tensor
    dim: int
    dtype: torch.dtype
    device: torch.device
    # whether the tokens are in memory at all: a store's are on the disk
    resident = True

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def view(self, a: int, b: int) -> Tensor:
        """Documents a … b - 1 as [t, dim] where they lie."""
        raise NotImplementedError

    def read(self, a: int, b: int, out: Tensor) -> None:
        """Documents a … b - 1 into out [t, dim] on the CPU."""
        out.copy_(self.view(a, b))

    def keep(self, a: int, b: int) -> Tensor | None:
        """The mask [b - a, l_d] of a dense corpus that has one."""
        return None

    def pieces(self, candidates: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(tokens [t, dim], offsets int64 [n + 1], candidates within them) that cover candidates int64 [n_q, k].

        A candidate is named by one piece, and -1 in all others.
        """
        return [(self.view(0, len(self)), self.offsets, candidates)]


class Dense(Corpus):
    """[n_d, l_d, dim], and a mask [n_d, l_d] or None."""

    def __init__(self, d: Tensor, mask: Tensor | None):
        self.d, self.mask = d, mask
        n_d, l_d, self.dim = d.shape
        self.offsets = torch.arange(n_d + 1) * l_d
        self.dtype, self.device = d.dtype, d.device

    def view(self, a: int, b: int) -> Tensor:
        return self.d[a:b].reshape(-1, self.dim)

    def keep(self, a: int, b: int) -> Tensor | None:
        return None if self.mask is None else self.mask[a:b]


class Flat(Corpus):
    """tokens [t_d, dim], end to end."""

    def __init__(self, tokens: Tensor, offsets: Tensor):
        self.tokens, self.offsets = tokens, offsets
        self.dim, self.dtype, self.device = tokens.shape[1], tokens.dtype, tokens.device

    def view(self, a: int, b: int) -> Tensor:
        return self.tokens[int(self.offsets[a]) : int(self.offsets[b])]


class Items(Corpus):
    """A list of [l_i, dim]."""

    def __init__(self, items: list[Tensor]):
        self.items = items
        self.offsets = torch.tensor([0, *map(len, items)], dtype=torch.int64).cumsum(0)
        self.dim, self.dtype, self.device = items[0].shape[1], items[0].dtype, items[0].device

    def view(self, a: int, b: int) -> Tensor:
        return torch.cat(self.items[a:b]) if b > a else self.items[0][:0]

    def read(self, a: int, b: int, out: Tensor) -> None:
        torch.cat(self.items[a:b], out=out)

    def pieces(self, candidates: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        named, local = candidates.unique(return_inverse=True)
        # unique is sorted: where there is a -1, it is the first
        empty = int((named < 0).sum())
        tokens, offsets = Packed.of([self.items[0][:0], *(self.items[i] for i in named[empty:].tolist())])
        return [(tokens, offsets[1:], local - empty)]


class Stored(Corpus):
    resident = False

    def __init__(self, store: PatchStore):
        self.store, self.offsets = store, store.offsets
        self.dim, self.dtype, self.device = store.dim, store.dtype, torch.device("cpu")

    def read(self, a: int, b: int, out: Tensor) -> None:
        self.store.read(a, b, out)

    def pieces(self, candidates: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        found = []
        for shard in self.store.shards:
            local = candidates - shard.first
            inside = (local >= 0) & (local < len(shard))
            if inside.any():
                found.append((shard.tokens, shard.offsets, local.where(inside, -1)))
        return found


def of(corpus, d_mask=None) -> Corpus:
    """The corpus that the caller passed, checked.

    Raises:
        TypeError, ValueError: naming ``corpus`` or ``d_mask``, the rule and what came.
    """
    dense = isinstance(corpus, Tensor) and not corpus.is_nested
    if d_mask is not None and not dense:
        raise ValueError(f"d_mask goes with a dense corpus [n_d, l_d, dim] alone, got {type(corpus).__name__}")
    if isinstance(corpus, PatchStore):
        return Stored(corpus)
    if dense:
        check_tokens("corpus", corpus, (3,), "[n_d, l_d, dim], a list, (tokens, offsets) or a PatchStore")
        return Dense(corpus, as_mask("d_mask", d_mask, "corpus", corpus))
    if isinstance(corpus, Tensor):
        if corpus.layout != torch.jagged:
            raise TypeError(f"corpus must be a dense tensor or a jagged nested tensor, got layout {corpus.layout}")
        return _items(list(corpus.unbind()))
    if _is_pair(corpus):
        tokens, offsets = corpus
        check(tokens, offsets)
        check_tokens("corpus[0]", tokens, (2,), "[t_d, dim]")
        return Flat(tokens, offsets.to("cpu", torch.int64))
    if isinstance(corpus, (list, tuple)):
        return _items(list(corpus))
    raise TypeError(
        "corpus must be a tensor [n_d, l_d, dim], a list of [l_i, dim], a jagged nested tensor, (tokens, offsets) or a "
        f"PatchStore, got {type(corpus).__name__}"
    )


def _is_pair(corpus) -> bool:
    two = isinstance(corpus, tuple) and len(corpus) == 2 and all(isinstance(x, Tensor) for x in corpus)
    return two and corpus[1].dim() == 1


def _items(items: list) -> Corpus:
    if not items:
        raise ValueError("corpus must hold at least one document, got an empty list")
    for i, item in enumerate(items):
        check_tokens(f"corpus[{i}]", item, (2,), "[l_i, dim]")
        for what, ours, first in (
            ("dtype", item.dtype, items[0].dtype),
            ("device", item.device, items[0].device),
            ("dim", item.shape[1], items[0].shape[1]),
        ):
            if ours != first:
                raise ValueError(f"all of corpus must have one {what}; corpus[0] has {first}, corpus[{i}] has {ours}")
    return Items(items)


def runs(corpus: Corpus, budget: int, row_bytes: int, document_bytes: int) -> list[tuple[int, int]]:
    """Runs of documents [a, b) in order, each as long as ``budget`` bytes allow.

    row_bytes: what a token costs; document_bytes: what a document costs besides.
    """
    # what the first i documents cost, rising
    cost = (corpus.offsets * row_bytes + torch.arange(len(corpus) + 1) * document_bytes).tolist()
    found, a = [], 0
    while a < len(corpus):
        b = bisect_right(cost, cost[a] + budget) - 1
        if b == a:
            raise ValueError(
                f"memory must hold the largest document: document {a} has "
                f"{int(corpus.offsets[a + 1] - corpus.offsets[a])} tokens and needs {cost[a + 1] - cost[a]} bytes of "
                f"the {budget} that are left"
            )
        found.append((a, b))
        a = b
    return found
