"""The kinds of corpus with one interface: lengths of documents, and tokens of consecutive or of chosen ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latemax.arguments import arrays
from latemax.arguments.check import as_mask, check_tokens
from latemax.quantized import QuantizedTokens
from latemax.search.tokens import bytes_of, concatenated, copy, dtype_of, mapped
from latemax.store import PatchStore
from latemax.store.documents import check_id
from latemax.store.packed import check, token_bytes
from latemax.store.packed import empty as empty_tokens

# Bytes of tokens that a piece of a corpus which has to be copied may take.
PIECE_BYTES = 1 << 28


class Corpus:
    """Documents in order. ``offsets``: int64 [n_d + 1] on the CPU, of all tokens as if they were concatenated.

    Tokens are tensors, or all QuantizedTokens; dtype is int8 or uint8 then.
    """

    offsets: Tensor
    dim: int
    dtype: torch.dtype
    device: torch.device
    # whether the tokens are in memory: a store's are on the disk
    resident = True
    # whether `view` copies
    copies = False
    # the same documents as int8 codes, from which `topk` finds what to read
    codes: Corpus | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.dim * self.dtype.itemsize

    def view(self, a: int, b: int) -> Any:
        """Documents a … b - 1 as [t, dim], in place where the corpus is contiguous."""
        raise NotImplementedError

    def empty(self, rows: int) -> Any:
        """Uninitialised tokens [rows, dim] on the CPU."""
        return mapped(lambda x: x.new_empty(rows, *x.shape[1:], device="cpu"), self.view(0, 0))

    def read(self, a: int, b: int, out: Any) -> None:
        """Documents a … b - 1 into out [t, dim] on the CPU."""
        copy(self.view(a, b), out)

    def views(self, documents: Tensor) -> list[Any]:
        """Documents of rising number as views [t, dim], one of each stretch of neighbours."""
        return [self.view(a, b) for a, b in _stretches(documents)]

    def some(self, documents: Tensor) -> Any:
        """Documents of rising number as [t, dim], a copy."""
        parts = self.views(documents)
        return concatenated(parts) if parts else self.view(0, 0)

    def read_some(self, documents: Tensor, out: Any) -> None:
        """Documents of rising number into out [t, dim] on the CPU."""
        copy(self.some(documents), out)

    def keep(self, a: int, b: int) -> Tensor | None:
        """The mask [b - a, l_d] of a dense corpus that has one."""
        return None

    def grid_rows(self) -> Tensor | None:
        """Rows of every document's grid, int64 [n_d], 0 where it has none; None where no document has one."""
        return None

    def find(self, ids: Sequence[object]) -> Tensor:
        """The documents of ids, int64; ValueError for an unknown one."""
        raise ValueError("within is a list of ids, and this corpus has none: pass a tensor of indices or a bool mask")

    def pieces(self, candidates: Tensor, memory: int = PIECE_BYTES) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """(tokens [t, dim], offsets int64 [n + 1], candidates within them) that cover candidates int64 [n_q, k].

        A candidate is named by one piece, and -1 in all others. Tokens that have to be copied take ``memory`` bytes, or
        one document.
        """
        named = candidates.unique().cpu()
        chosen = Subset(self, named[named >= 0])
        # -1 stays -1: it is below all that are named
        at = torch.searchsorted(chosen.documents.to(candidates.device), candidates).masked_fill(candidates < 0, -1)
        row, a = self.token_bytes, 0
        while a < len(chosen):
            limit = int(chosen.offsets[a]) + memory // row
            b = max(a + 1, int(torch.searchsorted(chosen.offsets, limit, right=True)) - 1)
            local = (at - a).masked_fill((at < a) | (at >= b), -1)
            yield chosen.view(a, b), chosen.offsets[a : b + 1] - chosen.offsets[a], local
            a = b


