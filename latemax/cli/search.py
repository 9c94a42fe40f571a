"""``latemax search``: the best images of a store for a text, an image or query tokens."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from latemax.cli.files import open_image
from latemax.cli.index import check_device
from latemax.cli.models import WITH_TEXT, load_model
from latemax.cli.terminal import printable
from latemax.search import TopK, topk
from latemax.store import PatchStore, StoreError

if TYPE_CHECKING:
    from PIL.Image import Image

# patches shown per result
PATCHES = 5


def search(
    store: str, *, text: str | None = None, image: str | None = None, tokens: str | None = None, k: int = 10,
    size: int | None = None, where: str | None = None, patches: bool = False, html: str | None = None,
    normalize: bool = False, memory_mib: int = 1024, device: str | None = None, verify: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Finds the k best documents of a store (all of them if it has fewer) for a text, an image or query tokens.

    Args:
        store: the store's folder.
        text: words, encoded with the model that the store was indexed with, which must have a text side.
        image: a file, or a page of a PDF (``report.pdf#page=3``), encoded with that model. One of ``text``, ``image``
            and ``tokens`` is given.
        tokens: a .npy, .safetensors (its only tensor, or the one called "tokens") or .pt file, [l_q, dim] or
            [n_q, l_q, dim].
        k: number of results.
        size: size of the query image in pixels; None takes that of the store's images.
        where: rank only documents for which this condition is true, as in ``PatchStore.where``.
        patches: also tell which patches of each result the score comes from.
        html: a file to write as one page that shows the same, `latemax.viz.search_page`; of one query only.
        normalize: L2-normalize all tokens before scoring.
        memory_mib: MiB of read buffers.
        device: device that scores; None is the CPU.
        verify: check every byte of the store first.

    Returns:
        ``{"store", "query", "documents", "results"}``, and ``"html"``, the file, with ``html``. ``results`` holds a
        list for every query: ``[{"rank", "id", "index", "score"}, …]``; a score that is not finite is None. With
        ``patches``, a result has ``"patches": [{"row", "column", "box", "part", "query_tokens"}, …]``, the largest part
        of the score first. ``box`` is the patch's place, (left, top, right, bottom) as fractions of the image, or None
        if the store does not say which part of the image the patches cover. In a document without a grid, all patches
        are in row 0.

    Raises:
        OSError: ``html`` cannot be written.
        StoreError: the store is damaged, does not say which model made it, or holds tokens that no text shares a space
            with.
        ValueError: a text without a word; a wrong file, condition or device; several queries with ``html``.
    """
    check_device(device)
    if html is not None and not os.path.isdir(os.path.dirname(os.path.abspath(html))):
        raise FileNotFoundError(f"--html {html}: no such folder")
    pages = PatchStore(store)
    if verify:
        pages.verify()
    within = None if where is None else pages.where(where)
    query = _query(pages, text, image, tokens, size, device)
    q = query.tokens.unsqueeze(0) if query.tokens.dim() == 2 else query.tokens
    if html is not None and len(q) != 1:
        raise ValueError(f"--html shows one query, {query.name} holds {len(q)}")
    k = min(k, len(pages) if within is None else len(within))
    if k:
        found = topk(
            q, pages, k, within=within, normalize=normalize, memory=memory_mib << 20, device=device, progress=True,
            return_argmax=html is not None,
        )  # fmt: skip
    else:
        none = torch.empty(len(q), 0)
        found = TopK(none, none.long(), torch.empty(*q.shape[:1], 0, q.shape[1], dtype=torch.int32))
    result: dict[str, Any] = {"store": store, "query": query.name, "documents": len(pages)}
    if html is not None:
        _write_page(html, pages, query, q[0], found.row(0), normalize)
        result["html"] = html
    results = [
        [
            {"rank": rank, "id": pages.ids[i], "index": i, "score": score if math.isfinite(score) else None}
            for rank, (score, i) in enumerate(zip(scores, indices, strict=True), 1)
        ]
        for scores, indices in zip(found.scores.tolist(), found.indices.tolist(), strict=True)
    ]
    if patches:
        for query, rows in zip(q, results, strict=True):
            for row in rows:
                row["patches"] = best_patches(query, pages, row["index"], normalize)
    return {**result, "results": results}


