"""The pictures of the demo, one PNG each."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latemax import viz
from latemax.analysis import ArgmaxShare, SimilarityDistribution, TokenNorms, grounding_map
from latemax.demo.photos import Crop, Photo
from latemax.demo.retrieval import CROP_SIZE, PHOTO_SIZE, Encoded
from latemax.demo.words import Canvases, Words, shown_words
from latemax.viz._style import COLORS, INK, MUTED, as_uint8, percent, style

DPI = 130
# These photos are shown if they are installed; the worst-ranked crop is always shown too.
SHOWN = ("astronaut", "coffee", "motorcycle")
# a miss is said in this colour
MISS = "#B3261E"
# panels of the simulation in the first picture: what makes CLS the argmax, and what it costs
MAIN_PANELS = ("alignment", "norm_ratio", "pointing", "retrieval")
# beginning of a picture's name -> what is asked, what is shown, what to look at
NOTES = {
    "words": (
        "Where is the word on this canvas of four photo crops?",
        "Canvases that were not trained on (the photos were). The more orange a patch, the closer it is to the word.",
        "whether the frame, the best patch, is inside the photo of the word.",
    ),
    "ranking-": (
        "Which photo was this crop cut from?",
        "The best photos by MaxSim, frozen DINOv2 without any training. Below them, each patch of the crop has a "
        "colour, and its best match in each photo has the same.",
        "whether the right photo (green) is first, and its colours are inside the frame in the order of the crop.",
    ),
    "grounding": (
        "Which patches of the right photo does the crop's score come from?",
        "Orange patches are the best match of at least one patch of the crop.",
        "whether they are inside the frame, where the crop was cut. Those outside are wrong matches.",
    ),
    "cls-win-rate": (
        "If the CLS token is kept, how often is it the best match of a query token?",
        "One row per kind of query. Bar: from chance (1 / number of tokens) to the measured share (dot).",
        "dots to the right of the black line: there CLS takes more than its share.",
    ),
    "cls-distribution": (
        "How similar are query patches to CLS, to patches, and to their best match?",
        "Histograms of all similarities of the crops with their own photo, each with its own height.",
        "the distance of CLS from the best match: it is about as similar as an average patch, so rarely the maximum.",
    ),
    "token-norms": (
        "Does this ViT have patches of unusually large norm, which could win raw dot products?",
        "Histogram: norms of all patches. Ticks: each CLS token, and each flagged patch, whose norm is above its own "
        "photo's median + 10 MAD (MAD: median absolute deviation).",
        "the largest norm, in the title. Registers are needed where it is many times the median.",
    ),
    "token-norm-maps": (
        "Where are the patches of large norm?",
        "Photos above, norms of their patches below. Orange outline: a flagged patch, whose norm is above its own "
        "photo's median + 10 MAD (MAD: median absolute deviation).",
        "where the outlines are. On empty background they would be the known artefact of large ViTs.",
    ),
    "cls-simulation": (
        "When does CLS become the best match, and what does that cost?",
        "Simulated images and queries, no ViT. Lines are means of the trials, bands the smallest to the largest.",
        "how far a line is above chance (dashed); in the panels on dropping CLS, how far kept is below dropped.",
    ),
}


def chosen_queries(crops: list[Crop], photos: list[Photo], rank: Tensor) -> list[int]:
    """Returns the first crop of each photo in `SHOWN`, then the crop whose own photo ranked worst.

    Args:
        crops: the queries.
        photos: the documents.
        rank: int [n_q], the rank of each query's own photo; 1 is best.
    """
    first: dict[str, int] = {}
    for at, crop in enumerate(crops):
        first.setdefault(photos[crop.owner].name, at)
    picked = [first[name] for name in SHOWN if name in first]
    worst = int(rank.argmax())
    return picked if worst in picked else [*picked, worst]


def note_of(name: str) -> tuple[str, str, str]:
    """Returns what picture ``name`` asks, what it shows, and what to look at."""
    # the longest beginning: "token-norm-maps" is no "token-norms"
    return NOTES[max((start for start in NOTES if name.startswith(start)), key=len)]


class Album:
    """Saves figures to a folder and keeps their names in ``files``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[str] = []

    def save(self, name: str, figure: tuple[Any, Any]) -> None:
        """Writes ``figure``, a (fig, axes) pair, as PNG ``name`` with its note, and closes it."""
        import matplotlib.pyplot as plt

        # 13 characters of this size fill an inch
        width = int(13 * figure[0].get_figwidth())
        lines = zip(("Asked", "Shown", "Look at"), note_of(name), strict=True)
        note = "\n".join(textwrap.fill(f"{label}: {text}", width, subsequent_indent="    ") for label, text in lines)
        figure[0].set_figheight(figure[0].get_figheight() + 0.19 * (note.count("\n") + 1) + 0.1)
        figure[0].supxlabel(note, x=0.01, ha="left", fontsize=9.5, color=MUTED, linespacing=1.35)
        figure[0].savefig(self.folder / name, dpi=DPI, facecolor="white")
        plt.close(figure[0])
        self.files.append(name)