def _stretches(documents: Tensor) -> list[tuple[int, int]]:
    """(first, the one after the last) of each stretch of consecutive numbers."""
    breaks = (documents.diff() != 1).nonzero().flatten().tolist()
    starts, ends = [0, *(i + 1 for i in breaks)], [*breaks, len(documents) - 1]
    if not len(documents):
        return []
    return [(int(documents[a]), int(documents[b]) + 1) for a, b in zip(starts, ends, strict=True)]


class Dense(Corpus):
    """[n_d, l_d, dim], a tensor or QuantizedTokens, and a mask [n_d, l_d] or None."""

    def __init__(self, d: Any, mask: Tensor | None):
        self.d, self.mask = d, mask
        n_d, l_d, self.dim = d.shape
        self.offsets = torch.arange(n_d + 1, device="cpu") * l_d
        self.dtype, self.device = dtype_of(d), d.device

    @property
    def token_bytes(self) -> int:
        return bytes_of(self.d)

    def view(self, a: int, b: int) -> Any:
        return mapped(lambda x: x.flatten(0, 1), self.d[a:b])

    def some(self, documents: Tensor) -> Any:
        return mapped(lambda x: x.flatten(0, 1), self.d[documents.to(self.device)])

    def keep(self, a: int, b: int) -> Tensor | None:
        return None if self.mask is None else self.mask[a:b]

    def pieces(self, candidates: Tensor, memory: int = PIECE_BYTES) -> Iterator[tuple[Any, Tensor, Tensor]]:
        yield self.view(0, len(self)), self.offsets, candidates


class Flat(Corpus):
    """tokens [t_d, dim], concatenated; a tensor or QuantizedTokens."""

    def __init__(self, tokens: Any, offsets: Tensor):
        self.tokens, self.offsets = tokens, offsets
        self.dim, self.dtype, self.device = tokens.shape[1], dtype_of(tokens), tokens.device

    @property
    def token_bytes(self) -> int:
        return bytes_of(self.tokens)

    def view(self, a: int, b: int) -> Any:
        return self.tokens[int(self.offsets[a]) : int(self.offsets[b])]

    def pieces(self, candidates: Tensor, memory: int = PIECE_BYTES) -> Iterator[tuple[Any, Tensor, Tensor]]:
        yield self.tokens, self.offsets, candidates


class Items(Corpus):
    """A list of [l_i, dim], tensors or QuantizedTokens."""

    copies = True

    def __init__(self, items: list[Any]):
        self.items = items
        self.offsets = torch.tensor([0, *map(len, items)], dtype=torch.int64, device="cpu").cumsum(0)
        self.dim, self.dtype, self.device = items[0].shape[1], dtype_of(items[0]), items[0].device

    @property
    def token_bytes(self) -> int:
        return bytes_of(self.items[0])

    def view(self, a: int, b: int) -> Any:
        return concatenated(self.items[a:b] if b > a else [self.items[0][:0]])

    def read(self, a: int, b: int, out: Any) -> None:
        if isinstance(out, Tensor):
            torch.cat(self.items[a:b], out=out)
        else:
            copy(self.view(a, b), out)

    def some(self, documents: Tensor) -> Any:
        return concatenated([self.items[0][:0], *(self.items[i] for i in documents.tolist())])


