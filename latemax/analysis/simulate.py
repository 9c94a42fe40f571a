"""When is CLS the argmax? A small model of image and query tokens with a knob for each suspected cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latemax import maxsim

_UNIT_KNOBS = ("absorbed", "alignment", "shared")
KNOBS = (*_UNIT_KNOBS, "norm_ratio", "noise", "n_patches")


@dataclass(frozen=True)
class ClsSimulation:
    """The results of sweeping one knob with the others fixed.

    "Kept" and "dropped" refer to CLS among the document tokens.

    Attributes:
        knob: the knob.
        values: float64 [v], its values.
        win_rate: float64 [trials, v], the share of query tokens whose maximum on their own image is CLS, if kept.
        chance: float64 [v], of ``win_rate``.
        retrieval_kept: float64 [trials, v], the share of queries whose own image scores highest.
        retrieval_dropped: the same.
        retrieval_chance: chance of both.
        pointing_kept: float64 [trials, v], the share of query tokens whose argmax on their own image is a patch of the
            right object. CLS is never right: it has no place.
        pointing_dropped: the same.
        pointing_chance: float64 [v], chance of both.
        settings: the fixed knobs, sizes and seed.
    """

    knob: str
    values: Tensor
    win_rate: Tensor
    chance: Tensor
    retrieval_kept: Tensor
    retrieval_dropped: Tensor
    retrieval_chance: float
    pointing_kept: Tensor
    pointing_dropped: Tensor
    pointing_chance: Tensor
    settings: dict[str, float | int | bool]


def _scene(
    *,
    absorbed: float,
    alignment: float,
    shared: float,
    norm_ratio: float,
    noise: float,
    n_patches: int,
    n_images: int,
    n_objects: int,
    n_concepts: int,
    l_q: int,
    dim: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns queries [n_images, l_q, dim], documents [n_images, 1 + n_patches, dim], and the objects of both."""

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, dim, generator=generator), dim=-1)

    concepts, scene = unit(n_concepts), unit(n_images)
    objects = torch.rand(n_images, n_concepts, generator=generator).argsort(1)[:, :n_objects]
    patch_object = (torch.arange(n_patches) * n_objects // n_patches).expand(n_images, -1)
    content = concepts[objects.gather(1, patch_object)]
    patches = sqrt(1 - shared) * content + sqrt(shared) * scene[:, None]
    patches = F.normalize(patches + noise * unit(n_images, n_patches), dim=-1)
    gist = F.normalize(patches.sum(1), dim=-1)
    cls = norm_ratio * F.normalize(absorbed * gist + sqrt(1 - absorbed**2) * unit(1), dim=-1)
    query_object = torch.rand(n_images, n_objects, generator=generator).argsort(1)[:, :l_q]
    named = concepts[objects.gather(1, query_object)]
    q = F.normalize(sqrt(1 - alignment) * named + sqrt(alignment) * gist[:, None], dim=-1)
    q = F.normalize(q + noise * unit(n_images, l_q), dim=-1)
    return q, torch.cat([cls[:, None], patches], 1), query_object, patch_object


def _measure(q: Tensor, d: Tensor, query_object: Tensor, patch_object: Tensor, normalize: bool) -> dict[str, float]:
    own = torch.arange(len(q))

    def accuracy(scores: Tensor) -> float:
        return float((scores.argmax(1) == own).double().mean())

    kept, token = maxsim(q, d, normalize=normalize, return_argmax=True)
    dropped, patch = maxsim(q, d[:, 1:], normalize=normalize, return_argmax=True)
    token, patch = token[own, own].long(), patch[own, own].long()
    is_cls = token == 0
    right_kept = (patch_object.gather(1, (token - 1).clamp(min=0)) == query_object) & ~is_cls
    right_dropped = patch_object.gather(1, patch) == query_object
    return {
        "win_rate": float(is_cls.double().mean()),
        "retrieval_kept": accuracy(kept),
        "retrieval_dropped": accuracy(dropped),
        "pointing_kept": float(right_kept.double().mean()),
        "pointing_dropped": float(right_dropped.double().mean()),
    }


def simulate_cls_dominance(
    knob: str = "alignment",
    values: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    *,
    absorbed: float = 0.9,
    alignment: float = 0.5,
    shared: float = 0.2,
    norm_ratio: float = 1.0,
    noise: float = 1.0,
    n_patches: int = 256,
    n_images: int = 32,
    n_objects: int = 8,
    n_concepts: int = 32,
    l_q: int = 4,
    dim: int = 64,
    normalize: bool = True,
    trials: int = 8,
    seed: int = 0,
) -> ClsSimulation:
    """Simulates how often CLS is the argmax as one knob changes, and what dropping CLS does to retrieval and pointing.

    The model: an image shows ``n_objects`` of ``n_concepts`` random unit directions, each on an equal part of its
    patches. With ``o`` the object's direction and ``u`` a unit direction of the image as a whole::

        patch = unit(sqrt(1 - shared) o + sqrt(shared) u + noise * e),     e a random unit vector per patch
        gist  = unit(sum of the image's patches)
        CLS   = norm_ratio * unit(absorbed * gist + sqrt(1 - absorbed^2) * e')
        query token = unit(unit(sqrt(1 - alignment) o + sqrt(alignment) gist) + noise * e'')

    There is one query per image, with ``l_q`` tokens that each name a different object. The model covers one scenario,
    not every ViT. The deciding knob is ``alignment``: how far training pulled the query tokens towards the pooled image
    (as CLIP-style training with CLS does) rather than towards the patches (as training with MaxSim does).

    Args:
        knob: the knob to sweep: ``"absorbed"``, ``"alignment"``, ``"shared"``, ``"norm_ratio"``, ``"noise"`` or
            ``"n_patches"``.
        values: its values; the argument of the same name is ignored.
        absorbed: cosine between CLS and the sum of the patches, 0..1: how much of every patch CLS has absorbed.
        alignment: the part of a query token's energy that points at the image's gist, 0..1.
        shared: the part of a patch's energy that all patches of the image share, 0..1.
        norm_ratio: |CLS| / |patch|. No effect by cosine (``normalize=True``).
        noise: |noise| / |content| of a patch and of a query token. CLS, a sum over patches, averages it out.
        n_patches: number of patches per image; chance is ``1 / (n_patches + 1)``.
        n_images: number of images and of queries.
        n_objects: number of objects per image.
        n_concepts: number of directions that objects are drawn from.
        l_q: number of tokens per query.
        dim: number of features per token.
        normalize: score by cosine.
        trials: number of independent repeats, the first dimension of the results.
        seed: seed of trial 0; trial t uses ``seed + t``.

    Returns:
        Win rate, retrieval and pointing for every trial and value, with their chances.

    Raises:
        ValueError: an unknown knob, a value outside its range, or a scene that does not fit (l_q <= n_objects, ...).
    """
    settings = {
        "absorbed": absorbed, "alignment": alignment, "shared": shared, "norm_ratio": norm_ratio, "noise": noise,
        "n_patches": n_patches, "n_images": n_images, "n_objects": n_objects, "n_concepts": n_concepts, "l_q": l_q,
        "dim": dim,
    }  # fmt: skip
    if knob not in KNOBS:
        raise ValueError(f"knob must be one of {', '.join(KNOBS)}, got {knob!r}")
    if len(values) == 0 or trials < 1:
        raise ValueError(f"values and trials must not be empty, got {len(values)} values and trials={trials}")
    if not 1 <= l_q <= n_objects <= n_concepts:
        raise ValueError(
            f"the scene needs 1 <= l_q <= n_objects <= n_concepts, got l_q={l_q}, n_objects={n_objects}, "
            f"n_concepts={n_concepts}"
        )
    points: list[dict[str, Any]] = [{**settings, knob: int(v) if knob == "n_patches" else float(v)} for v in values]
    for point in points:
        _check_point(point)

    results = []
    for trial in range(trials):
        for point in points:
            generator = torch.Generator().manual_seed(seed + trial)
            results.append(_measure(*_scene(**point, generator=generator), normalize))
    table = {
        key: torch.tensor([r[key] for r in results], dtype=torch.float64).view(trials, len(points))
        for key in results[0]
    }
    patches = torch.tensor([p["n_patches"] for p in points], dtype=torch.float64)
    return ClsSimulation(
        knob=knob,
        values=torch.tensor([p[knob] for p in points], dtype=torch.float64),
        chance=1 / (patches + 1),
        retrieval_chance=1 / n_images,
        pointing_chance=torch.full_like(patches, 1 / n_objects),
        settings={**settings, "normalize": normalize, "trials": trials, "seed": seed},
        **table,
    )


def _check_point(point: dict[str, float | int]) -> None:
    for name in _UNIT_KNOBS:
        if not 0 <= point[name] <= 1:
            raise ValueError(f"{name} must be in 0..1, got {point[name]}")
    for name in ("norm_ratio", "noise"):
        if point[name] < 0:
            raise ValueError(f"{name} must be 0 or more, got {point[name]}")
    if point["n_patches"] < point["n_objects"]:
        raise ValueError(f"n_patches must be at least n_objects={point['n_objects']}, got {point['n_patches']}")