def best_patches(q: Tensor, pages: PatchStore, i: int, normalize: bool) -> list[dict[str, Any]]:
    """Returns the patches of document i that the score of query q [l_q, dim] comes from, largest part first."""
    from latemax.analysis import grounding_map

    tokens = pages.floats(i)
    if not len(tokens):
        return []
    rows, columns = pages.grid(i) or (1, len(tokens))
    grounding = grounding_map(q.cpu(), tokens, (rows, columns), normalize=normalize)
    regions = pages.regions(i)
    part, wins = grounding.total().flatten(), grounding.wins().flatten()
    order = part.masked_fill(wins == 0, -math.inf).argsort(descending=True, stable=True)
    crop = pages.document_meta(i).get("crop")
    found = []
    for at in order[: int((wins > 0).sum())].tolist():
        row, column = divmod(at, columns)
        box = None
        if regions is not None:
            box = None if regions[at].isnan().any() else [round(x, 6) for x in regions[at].tolist()]
        elif crop is not None and pages.grid(i) is not None:
            left, top, right, bottom = crop
            width, height = (right - left) / columns, (bottom - top) / rows
            x, y = left + column * width, top + row * height
            box = [x, y, x + width, y + height]
        found.append({"row": row, "column": column, "box": box, "part": float(part[at]), "query_tokens": int(wins[at])})
    return found


class Query(NamedTuple):
    """What is searched for.

    Attributes:
        name: as it was given.
        tokens: [l_q, dim] or [n_q, l_q, dim].
        image: the image that the tokens were made of, or None.
        words: of a text, else None. word_of: the word of each token, -1 for none.
    """

    name: str
    tokens: Tensor
    image: Image | None = None
    words: list[str] | None = None
    word_of: Tensor | None = None


def _query(
    pages: PatchStore, text: str | None, image: str | None, tokens: str | None, size: int | None, device: str | None
) -> Query:
    if tokens is not None:
        return Query(tokens, load_tokens(tokens))
    option = "--text" if text is not None else "--image"
    if text is not None and not text.strip():
        raise ValueError(f"--text must have a word, got {text!r}")
    if text is None and image is None:
        raise ValueError("search needs a text, an image or query tokens")
    if "model" not in pages.meta:
        raise StoreError(f"{pages.path} does not say which model made it: pass --tokens instead of {option}")
    # before spaces were recorded, tokens were patches
    name, adapter = pages.meta["model"], pages.meta.get("adapter")
    space = pages.meta.get("space", "patches" if adapter is None else None)
    if text is not None and space not in WITH_TEXT:
        raise StoreError(
            f"{pages.path} holds tokens of the space {space or 'patches'!r} of {name}, and --text makes tokens of the "
            f"space 'text' or 'retrieval': index it with a model that has a text side (CLIP, SigLIP, ColPali, …)"
        )
    # before the model is loaded: a wrong name ends the call at once
    picture = None if image is None else open_image(image)
    model = load_model(name, adapter, space, device)
    if text is None:
        (found,) = model.images([picture], pages.meta.get("size") if size is None else size)
        return Query(str(image), found.tokens, picture)
    words = model.text(text)
    mask = words.mask[0]
    return Query(text, words.tokens[0][mask], None, words.words[0], words.word_of[0][mask])


def _write_page(path: str, pages: PatchStore, query: Query, q: Tensor, found: TopK, normalize: bool) -> None:
    from latemax.viz import search_page

    text = search_page(
        q, found, pages, query=query.name, words=query.words, word_of=query.word_of, normalize=normalize,
        query_image=query.image,
    )  # fmt: skip
    # as a whole or not at all
    scratch = f"{path}.{os.getpid()}"
    try:
        Path(scratch).write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def load_tokens(path: str) -> Tensor:
    """Reads query tokens, [l_q, dim] or [n_q, l_q, dim], from a .npy, .safetensors or .pt file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or other content.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    suffix = Path(path).suffix
    if suffix == ".npy":
        import numpy as np

        found = torch.from_numpy(np.load(path, allow_pickle=False))
    elif suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        if "tokens" not in tensors and len(tensors) != 1:
            raise ValueError(
                f'{path} must hold one tensor, or one called "tokens"; it has {", ".join(sorted(tensors))}'
            )
        found = tensors.get("tokens", next(iter(tensors.values())))
    elif suffix == ".pt":
        found = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"{path} must be a .npy, .safetensors or .pt file")
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        came = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{path} must hold tokens [l_q, dim] or [n_q, l_q, dim], got {came}")
    if not found.is_floating_point():
        raise ValueError(f"{path} must hold floats, got {found.dtype}")
    return found


def render(result: dict[str, Any]) -> str:
    """Formats what `search` returned as the text of ``latemax search``."""
    lines = []
    for number, rows in enumerate(result["results"], 1):
        if len(result["results"]) > 1:
            lines.append(f"query {number}")
        if not rows:
            lines.append("no document")
        for row in rows:
            score = "      none" if row["score"] is None else f"{row['score']:10.4f}"
            lines.append(f"{row['rank']:4}  {score}  {printable(str(row['id']))}")
            if row.get("patches"):
                best = (f"({p['row']}, {p['column']}) {p['part']:.2f}" for p in row["patches"][:PATCHES])
                lines.append(f"{'':18}from {len(row['patches'])} patches (row, column): {', '.join(best)}")
    if "html" in result:
        lines.append(f"{printable(result['html'])} shows them")
    return "\n".join(lines)