class Stored(Corpus):
    """A store, or its codes, as it is at this moment: refreshing it changes nothing here."""

    resident = False
    copies = True

    def __init__(self, store: PatchStore, codes: bool = False):
        if store.dim is None or store.dtype is None:
            raise ValueError(f"corpus must hold at least one document, got {store}")
        self.snapshot, self.path = store.snapshot(), store.path
        self.offsets = self.snapshot.offsets
        self.dim, self.dtype, self.device = store.dim, torch.int8 if codes else store.dtype, torch.device("cpu")
        if store.codes and not codes:
            self.codes = Stored(store, codes=True)

    @property
    def token_bytes(self) -> int:
        return token_bytes(self.dtype, self.dim)

    def view(self, a: int, b: int) -> Any:
        return self.some(torch.arange(a, b, device="cpu"))

    def empty(self, rows: int) -> Any:
        return empty_tokens(self.dtype, rows, self.dim)

    def read(self, a: int, b: int, out: Any) -> None:
        self.snapshot.read(a, b, out)

    def some(self, documents: Tensor) -> Any:
        rows = int((self.offsets[documents + 1] - self.offsets[documents]).sum())
        out = self.empty(rows)
        self.read_some(documents, out)
        return out

    def read_some(self, documents: Tensor, out: Any) -> None:
        self.snapshot.read_some(documents.numpy(), out)

    def grid_rows(self) -> Tensor | None:
        return torch.from_numpy(self.snapshot.grid_rows())

    def find(self, ids: Sequence[object]) -> Tensor:
        plain = [check_id(id) for id in ids]
        found = torch.from_numpy(self.snapshot.find(plain))
        if len(found) and int(found.min()) < 0:
            raise ValueError(f"within names id {plain[int(found.argmin())]!r}, which {self.path} does not have")
        return found


