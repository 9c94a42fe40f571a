"""The pictures of the demo, one PNG each."""

from __future__ import annotations

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
from latemax.viz._style import INK, MUTED, as_uint8, percent, style

DPI = 130
# These photos are shown if they are installed; the worst-ranked crop is always shown too.
SHOWN = ("astronaut", "coffee", "motorcycle")


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


class Album:
    """Saves figures to a folder and keeps their names in ``files``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[str] = []

    def save(self, name: str, figure: tuple[Any, Any]) -> None:
        """Writes ``figure``, a (fig, axes) pair, as PNG ``name`` and closes it."""
        import matplotlib.pyplot as plt

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
            title=f"The right photo ranks {int(rank[at])} of {len(photos)}; {percent(hit)} of the crop's patches "
            f"have their best match inside the frame (chance {percent(chance)})",
        )
        album.save(f"ranking-{number}-{photos[crop.owner].name}.png", figure)

    at = chosen_queries(crops, photos, rank)[0]
    crop = crops[at]
    grounding = grounding_map(encoded.q[at], encoded.d[crop.owner], encoded.grid, normalize=True)
    best = viz.plot_grounding(
        photos[crop.owner].image.resize((PHOTO_SIZE, PHOTO_SIZE)),
        grounding,
        box=crop.pixels(PHOTO_SIZE),
        title=f"The score {float(grounding.score):.1f} comes from {int((grounding.wins() > 0).sum())} of "
        f"{grounding.wins().numel()} patches\n(frame: the place of the query crop)",
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
                name, found = photos[word].name, "CLS is the best match"
                if best >= 0:
                    y, x = divmod(best, cols)
                    corner = (x * side / cols, y * side / rows)
                    for width, color in ((4, "white"), (2, INK)):
                        box = plt.Rectangle(corner, side / cols, side / rows, fill=False, lw=width, ec=color)
                        ax.add_patch(box)
                    found = "frame: the best match"
                ax.set_title(f"{name}, CLS {how}")
                ax.set_xlabel(found, color=MUTED)
                ax.set_xticks([])
                ax.set_yticks([])
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
    """Draws ``cls-simulation.png``, eight panels."""

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
    album.save(
        "cls-simulation.png",
        viz.plot_simulation_panels(
            panels, titles=titles, title="Simulation: when does CLS hold the maximum, and what does it cost?"
        ),
    )