def draw_rankings(
    album: Album,
    photos: list[Photo],
    crops: list[Crop],
    encoded: Encoded,
    scores: Tensor,
    argmax: Tensor,
    rank: Tensor,
    pointing: dict[str, Any],
    shown: int = 4,
) -> None:
    """Draws ``ranking-N-NAME.png`` for the chosen queries and ``grounding.png`` for the first of them.

    Args:
        album: where the pictures go.
        photos: the documents.
        crops: the queries.
        encoded: their tokens.
        scores: [n_q, n_d].
        argmax: int [n_q, n_d, l_q].
        rank: int [n_q], the rank of each query's own photo.
        pointing: result of `latemax.demo.retrieval.pointing`.
        shown: photos per ranking.
    """
    for number, at in enumerate(chosen_queries(crops, photos, rank), 1):
        crop = crops[at]
        order = scores[at].argsort(descending=True, stable=True)[:shown]
        if crop.owner not in order:
            order = torch.cat([order[:-1], torch.tensor([crop.owner])])
        where = order.tolist().index(crop.owner)
        hit, chance = pointing["in_box_per_query"][at], pointing["in_box_chance_per_query"][at]
        figure = viz.plot_ranking(
            crop.image.resize((CROP_SIZE, CROP_SIZE)),
            encoded.q_grid,
            [photos[i].image.resize((PHOTO_SIZE, PHOTO_SIZE)) for i in order.tolist()],
            [photos[i].name for i in order.tolist()],
            scores[at][order].tolist(),
            argmax[at][order],
            encoded.grid,
            own=where,
            box=crop.pixels(PHOTO_SIZE),
            ranks=[int((scores[at] > scores[at][i]).sum()) + 1 for i in order.tolist()],
        )
        figure[0].suptitle(
            f"{'Hit' if rank[at] == 1 else 'Miss'}: the right photo ranks {int(rank[at])} of {len(photos)}.\n"
            f"{percent(hit)} of the crop's patches have their best match inside the frame (chance {percent(chance)})",
            x=0.01, ha="left", fontweight="bold", fontsize=12, color=INK if rank[at] == 1 else MISS,
        )  # fmt: skip
        album.save(f"ranking-{number}-{photos[crop.owner].name}.png", figure)

    at = chosen_queries(crops, photos, rank)[0]
    crop = crops[at]
    grounding = grounding_map(encoded.q[at], encoded.d[crop.owner], encoded.grid, normalize=True)
    best = viz.plot_grounding(
        photos[crop.owner].image.resize((PHOTO_SIZE, PHOTO_SIZE)),
        grounding,
        box=crop.pixels(PHOTO_SIZE),
        title=f"The score {float(grounding.score):.1f} comes from {int((grounding.wins() > 0).sum())} of the "
        f"{grounding.wins().numel()} patches",
    )
    album.save("grounding.png", best)