class Subset(Corpus):
    """Documents of rising number of another corpus."""

    copies = True

    def __init__(self, whole: Corpus, documents: Tensor):
        self.whole, self.documents, self.resident = whole, documents, whole.resident
        self.dim, self.dtype, self.device = whole.dim, whole.dtype, whole.device
        self.offsets = torch.zeros(len(documents) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(whole.offsets[documents + 1] - whole.offsets[documents], 0, out=self.offsets[1:])
        if whole.codes is not None:
            self.codes = Subset(whole.codes, documents)

    @property
    def token_bytes(self) -> int:
        return self.whole.token_bytes

    def view(self, a: int, b: int) -> Any:
        return self.whole.some(self.documents[a:b])

    def empty(self, rows: int) -> Any:
        return self.whole.empty(rows)

    def read(self, a: int, b: int, out: Any) -> None:
        self.whole.read_some(self.documents[a:b], out)

    def grid_rows(self) -> Tensor | None:
        rows = self.whole.grid_rows()
        return None if rows is None else rows[self.documents]

    def keep(self, a: int, b: int) -> Tensor | None:
        mask = self.whole.keep(0, len(self.whole))
        return None if mask is None else mask[self.documents[a:b].to(mask.device)]


def chosen(within: Tensor | np.ndarray | Sequence[object] | None, corpus: Corpus) -> Tensor | None:
    """The documents that ``within`` names: int64 on the CPU, rising, each once; None for all.

    Raises:
        TypeError, ValueError: naming ``within``, the rule and what came.
    """
    if isinstance(within, (list, tuple)):
        return corpus.find(within).unique()
    return None if within is None else numbered(within, len(corpus))


def numbered(within: Any, n: int) -> Tensor:
    """As `chosen`, of indices or a mask over n documents."""
    if isinstance(within, np.ndarray) and within.dtype in (np.bool_, np.int64):
        within = torch.from_numpy(np.ascontiguousarray(within))
    if not isinstance(within, Tensor) or within.dtype not in (torch.bool, torch.int64):
        came = getattr(within, "dtype", type(within).__name__)
        raise TypeError(f"within must be int64 indices, a bool mask, or a list or tuple of ids; got {came}")
    within = within.detach().cpu()
    if within.dtype == torch.bool:
        if within.shape != (n,):
            raise ValueError(f"within must be a mask [n_d] of {n} documents, got shape {list(within.shape)}")
        return within.nonzero().flatten()
    if within.dim() != 1:
        raise ValueError(f"within must be indices [n], got shape {list(within.shape)}")
    wrong = within[(within < 0) | (within >= n)]
    if len(wrong):
        raise ValueError(f"within must be indices from 0 to {n - 1}, got {int(wrong[0])}")
    return within if bool((within.diff() > 0).all()) else within.unique()


def at_most(k: int, corpus: Corpus, within: Tensor | None) -> None:
    """ValueError where there are fewer than k documents to rank."""
    if within is not None and k > len(within):
        raise ValueError(f"k must be at most the number of documents in within, {len(within)}; got {k}")
    if k > len(corpus):
        raise ValueError(f"k must be at most the number of documents, {len(corpus)}; got {k}")


def of(corpus: Any, d_mask: Tensor | np.ndarray | None = None) -> Corpus:
    """The corpus that the caller passed, checked.

    Raises:
        TypeError, ValueError: naming ``corpus`` or ``d_mask``, the rule and what came.
    """
    if isinstance(corpus, Corpus):
        return corpus
    corpus = arrays.as_tensors("corpus", corpus)
    coded = isinstance(corpus, QuantizedTokens)
    dense = coded or (isinstance(corpus, Tensor) and not corpus.is_nested)
    if d_mask is not None and not dense:
        raise ValueError(f"d_mask goes with a dense corpus [n_d, l_d, dim] only, got {type(corpus).__name__}")
    if isinstance(corpus, PatchStore):
        return Stored(corpus)
    if coded:
        check_codes("corpus", corpus, 3, "[n_d, l_d, dim]")
        return Dense(corpus, as_mask("d_mask", d_mask, "corpus", corpus.codes))
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
        if isinstance(tokens, Tensor):
            check_tokens("corpus[0]", tokens, (2,), "[t_d, dim]")
        return Flat(tokens, offsets.to("cpu", torch.int64))
    if isinstance(corpus, (list, tuple)):
        return _items(list(corpus))
    raise TypeError(
        "corpus must be a tensor [n_d, l_d, dim], a list of [l_i, dim], a jagged nested tensor, (tokens, offsets), "
        f"QuantizedTokens or a PatchStore, got {type(corpus).__name__}"
    )


def _is_pair(corpus: Any) -> bool:
    two = isinstance(corpus, tuple) and len(corpus) == 2 and isinstance(corpus[0], Tensor | QuantizedTokens)
    return two and isinstance(corpus[1], Tensor) and corpus[1].dim() == 1


def check_codes(name: str, x: QuantizedTokens, dims: int, shapes: str) -> None:
    if len(x.shape) != dims:
        raise ValueError(f"{name} must be {shapes}, got shape {list(x.shape)}")


def _items(items: list[Any]) -> Corpus:
    if not items:
        raise ValueError("corpus must hold at least one document, got an empty list")
    for i, item in enumerate(items):
        if isinstance(item, QuantizedTokens):
            check_codes(f"corpus[{i}]", item, 2, "[l_i, dim]")
        else:
            check_tokens(f"corpus[{i}]", item, (2,), "[l_i, dim]")
        for what, ours, first in (
            ("dtype", dtype_of(item), dtype_of(items[0])),
            ("device", item.device, items[0].device),
            ("dim", item.shape[1], items[0].shape[1]),
        ):
            if ours != first:
                raise ValueError(f"all of corpus must have one {what}; corpus[0] has {first}, corpus[{i}] has {ours}")
    return Items(items)


def runs(corpus: Corpus, budget: int, row_bytes: int, document_bytes: int) -> list[tuple[int, int]]:
    """Runs of documents [a, b) in order, each as long as ``budget`` bytes allow.

    Args:
        corpus: whose documents.
        budget: bytes of a run. row_bytes: of a token. document_bytes: of a document, in addition to its tokens.

    Raises:
        ValueError: a document that the budget cannot hold, named.
    """
    # what the first i documents cost, rising
    cost = corpus.offsets.numpy() * row_bytes + np.arange(len(corpus) + 1) * document_bytes
    found, a = [], 0
    while a < len(corpus):
        b = int(cost.searchsorted(cost[a] + budget, "right")) - 1
        if b == a:
            number = int(corpus.documents[a]) if isinstance(corpus, Subset) else a
            raise ValueError(
                f"memory must hold the largest document: document {number} has "
                f"{int(corpus.offsets[a + 1] - corpus.offsets[a])} tokens and needs {cost[a + 1] - cost[a]} bytes of "
                f"the {budget} that are left"
            )
        found.append((a, b))
        a = b
    return found
