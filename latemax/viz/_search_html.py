"""The HTML of ``search_page``: static text and pictures, to which ``search_page.js`` adds the patches."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import unicodedata
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

WHOLE = "whole query"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src '{digest}'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<a class="skip" href="#results">Skip to the results</a>
<header>
{query_image}<div><h1>{heading}</h1>
<p>{about}</p></div>
</header>
<section class="query" aria-label="The query">
<div class="words" role="group" aria-label="Words of the query: each shows its patches on the results">
{chips}
</div>
<p class="legend">{legend}</p>
<p id="status" class="hidden" role="status"></p>
</section>
<main id="results" tabindex="-1">
{results}
</main>
<script type="application/json" id="data">{data}</script>
<script>{js}</script>
</body>
</html>
"""


class Row(NamedTuple):
    """One result.

    Attributes:
        id: of the document. score: as ranked.
        parts: of the score: of the whole query, then of each word. hits: the argmax tokens of each, likewise.
        grid: (rows, cols) of the tokens on ``crop``, or None.
        crop: (left, top, right, bottom) as fractions of the image. whole_assumed: the store does not say it.
        regions: the place of each token, as ``crop``, or None.
        picture: data URI, "" with its reason. size: (width, height) of the picture.
    """

    id: str
    score: float
    parts: list[float]
    hits: list[list[int]]
    grid: tuple[int, int] | None
    crop: tuple[float, ...]
    whole_assumed: bool
    regions: Sequence[tuple[float, ...] | None] | None
    picture: str
    size: tuple[int, int]
    reason: str


def page(
    title: str, about: str, words: Sequence[str], tokens: int, rows: Sequence[Row], heats: Sequence[Sequence[str]],
    scales: Sequence[tuple[float, float]], query_image: str | None,
) -> str:  # fmt: skip
    """Returns the page.

    Args:
        title: the query.
        about: a line about the store.
        words: labels of the words.
        tokens: number of query tokens.
        rows: the results, best first.
        heats: of each result, base64 of a byte per token for the whole query and for each word.
        scales: lowest and highest heat of the whole query and of each word.
        query_image: data URI of a picture of the query.
    """
    # the reader of a page without words has to know why
    legend = "" if words else f"The query has {tokens} tokens and no words: the patches of the whole query are shown. "
    if any(row.whole_assumed and row.picture for row in rows):
        legend += "The store does not say which part of a picture the patches cover: all of it is assumed. "
    legend += "Outlined: the best patch of each token. "
    legend += '<span class="nowrap">Heat: <span class="ramp" aria-hidden="true"></span> <span id="scale"></span></span>'
    top = max((part for row in rows for part in row.parts[1:] if math.isfinite(part)), default=0)
    results = "\n".join(_result(rank, row, words, top) for rank, row in enumerate(rows, 1))
    data = {
        "labels": [WHOLE, *(f"“{_visible(word)}”" for word in words)],
        "scales": [[number(low), number(high)] for low, high in scales],
        "results": [_data(row, heat) for row, heat in zip(rows, heats, strict=True)],
    }
    js = _file("search_page.js")
    picture = f'<img src="{query_image}" alt="Picture of the query">\n' if query_image else ""
    return _PAGE.format(
        digest="sha256-" + base64.b64encode(hashlib.sha256(js.encode()).digest()).decode(),
        title=text(title),
        heading=f"<bdi>{text(title)}</bdi>",
        about=text(about),
        css=_file("search_page.css"),
        query_image=picture,
        chips="\n".join(_chip(key, word, words) for key, word in enumerate((WHOLE, *words))),
        legend=legend,
        results=f'<ol class="results">\n{results}\n</ol>' if rows else "<p>No document.</p>",
        # "<" could end the element
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        js=js,
    )


def text(value: str) -> str:
    """Escapes text for HTML.

    Controls and lone surrogates, which HTML cannot hold, and what reverses the text after it appear as in a Python
    string.
    """
    return escape(_visible(value))


def number(value: float) -> str:
    """Formats a score or a part of one."""
    if math.isfinite(value):
        return f"{value:.4f}".replace("-", "−")
    return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"


def _visible(value: str) -> str:
    def hides(c: str) -> bool:
        return unicodedata.category(c) in ("Cc", "Cs") or "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069"

    return "".join(c.encode("unicode_escape").decode() if hides(c) else c for c in value)


def _chip(key: int, word: str, words: Sequence[str]) -> str:
    which = f'<span class="hidden"> (word {key})</span>' if key and list(words).count(word) > 1 else ""
    pressed = "true" if key == 0 else "false"
    kind = "chip whole" if key == 0 else "chip"
    return f'<button type="button" class="{kind}" aria-pressed="{pressed}"><bdi>{text(word)}</bdi>{which}</button>'


def _result(rank: int, row: Row, words: Sequence[str], top: float) -> str:
    name = text(row.id)
    if row.picture:
        shown = (
            f'<img src="{row.picture}" width="{row.size[0]}" height="{row.size[1]}" loading="lazy" decoding="async" '
            f'alt="Picture of result {rank}">'
        )
    elif row.grid is None and row.regions is None:
        shown = ""
    else:
        rows, columns = row.grid or (4, 3)
        shown = f'<div class="none" style="aspect-ratio:{columns}/{rows}"></div>'
    notes = "" if row.picture else f"No picture: {text(row.reason)}. "
    if row.grid is None and row.regions is None:
        notes += "Stored without a grid: where its patches are is not known."
    return f"""<li class="result">
<h2><span class="rank">{rank}.</span> <bdi>{name}</bdi></h2>
<p class="score">score {number(row.score)}</p>
<figure>
<div class="picture">{shown}<canvas aria-hidden="true"></canvas><div class="hits" aria-hidden="true"></div></div>
<figcaption class="where"></figcaption>
</figure>
{f'<p class="note">{notes.strip()}</p>' if notes else ""}
{_table(rank, row, words, top)}
</li>"""


def _table(rank: int, row: Row, words: Sequence[str], top: float) -> str:
    if not words:
        return ""
    lines = []
    for word, part in zip(words, row.parts[1:], strict=True):
        share = part / top if top > 0 and math.isfinite(part) else 0
        bar = f'<span class="bar" style="width:{100 * min(max(share, 0), 1):.1f}%"></span>'
        lines.append(
            f'<tr><th scope="row"><bdi>{text(word)}</bdi></th><td class="bars" aria-hidden="true">{bar}</td>'
            f"<td>{number(part)}</td></tr>"
        )
    return (
        f'<details open><summary>Score by word<span class="hidden"> of result {rank}</span></summary>\n'
        f'<table>\n<thead class="hidden"><tr><th scope="col">word</th><th aria-hidden="true"></th>'
        f'<th scope="col">part of the score</th></tr></thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody>\n</table>\n'
        f"</details>"
    )


def _data(row: Row, heats: Sequence[str]) -> dict[str, Any]:
    place: dict[str, Any] = {}
    if row.grid is not None:
        place = {"grid": row.grid, "crop": [round(x, 5) for x in row.crop]}
    elif row.regions is not None:
        place = {"regions": row.regions}
    return {**place, "parts": [number(part) for part in row.parts], "hits": row.hits, "heat": heats if place else []}


def _file(name: str) -> str:
    return files("latemax.viz").joinpath(name).read_text(encoding="utf-8")
