"""The HTML of the demo: what its pictures and numbers say, and the page of a search by words."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from latemax import PatchStore, StoreWriter, topk, viz
from latemax.demo.photos import Photo
from latemax.demo.words import Canvases, Words, shown_words
from latemax.viz._style import percent

WORDS_PAGE = "words.html"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>latemax demo</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 70rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }}
img {{ max-width: 100%; height: auto; background: #fff; }}
figure {{ margin: 2rem 0; }}
td, th {{ padding: .15rem .8rem .15rem 0; text-align: start; font-weight: normal; }}
thead th, caption {{ font-weight: bold; text-align: start; }}
.wide {{ overflow-x: auto; }}
</style>
</head>
<body>
<main>
<h1>latemax demo</h1>
<p>Model: {model}.</p>
{words}
{crops}
{cls}
</main>
</body>
</html>
"""


def write_words(path: Path, words: Words, canvases: Canvases, photos: list[Photo], k: int = 12) -> None:
    """Writes the page of a search of the held-out canvases for the shown words, CLS dropped."""
    shown = shown_words(photos)
    q = words.text(shown)
    with tempfile.TemporaryDirectory() as folder:
        with StoreWriter(folder) as writer:
            tokens = words.project(canvases.tokens[:, canvases.prefix :])
            for i, (patches, which) in enumerate(zip(tokens, canvases.photos.tolist(), strict=True), 1):
                held = ", ".join(photos[at].name for at in which)
                writer.add(patches.contiguous(), f"canvas {i}: {held}", canvases.grid, {"crop": [0, 0, 1, 1]})
        store = PatchStore(folder)
        names = [photos[i].name for i in shown.tolist()]
        page = viz.search_page(
            q, topk(q, store, min(k, len(store)), return_argmax=True), store, query=" ".join(names), words=names,
            about=f"the best of {len(store)} canvases of photo crops that were not trained on",
            images=lambda i: canvases.images[i].resize((336, 336)),
        )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def index_page(result: dict[str, Any], pictures: Sequence[str]) -> str:
    """Returns the page that holds all pictures of the demo and the numbers of the words.

    Args:
        result: of `latemax.demo.run`.
        pictures: names of files next to the page.
    """
    crops = [name for name in pictures if name.startswith(("ranking-", "grounding"))]
    cls = [name for name in pictures if name not in crops and name != "words.png"]
    return _PAGE.format(
        model=escape(result["model"]), words=_words(result["words"]), crops=_crops(result, crops), cls=_cls(cls)
    )


def _crops(result: dict[str, Any], pictures: Sequence[str]) -> str:
    hits: dict[str, int] = {}
    for query in result["queries"]:
        hits[query["photo"]] = hits.get(query["photo"], 0) + (query["rank"] == 1)
    each = len(result["queries"]) // len(hits)
    lost = [escape(name) for name, found in hits.items() if not found]
    missed = ""
    if lost:
        missed = f"""
It misses all {each} crops of {", ".join(lost)}: where a crop shows little that marks its photo, others rank higher."""
    pointing = result["pointing"]
    return f"""<h2>Crops that find their photo</h2>
<p>{len(result["queries"])} crops of {len(hits)} photos as queries, no training: {sum(hits.values())} rank their photo
first (R@1 {sum(hits.values()) / len(result["queries"]):.3f}, chance {result["recall_at_1_chance"]:.3f}), and
{percent(pointing["in_box"])} of their patches have their best match where the crop was cut (chance
{percent(pointing["in_box_chance"])}). A frozen ViT of this size finds objects and textures.{missed}</p>
{chr(10).join(map(_figure, pictures))}"""


def _cls(pictures: Sequence[str]) -> str:
    first = [name for name in pictures if name in ("cls-win-rate.png", "cls-simulation.png")]
    more = [name for name in pictures if name not in first]
    return f"""<h2>Why CLS is dropped</h2>
{chr(10).join(map(_figure, first))}
<details><summary>{len(more)} more pictures: similarities, norms, other knobs of the simulation</summary>
{chr(10).join(map(_figure, more))}
</details>"""


def _words(numbers: dict[str, Any]) -> str:
    rows = []
    for how in numbers["trained"]:
        values = (numbers[name][how] for name in ("trained", "untrained"))
        cells = [percent(value["pointing"]) for value in values]
        cells += [percent(numbers["chance"][how]), percent(numbers["trained"][how]["cls"])]
        name = "CLS kept" if how == "kept" else "CLS dropped"
        rows.append(f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"""<h2>Words that find their patch</h2>
<p>One vector for the name of each of the {numbers["photos"]} photos and one projection of the frozen ViT's tokens were
trained through MaxSim in {numbers["steps"]} steps, on {numbers["train"]} canvases of four photo crops. The captions
name two of the four photos and never say where they are. The numbers are of {numbers["test"]} canvases of other crops
and compositions. Every photo was seen in training: the words know these photos, and no others.</p>
{_figure("words.png")}
<p><a href="{WORDS_PAGE}">Search these canvases by words</a>: hover or focus a word to see its patch.</p>
<div class="wide"><table>
<caption>Share of words whose best token is a patch of their photo</caption>
<thead><tr><th></th><th scope="col">trained</th><th scope="col">untrained</th><th scope="col">chance</th>
<th scope="col">best token is CLS</th></tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody>
</table></div>"""


def _figure(name: str) -> str:
    from latemax.demo.figures import note_of

    asked, shown, look = map(escape, note_of(name))
    # the picture says it too, but too small for a phone
    caption = f"<strong>{asked}</strong> {shown} Look at {look}"
    return f'<figure><img src="{name}" alt="{asked}"><figcaption>{caption}</figcaption></figure>'
