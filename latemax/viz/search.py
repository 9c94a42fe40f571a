"""One HTML page that shows which patch of each found page every word of the query comes from."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latemax.encoders.images import load_image
from latemax.encoders.records import picture_of
from latemax.encoders.tokens import TextTokens
from latemax.search import TopK
from latemax.store import PatchStore
from latemax.viz import _search_html as html

# A query without words has a chip for each token up to this number; above it, for the whole query only.
MAX_TOKENS = 64
Region = tuple[float, float, float, float]


class _Part(NamedTuple):
    """What a word, or the whole query, has to do with one document.

    Attributes:
        score: its share of the document's score; all words' shares sum to it.
        hits: the tokens of the document that are the argmax of its query tokens, each once.
        heat: [l_d]; of a word, the similarity of each token of the document, summed over the word's query tokens; of
            the whole query, what each token adds to the score.
    """

    score: float
    hits: list[int]
    heat: Tensor


def search_page(
    q: Tensor | TextTokens,
    found: TopK,
    store: PatchStore,
    *,
    query: str = "",
    about: str | None = None,
    words: Sequence[str] | None = None,
    word_of: Tensor | Sequence[int] | None = None,
    normalize: bool = False,
    images: Callable[[int], Any] | None = None,
    query_image: Any = None,
    pixels: int = 800,
) -> str:
    """Makes one self-contained HTML page of what ``topk`` found: hover or focus a word to see its patch on every page.

    Each word of the query is a button. It shows, on every result, the patches that are the argmax of the word's tokens
    (outlined) and the word's similarity with all patches (a heat map, on one scale for all results). Each result lists
    its score by word. The page needs no network; without JavaScript it still has pictures, ranks and scores by word.

    Args:
        q: [l_q, dim], the tokens of one query; or the `TextTokens` of one text, which know their words.
        found: its ranking, by ``topk(q, store, k, return_argmax=True)`` (``found.row(i)`` of several queries).
        store: where it was found. A document with a grid or regions shows its patches; a grid covers the part of the
            image that the metadata calls ``"crop"``, else all of it.
        query: text of the heading.
        about: the line under it; None says which store was searched.
        words: the query's words. None makes a word of each token of a query of up to 64, and none of a longer one.
        word_of: the word of each token, int [l_q], -1 for tokens of no word; None where each token is a word.
        normalize: as in the search: score by cosine.
        images: document number -> its image (Pillow image, path, array or tensor). None opens the file that
            ``latemax index`` recorded; a result whose file is gone or changed has no picture and says why.
        query_image: a picture of the query, shown next to the heading.
        pixels: longer side of the pictures. 800 makes about 100 KB a result.

    Returns:
        The page as text; write it as UTF-8.

    Raises:
        ImportError: Pillow is missing, or pypdfium2 and a result is a page of a PDF.
        TypeError: not a TopK or a PatchStore.
        ValueError: a ranking without argmax or of several queries, or words that do not fit the tokens.

    Example:
        >>> text = retriever.encode_queries(["total revenue"])
        >>> found = latemax.topk(text, store, 10, return_argmax=True)
        >>> page = latemax.viz.search_page(text, found, store, query="total revenue")
        >>> Path("out.html").write_text(page, encoding="utf-8")
    """
    if isinstance(q, TextTokens):
        if words is not None or word_of is not None:
            raise ValueError("words and word_of must be None with TextTokens, which know theirs")
        q, found, words, word_of = _of_text(q, found)
    argmax = _check(q, found, store, pixels)
    labels, word = _words(q, words, word_of)
    rows, heats = [], []
    for score, i, best in zip(found.scores.tolist(), found.indices.tolist(), argmax.cpu(), strict=True):
        # the empty slots of two_stage are the last ones
        if i < 0:
            break
        parts = _parts(q, store.floats(i), best.long(), word, len(labels), normalize)
        meta, grid, regions = store.document_meta(i), store.grid(i), store.regions(i)
        picture, size, reason = _picture(images, i, meta, pixels)
        crop = meta.get("crop")
        rows.append(
            html.Row(
                id=str(store.ids[i]),
                score=score,
                parts=[part.score for part in parts],
                hits=[part.hits for part in parts],
                grid=grid,
                crop=tuple(crop) if crop else (0.0, 0.0, 1.0, 1.0),
                whole_assumed=grid is not None and not crop,
                regions=None if regions is None else _rounded(regions),
                picture=picture,
                size=size,
                reason=reason,
            )
        )
        heats.append([part.heat for part in parts])
    scales = [_scale([heat[key] for heat in heats], zero=key == 0) for key in range(len(labels) + 1)]
    coded = [[_coded(heat, *scale) for heat, scale in zip(row, scales, strict=True)] for row in heats]
    shown = None if query_image is None else _jpeg(load_image(query_image, "query_image"), 200)[0]
    if about is None:
        about = f"{len(rows)} of {len(store):,} documents in {store.path}"
        model = store.model_id or store.meta.get("model")
        about += f", model {model}" if model else ""
    return html.page(query or "Search", about, labels, len(q), rows, coded, scales, shown)


def _of_text(q: TextTokens, found: TopK) -> tuple[Tensor, TopK, list[str], Tensor]:
    """Returns the tokens of one text without padding, their ranking, the words, and the word of each token."""
    if len(q.tokens) != 1:
        raise ValueError(f"q must be the tokens of one text, got those of {len(q.tokens)}")
    mask = q.mask[0]
    if isinstance(found, TopK) and found.indices.dim() == 2 and len(found.indices) == 1:
        found = found.row(0)
    if isinstance(found, TopK) and found.argmax is not None and found.argmax.shape[-1:] == mask.shape:
        found = TopK(found.scores, found.indices, found.argmax[..., mask.to(found.argmax.device)])
    return q.tokens[0][mask], found, q.words[0], q.word_of[0][mask.to(q.word_of.device)]


def _check(q: Tensor, found: TopK, store: PatchStore, pixels: int) -> Tensor:
    """Returns the argmax of a ranking that fits q and the store."""
    if not isinstance(found, TopK):
        raise TypeError(f"found must be a TopK, got {type(found).__name__}")
    if not isinstance(store, PatchStore):
        raise TypeError(f"store must be the PatchStore that was searched, got {type(store).__name__}")
    if not isinstance(q, Tensor) or q.dim() != 2:
        raise ValueError(f"q must be one query [l_q, dim], got {list(getattr(q, 'shape', []))}")
    if found.argmax is None:
        raise ValueError("found must have argmax: topk(..., return_argmax=True)")
    if found.indices.dim() != 1 or found.argmax.shape != (len(found.indices), len(q)):
        raise ValueError(
            f"found must be the ranking of this query, indices [k] and argmax [k, {len(q)}] (found.row(i)); "
            f"got {list(found.indices.shape)} and {list(found.argmax.shape)}"
        )
    if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 1:
        raise ValueError(f"pixels must be an int >= 1, got {pixels!r}")
    return found.argmax


def _words(q: Tensor, words: Sequence[str] | None, word_of: Tensor | Sequence[int] | None) -> tuple[list[str], Tensor]:
    """Returns the labels of words, and the word of each token, -1 for none."""
    if words is None:
        if word_of is not None:
            raise ValueError("word_of needs words")
        if len(q) > MAX_TOKENS:
            return [], torch.full((len(q),), -1)
        return [f"token {number}" for number in range(1, len(q) + 1)], torch.arange(len(q))
    if isinstance(words, str):
        raise TypeError("words must be a list of strings, got a string")
    labels = list(words)
    word = torch.arange(len(labels)) if word_of is None else torch.as_tensor(word_of).cpu().long()
    if word.shape != (len(q),):
        raise ValueError(f"word_of must name a word for each of {len(q)} tokens, got {list(word.shape)}")
    if len(word) and not (int(word.min()) >= -1 and int(word.max()) < len(labels)):
        raise ValueError(f"word_of must be -1 or a number of one of {len(labels)} words, got {word.tolist()}")
    if labels and (word < 0).any():
        word = torch.where(word < 0, len(labels), word)
        labels.append("other tokens")
    return labels, word


def _parts(q: Tensor, d: Tensor, best: Tensor, word: Tensor, n_words: int, normalize: bool) -> list[_Part]:
    """Returns the parts of the whole query and of each word, in this order."""
    q, d = q.detach().cpu().float(), d.float()
    if normalize:
        q, d = (torch.nn.functional.normalize(x, dim=-1) for x in (q, d))
    similarity = q @ d.T
    # masked query tokens and those of an empty document have no argmax
    scored = best >= 0
    added = torch.zeros(len(q))
    added[scored] = similarity[scored].gather(1, best[scored, None])[:, 0]
    whole = torch.zeros(len(d)).index_add(0, best[scored], added[scored])
    parts = [_Part(float(added.sum()), best[scored].unique().tolist(), whole)]
    for number in range(n_words):
        mine = scored & (word == number)
        parts.append(_Part(float(added[mine].sum()), best[mine].unique().tolist(), similarity[mine].sum(0)))
    return parts


def _scale(heats: list[Tensor], *, zero: bool) -> tuple[float, float]:
    """Returns the lowest (or 0) and the highest heat of all results, which the heat maps share."""
    values = torch.cat(heats) if heats else torch.empty(0)
    values = values[values.isfinite()]
    if not len(values):
        return 0.0, 0.0
    return 0.0 if zero else float(values.min()), float(values.max())


def _coded(heat: Tensor, low: float, high: float) -> str:
    """Returns heat as base64 of a byte per token, low = 0 and high = 255; what is not finite is 0."""
    level = (heat - low) / (high - low) if high > low else torch.zeros_like(heat)
    level = (255 * level).nan_to_num(0, 0, 0).clamp(0, 255).round().to(torch.uint8)
    return base64.b64encode(level.numpy().tobytes()).decode()


def _rounded(regions: Tensor) -> list[Region | None]:
    """Returns the place of each token on the image; None for a token that is not a patch."""
    return [None if any(map(math.isnan, row)) else tuple(round(x, 4) for x in row) for row in regions.tolist()]


def _picture(
    images: Callable[[int], Any] | None, i: int, meta: dict[str, Any], pixels: int
) -> tuple[str, tuple[int, int], str]:
    """Returns the picture of document i as a data URI with its size, or the reason why there is none."""
    if images is not None:
        return *_jpeg(load_image(images(i), f"images({i})"), pixels), ""
    try:
        image = picture_of(meta)
    except ImportError:
        raise
    # a damaged file can raise anything
    except Exception as error:
        gone = isinstance(error, FileNotFoundError)
        return "", (0, 0), "the file is gone" if gone else str(error) or type(error).__name__
    return *_jpeg(image, pixels), ""


def _jpeg(image: Any, pixels: int) -> tuple[str, tuple[int, int]]:
    image = image.copy()
    image.thumbnail((pixels, pixels))
    data = BytesIO()
    image.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode(), image.size
