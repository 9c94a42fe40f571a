"""Exact top-k over a corpus of any size, in chunks: the next chunk is copied while this one is scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latemax._progress import Bar
from latemax.api import Weights, maxsim, rerank
from latemax.arguments import arrays, check, ragged
from latemax.quantized import QuantizedTokens
from latemax.search import bounded
from latemax.search import corpus as corpora
from latemax.search.margin import margin_of
from latemax.search.merge import TopK
from latemax.search.scan import SCORE_BYTES, Scan, is_one
from latemax.search.spaces import unwrapped

Within = Tensor | np.ndarray | Sequence[int] | Sequence[str] | None


def topk(
    q: Any,
    corpus: Any,
    k: int,
    q_mask: Any = None,
    *,
    d_mask: Tensor | np.ndarray | None = None,
    within: Within = None,
    normalize: bool = False,
    empty_score: float = -math.inf,
    return_argmax: bool = False,
    q_weights: Weights = None,
    reduce: str = "sum",
    memory: int = 1 << 30,
    device: torch.device | str | None = None,
    progress: bool = False,
    codes: Any = "auto",
    backend: str = "auto",
) -> TopK:
    """The k documents of a corpus that score highest for every query: exactly what `maxsim` on all of them would rank.

    The corpus is scored in chunks; the k best so far stay on the device. A store is read from the disk, and a corpus in
    host memory is copied to a GPU, while the chunk before is scored. No gradients.

    Order: scores falling; equal scores by rising index; NaN after everything, −inf too (a document with a NaN token
    must not lead the list). A document without a valid token scores ``empty_score``.

    Args:
        q: query tokens [l_q, dim], [n_q, l_q, dim], a list of n_q tensors [l_i, dim], or a jagged nested tensor; or
            what an encoder returned (`TextTokens`, `PatchTokens`), whose model and space must be the store's. Of a
            corpus of codes it may be QuantizedTokens of their kind, or a list of them.
        corpus: [n_d, l_d, dim]; a list of [l_i, dim]; a jagged nested tensor; (tokens [t_d, dim], offsets [n_d + 1]);
            or a `PatchStore`. On the CPU, or where the scoring runs. Arrays and QuantizedTokens as in `maxsim`.
        k: how many, 1 <= k <= n_d, as in torch.topk.
        q_mask: as in `maxsim`. d_mask: [n_d, l_d], with a dense corpus only.
        within: the documents to rank, which alone are read: indices (an int64 tensor or array), a mask (a bool tensor
            or array [n_d]), or ids (a list or tuple, of a store). A document named twice counts once; None ranks all.
        normalize, empty_score, q_weights, reduce, backend: as in `maxsim`.
        return_argmax: also find which token of its document each query token's maximum is, for the k best only.
        memory: bytes that chunks of tokens, their scores and what sorts them may take together, on the host and on the
            device each. Queries, results and corpora that are in memory already are not counted.
        device: where to score; None is where q is. q goes there too.
        progress: a bar on stderr.
        codes: "auto" uses the codes of a store that has them: they say which documents cannot be among the k best, and
            only the others are read. The scores and indices are the same, bit for bit in our own kernels; `TopK.stats`
            says how much was read. "off" reads every document. QuantizedTokens of kind "int8" are the codes of a corpus
            in memory, in a form of a corpus with the same lengths, on the CPU or where the scoring runs; `quantize`
            makes them, without a mask, and nothing checks that they are of these tokens.

    Returns:
        TopK(scores [n_q, k] float32 (float64 if the promoted dtype is), indices [n_q, k] int64), on the device; [k]
        each for q [l_q, dim]. Indices are the corpus's, also with ``within``. With return_argmax its attribute
        ``argmax`` is int32 [n_q, k, l_q] ([k, l_q]); of a list of queries, -1 after the end of shorter ones.

    Raises:
        TypeError, ValueError: as `maxsim`; k above the number of documents; a document of ``within`` that is not
            there, or one that ``memory`` cannot hold, named; encoded tokens of another model or space than the store's.

    Example:
        >>> store = PatchStore("pages")
        >>> scores, indices = latemax.topk(query_tokens, store, 10)
        >>> found = latemax.topk(query_tokens, store, 3, within=["page-1", "page-2", "page-7"], return_argmax=True)
    """
    empty_score = check.check_options(
        normalize=normalize, empty_score=empty_score, return_argmax=return_argmax, backend=backend, reduce=reduce
    )
    given = not isinstance(codes, str)
    if not given and codes not in ("auto", "off"):
        raise ValueError(f"codes must be 'auto', 'off' or QuantizedTokens, got {codes!r}")
    check.check_positive("k", k)
    check.check_positive("memory", memory)
    q, q_mask = unwrapped(q, q_mask, corpus)
    found = corpora.of(corpus, d_mask)
    if given:
        found.codes = bounded.codes_of(codes, found)
    documents = corpora.chosen(within, found)
    corpora.at_most(k, found, documents)
    q, q_mask, q_weights = on_device(q, q_mask, q_weights, device)
    one = q[0] if isinstance(q, (list, tuple)) else q
    one_query = is_one(q)
    n_q = 1 if one_query else len(q)
    for name, place in (("corpus", found), ("codes", found.codes)):
        if place is not None and place.device.type != "cpu" and place.device != one.device:
            raise ValueError(f"{name} must be on the CPU or where q is scored, {one.device}; got {place.device}")
    if one.shape[-1] != found.dim:
        raise ValueError(f"q and corpus must have the same dim; got {one.shape[-1]} and {found.dim}")

    searched = found if documents is None else corpora.Subset(found, documents)
    merging = 2 * n_q * k * SCORE_BYTES
    if memory <= merging:
        raise ValueError(f"memory must hold the {k} best of {n_q} queries, {merging} bytes; got {memory}")
    options = dict(normalize=normalize, empty_score=empty_score, q_weights=q_weights, reduce=reduce, backend=backend)
    scan, stats = Scan(q, q_mask, k, memory - merging, options), None
    bar = Bar(len(searched), "searching ") if progress else None
    with torch.no_grad():
        runs = scan.runs(searched)
        # codes against numbers are refused by the scan
        numbers = not isinstance(one, QuantizedTokens)
        if numbers and (given or codes == "auto") and bounded.fits(scan, searched):
            scan.check(searched)
            margin = margin_of(q, q_mask, q_weights, d_dtype=found.dtype, normalize=normalize, reduce=reduce)
            if margin.usable:
                stats = bounded.Search(scan, searched, margin, options, bar).run()
        if stats is None:
            for (a, b), scores in scan.chunks(searched, runs):
                scan.keep(scores, torch.arange(a, b, device="cpu"))
                if bar is not None:
                    bar.tick(b - a)
        kept = scan.kept
        assert kept is not None
        if documents is not None:
            kept = TopK(kept.scores, documents.to(kept.indices.device)[kept.indices])
        kept.stats = stats
        if return_argmax:
            one_q = (q[None], None if q_mask is None else q_mask[None]) if one_query else (q, q_mask)
            kept.argmax = _argmax(*one_q, found, kept.indices, memory - merging, normalize, backend)
    return kept.row(0) if one_query else kept


def _argmax(
    q: Any, q_mask: Any, found: corpora.Corpus, indices: Tensor, memory: int, normalize: bool, backend: str
) -> Tensor:
    """int32 [n_q, k, l_q] of documents [n_q, k], which are scored once more."""
    device = indices.device
    options = dict(normalize=normalize, return_argmax=True, backend=backend)
    if isinstance(found, corpora.Dense) and found.mask is not None:
        # the other ways know no mask of documents; a query at a time, as its k documents are copied
        longest = ragged.longest(q) if ragged.is_ragged(q) else q.shape[1]
        result = torch.full((*indices.shape, longest), -1, dtype=torch.int32, device=device)
        for i, row in enumerate(indices.to(found.device)):
            _, argmax = maxsim(
                q[i],
                found.d[row].to(device),
                None if q_mask is None else q_mask[i],
                found.mask[row].to(device),
                **options,
            )
            result[i, :, : argmax.shape[-1]] = argmax
        return result
    result = None
    for tokens, offsets, local in found.pieces(indices.to(found.device), memory):
        local = local.to(device)
        _, argmax = rerank(q, tokens.to(device), offsets.to(device), local, q_mask, **options)
        result = argmax if result is None else torch.where((local >= 0).unsqueeze(-1), argmax, result)
    assert result is not None
    return result


def on_device(q: Any, q_mask: Any, q_weights: Any, device: torch.device | str | None) -> tuple[Any, Any, Any]:
    """q, which is checked, its mask and its weights, on the device that scores."""
    q, q_mask = arrays.as_tensors("q", q), arrays.as_tensors("q_mask", q_mask)
    q_weights = arrays.as_tensors("q_weights", q_weights)
    if isinstance(q, QuantizedTokens):
        if len(q.shape) not in (2, 3):
            raise ValueError(f"q must be [l_q, dim] or [n_q, l_q, dim], got shape {list(q.shape)}")
    elif not ragged.is_ragged(q):
        check.check_tokens("q", q, (2, 3), "[l_q, dim] or [n_q, l_q, dim]")
    elif isinstance(q, (list, tuple)):
        if not len(q):
            raise ValueError("q must hold at least one query, got an empty list")
        for i, item in enumerate(q):
            if isinstance(item, QuantizedTokens):
                corpora.check_codes(f"q[{i}]", item, 2, "[l_i, dim]")
            else:
                check.check_tokens(f"q[{i}]", item, (2,), "[l_i, dim]")
    if device is None:
        return q, q_mask, q_weights

    def move(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [None if item is None else item.to(device) for item in x]
        return x if x is None else x.to(device)

    return move(q), move(q_mask), move(q_weights)