def draw_words(album: Album, photos: list[Photo], trained: dict[str, Words], canvases: Canvases) -> None:
    """Draws ``words.png``: each shown word on the first held-out canvas with its photo, CLS dropped and kept."""
    shown = shown_words(photos).tolist()
    rows, cols = canvases.grid
    side = canvases.images[0].width
    with style() as plt:
        figure, axes = plt.subplots(
            len(trained),
            len(shown),
            figsize=(2.9 * len(shown), 3.2 * len(trained)),
            layout="constrained",
            squeeze=False,
        )
        figure.get_layout_engine().set(h_pad=0.12)
        for row, how in enumerate(sorted(trained)):
            words, first = trained[how], canvases.prefix if how == "kept" else 0
            for ax, word in zip(axes[row], shown, strict=True):
                # the first canvas that shows it; in a tiny run there may be none
                at = int((canvases.photos == word).any(1).long().argmax())
                tokens = words.project(canvases.tokens[at, canvases.prefix - first :])
                similarity = tokens @ words.text(torch.tensor(word))
                heat, best = similarity[first:].view(rows, cols), int(similarity.argmax()) - first
                strength = ((heat - heat.min()) / (heat.max() - heat.min()).clamp_min(1e-6)) ** 2
                # grey, so that the colour is the word's
                ax.imshow(as_uint8(canvases.images[at].convert("L")), extent=(0, side, side, 0))
                ax.imshow(
                    torch.cat(
                        [torch.tensor([0.84, 0.37, 0]).expand(rows, cols, 3), 0.8 * strength[..., None]], -1
                    ).numpy(),
                    extent=(0, side, side, 0),
                    interpolation="nearest",
                )
                name, found, right = photos[word].name, "miss: CLS is the best match, no place", False
                if best >= 0:
                    y, x = divmod(best, cols)
                    corner = (x * side / cols, y * side / rows)
                    for width, color in ((4, "white"), (2, INK)):
                        box = plt.Rectangle(corner, side / cols, side / rows, fill=False, lw=width, ec=color)
                        ax.add_patch(box)
                    right = int(canvases.photos[at, y * 2 // rows * 2 + x * 2 // cols]) == word
                    found = "hit: the frame is on its photo" if right else "miss: the frame is on another photo"
                ax.set_title(f"“{name}”, CLS {how}")
                ax.set_xlabel(found, color=COLORS["registers"] if right else MISS)
                ax.set_xticks([])
                ax.set_yticks([])
        figure.suptitle("A word and the patch it finds", x=0.01, ha="left", fontweight="bold", fontsize=12)
        album.save("words.png", (figure, axes))


def draw_study(
    album: Album,
    photos: list[Photo],
    encoded: Encoded,
    shares: dict[str, ArgmaxShare],
    distribution: SimilarityDistribution,
    norms: TokenNorms,
) -> None:
    """Draws ``cls-win-rate.png``, ``cls-distribution.png``, ``token-norms.png`` and ``token-norm-maps.png``."""
    cosine, raw = (shares[f"{space}, right photo"]["CLS"] for space in ("cosine", "raw dot product"))
    album.save(
        "cls-win-rate.png",
        viz.plot_argmax_share(
            shares,
            title=f"CLS is the best match of {percent(cosine['share'])} of the query patches by cosine, "
            f"of {percent(raw['share'])} by raw dot product",
        ),
    )
    album.save("cls-distribution.png", viz.plot_similarity_distribution(distribution))
    album.save("token-norms.png", viz.plot_token_norms(norms))
    flagged = norms.outlier.sum(1)
    picked = flagged.argsort(descending=True, stable=True)[:6].sort().values
    subset = replace(
        norms,
        before={name: values[picked] for name, values in norms.before.items()},
        after=None,
        outlier=norms.outlier[picked],
        threshold=norms.threshold[picked],
    )
    album.save(
        "token-norm-maps.png",
        viz.plot_norm_maps(
            [photos[i].image.resize((PHOTO_SIZE, PHOTO_SIZE)) for i in picked.tolist()],
            subset,
            encoded.grid,
            title=f"{int(flagged.sum())} of {norms.outlier.numel():,} patches are flagged, "
            f"{int(flagged[picked].sum())} of them here; "
            f"the largest norm is {norms.largest_ratio:.1f}x its photo's median",
        ),
    )


def draw_simulation(album: Album, panels: dict[str, Any]) -> None:
    """Draws ``cls-simulation.png``, four panels, and ``cls-simulation-more.png``, the other four."""

    def best(panel: str) -> str:
        return percent(max(float(s.win_rate.mean(0).max()) for s in panels[panel].values()))

    def range_of(curve: Any) -> str:
        mean = curve.win_rate.mean(0)
        return f"{percent(float(mean[0]))} to {percent(float(mean[-1]))}"

    raw = panels["norm_ratio"]["raw, alignment 0"]
    titles = {
        "alignment": "The more queries point at the pooled image,\n"
        f"the more maxima CLS holds: up to {best('alignment')}",
        "absorbed": "CLS holds maxima only if it has absorbed nearly\n"
        f"the whole image: {range_of(panels['absorbed']['alignment 0.8'])} at alignment 0.8",
        "norm_ratio": f"A longer CLS wins raw dot products even\nunaligned: {range_of(raw)}; cosine ignores length",
        "noise": f"Some noise helps CLS, which averages it out:\nup to {best('noise')}; with much noise chance decides",
        "n_patches": "With more patches CLS holds fewer maxima; for\naligned queries far more than chance 1 / (n + 1)",
    }
    titles["shared"] = "The more the patches share, the more they\nresemble CLS and the fewer maxima it holds"
    pointing, retrieval = panels["pointing"], panels["retrieval"]
    for name, sim in (("pointing", pointing), ("retrieval", retrieval)):
        kept, dropped = (getattr(sim, f"{name}_{w}").mean(0) for w in ("kept", "dropped"))
        at = int((dropped - kept).abs().argmax())
        setting = "raw, unaligned" if name == "retrieval" else "by cosine"
        titles[name] = (
            f"Dropping CLS ({setting}): {name} {percent(float(kept[at]))} to {percent(float(dropped[at]))}\n"
            f"at {sim.knob.replace('_', ' ')} {float(sim.values[at]):g}"
        )
    for file, names, title in (
        ("cls-simulation.png", MAIN_PANELS, "Simulation: when does CLS hold the maximum, and what does it cost?"),
        ("cls-simulation-more.png", [n for n in panels if n not in MAIN_PANELS], "Simulation: the other knobs"),
    ):
        shown = {name: panels[name] for name in names}
        album.save(file, viz.plot_simulation_panels(shown, titles=titles, title=title))
