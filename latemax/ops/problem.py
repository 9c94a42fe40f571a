"""One call as data: its tensors (``Batch``), the facts that decide how it runs (``Problem``), what runs (``Plan``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latemax.arguments import arrays
from latemax.ops import tiles


def score_dtype(q: torch.dtype, d: torch.dtype) -> torch.dtype:
    """Sums and scores are float32, or float64 if the promoted dtype is."""
    return torch.float64 if torch.promote_types(q, d) == torch.float64 else torch.float32


def _promoted(q: torch.dtype, d: torch.dtype, q_codes: bool, d_codes: bool) -> torch.dtype:
    """The dtype of the products; float32 where they are the exact integers of codes."""
    return torch.float32 if q_codes else q if d_codes else torch.promote_types(q, d)


class Separate(NamedTuple):
    """Items that are separate in memory, with contiguous dims."""

    tokens: list[Any]  # [l_i, dim]: tensors, or numpy arrays
    masks: list[Tensor] | None  # bool [l_i], contiguous
    # int64 [n, 3] on the device: an address of tokens, of the mask or 0, and the row stride (maxsim_item)
    table: Tensor
    aligned: bool = False  # on a GPU: every row of tokens starts at a multiple of 16 bytes


class Codes(NamedTuple):
    """What turns tokens that are codes into numbers (``latemax.quantized``)."""

    kind: str  # "int8": tokens int8 [..., l, dim]; "binary": uint8 [..., l, ceil(dim / 8)], most significant bit first
    dim: int
    scale: Tensor  # float32, the leading shape of tokens, contiguous
    error: Tensor | None = None  # as scale: only maxsim_bounds reads it

    def each(self, function: Callable[[Tensor], Tensor]) -> Codes:
        """With every tensor of one number a token mapped."""
        error = None if self.error is None else function(self.error)
        return self._replace(scale=function(self.scale), error=error)


class Side(NamedTuple):
    """The queries, or the documents. What belongs to every token, or says where tokens are, is a field here."""

    tokens: Tensor  # [n, l, dim], own candidates [n_q, n, l, dim], or with offsets [t, dim]
    mask: Tensor | None = None  # bool, the leading shape of tokens
    offsets: Tensor | None = None  # int64 [n + 1] contiguous: ragged items, concatenated in tokens
    # ragged items that are not concatenated: tokens is NaN (codes: 0), expanded, and says only shape [t, dim], dtype
    # and device
    separate: Separate | None = None
    # [n, l] or with offsets [t], contiguous, in the dtype of the scores: factors of the maxima; queries only
    weights: Tensor | None = None
    codes: Codes | None = None  # tokens are codes

    @property
    def dim(self) -> int:
        return self.tokens.shape[-1] if self.codes is None else self.codes.dim

    @property
    def items(self) -> int:
        """How many queries, or documents that one query can name."""
        return self.tokens.shape[-3] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def length(self) -> int:
        """Tokens of an item; of all items where they are ragged."""
        return self.tokens.shape[-2]

    def joined(self) -> Side:
        """With separate items concatenated."""
        if self.separate is None:
            return self
        items, masks = self.separate.tokens, self.separate.masks
        mask = None if masks is None else torch.cat(masks)
        tokens = torch.cat(arrays.as_tensors("tokens", items))
        return Side(tokens, mask, self.offsets, weights=self.weights, codes=self.codes)

    def valid(self) -> Tensor:
        """How many tokens of every item the mask keeps, int64 [n].

        Offsets on a GPU are not checked: they are clamped to the tokens, as the kernels clamp them.
        """
        mask, offsets, length = self.mask, self.offsets, self.length
        if offsets is None:
            return self.tokens.new_full((self.items,), length, dtype=torch.int64) if mask is None else mask.sum(-1)
        ends = offsets.clamp(0, length)
        if mask is not None:
            ends = F.pad(mask.cumsum(0), (1, 0))[ends]
        return ends.diff().clamp_(min=0)


class Batch(NamedTuple):
    """The tensors and options of one call. Every backend is given the whole of it."""

    q: Side
    d: Side
    # int64 [n_q, k] contiguous document numbers, -1 for an empty slot; needs d.offsets
    candidates: Tensor | None = None
    normalize: bool = False
    empty_score: float = -math.inf
    # int64 [n] contiguous: row r of candidates and scores belongs to query query_ids[r]; needs candidates
    query_ids: Tensor | None = None
    longest: int = 0  # with query_ids and ragged queries: tokens of the longest, at least 1
    mean: bool = False  # scores are divided by the number of valid query tokens

    @property
    def own(self) -> bool:
        """Every query has its own documents."""
        return self.candidates is not None or self.d.tokens.dim() == 4

    def joined(self, *, documents: bool = True) -> Batch:
        """Without query numbers and separate items.

        Only the forward pass of the native CPU kernel takes them; that of Triton takes separate documents.
        ``documents``: concatenate these too.
        """
        if self.query_ids is not None:
            return _with_rows_of(self, self.query_ids).joined(documents=documents)
        if self.q.separate is None and self.d.separate is None:
            return self
        return self._replace(q=self.q.joined(), d=self.d.joined() if documents else self.d)

    @property
    def ragged(self) -> bool:
        return self.q.offsets is not None or self.d.offsets is not None

    @property
    def n_q(self) -> int:
        """Rows of the scores: the queries, or with query_ids the rows that name one."""
        return self.q.items if self.query_ids is None else self.query_ids.shape[0]

    @property
    def l_q(self) -> int:
        """Tokens of a query in argmax; of all queries where they are ragged and not numbered."""
        return self.q.length if self.q.offsets is None or self.query_ids is None else self.longest

    @property
    def n_d(self) -> int:
        """Documents that each query is scored against."""
        return self.d.items if self.candidates is None else self.candidates.shape[1]

    @property
    def dim(self) -> int:
        return self.q.dim

    @property
    def dtype(self) -> torch.dtype:
        """The promoted dtype of q and d, the precision of the products; that of q if only d is codes."""
        return _promoted(self.q.tokens.dtype, self.d.tokens.dtype, self.q.codes is not None, self.d.codes is not None)

    @property
    def score_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


# no document's number, in any corpus
NO_DOCUMENT = 1 << 62


def _with_rows_of(b: Batch, query_ids: Tensor) -> Batch:
    """Every row with a copy of its query's tokens; ragged queries are padded to the longest, and masked.

    A row that names no query gets candidates that are no documents: their score is NaN on a GPU and an error elsewhere.
    """
    q, candidates = b.q.joined(), b.candidates
    assert candidates is not None
    known = (query_ids >= 0) & (query_ids < b.q.items)
    candidates = torch.where(known.unsqueeze(1), candidates, NO_DOCUMENT)
    rows = torch.where(known, query_ids, 0)
    tokens, mask, weights, dtype, codes = q.tokens, q.mask, q.weights, q.tokens.dtype, q.codes
    if tokens.requires_grad and dtype.itemsize == 2:
        # the gradients of all rows of a query are added in float32
        tokens = tokens.float()
    if q.offsets is None:
        tokens, mask = tokens.index_select(0, rows), None if mask is None else mask.index_select(0, rows)
        weights = None if weights is None else weights.index_select(0, rows)
        codes = None if codes is None else codes.each(lambda x: x.index_select(0, rows))
    else:
        if not len(tokens):
            tokens, mask = F.pad(tokens, (0, 0, 0, 1)), None
            weights = None if weights is None else F.pad(weights, (0, 1))
            codes = None if codes is None else codes.each(lambda x: F.pad(x, (0, 1)))
        i = torch.arange(b.longest, device=rows.device)
        keep = i < q.offsets.diff().index_select(0, rows).unsqueeze(1)  # [n, longest]
        at = (q.offsets.index_select(0, rows).unsqueeze(1) + i).clamp(0, len(tokens) - 1)
        tokens, mask = tokens[at], keep if mask is None else keep & mask[at]
        weights = None if weights is None else weights[at]
        codes = None if codes is None else codes.each(lambda x: x[at])
    queries = Side(tokens.to(dtype), mask, weights=weights, codes=codes)
    return b._replace(q=queries, candidates=candidates, query_ids=None)


class Outputs(NamedTuple):
    scores: Tensor  # [n_q, n_d], contiguous
    # int32 [n_q, n_d, l_q], with q.offsets and no query_ids [n_d, t_q]; None where it is not wanted
    argmax: Tensor | None


class Needs(NamedTuple):
    """What needs a gradient."""

    q: bool
    d: bool
    weights: bool = False


class Gradients(NamedTuple):
    """In the shapes and dtypes of the tokens of q and d and of the weights; None for what needs none."""

    q: Tensor | None
    d: Tensor | None
    weights: Tensor | None = None


class Problem(NamedTuple):
    """All that the choice of backend and tile depends on. Hashable: lengths that no choice reads are left out."""

    device: torch.device
    q_dtype: torch.dtype
    d_dtype: torch.dtype
    matmul_precision: str
    dim: int
    n_q: int
    l_q: int  # of ragged queries the mean, rounded up
    q_ragged: bool
    own: bool  # every query has its own documents
    candidates: bool  # they are named by number and scored in place
    normalize: bool
    argmax: bool
    weighted: bool = False
    mean: bool = False
    q_codes: str = ""  # the kind of codes that tokens are
    d_codes: str = ""
    bounds: str = ""  # what is wanted instead of scores: "exact" bounds, or "coarse" ones, of which q may be rounded
    # tiles.length_class of the documents, ragged ones by their mean: not the length, so that few problems are known
    l_d: int = tiles.UNBOUNDED

    @property
    def dtype(self) -> torch.dtype:
        """As ``Batch.dtype``."""
        return _promoted(self.q_dtype, self.d_dtype, self.q_codes != "", self.d_codes != "")


class Plan(NamedTuple):
    """What runs and why. ``explain`` shows it, the backward pass reuses it."""

    backend: str  # the name of the backend's module
    why: str
    notes: tuple[str, ...] = ()  # why each other backend does not run
    launch: Any = None  # what the backend decided for itself: a tile, an instruction set


def problem_of(b: Batch, *, argmax: bool, bounds: str = "") -> Problem:
    q, d = b.q.tokens, b.d.tokens
    n_q, l_q, q_ragged = b.n_q, b.l_q, b.q.offsets is not None and b.query_ids is None
    if q_ragged:
        l_q = max(1, -(-l_q // max(1, n_q)))
    l_d = b.d.length if b.d.offsets is None else -(-b.d.length // max(1, b.d.items))
    return Problem(
        q.device, q.dtype, d.dtype, torch.get_float32_matmul_precision(), b.dim, n_q, l_q, q_ragged,
        b.own, b.candidates is not None, b.normalize, argmax, b.q.weights is not None, b.mean,
        "" if b.q.codes is None else b.q.codes.kind, "" if b.d.codes is None else b.d.codes.kind, bounds,
        tiles.length_class(l_d),
    )  # fmt: skip


def allocate(b: Batch, want_argmax: bool) -> Outputs:
    """Uninitialised outputs. The real operator and its fake both allocate here."""
    q, n_q, n_d = b.q.tokens, b.n_q, b.n_d
    scores = q.new_empty((n_q, n_d), dtype=b.score_dtype)
    if not want_argmax:
        return Outputs(scores, None)
    ragged = b.q.offsets is not None and b.query_ids is None
    shape = (n_d, b.l_q) if ragged else (n_q, n_d, b.l_q)
    return Outputs(scores, q.new_empty(shape, dtype=torch.int32))
