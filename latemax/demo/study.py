"""The CLS study: the simulation, and the same questions for the tokens of a real ViT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latemax.analysis import (
    ArgmaxShare,
    ClsSimulation,
    SimilarityDistribution,
    TokenNorms,
    argmax_share,
    own_pairs,
    similarity_distribution,
    simulate_cls_dominance,
    token_groups,
    token_norms,
)
from latemax.demo.retrieval import Encoded

_ALIGNMENT = tuple(i / 10 for i in range(11))


def groups_of(encoded: Encoded) -> dict[str, slice]:
    """Returns the token groups: CLS first, the rest of the prefix as registers, then patches."""
    p = encoded.d_prefix.shape[1]
    return token_groups(encoded.d.shape[1], n_cls=min(p, 1), n_registers=max(p - 1, 0))


def shares(encoded: Encoded, owner: Tensor) -> dict[str, ArgmaxShare]:
    """Counts argmax shares with CLS kept, for query patches and for the query's own CLS as the only query token."""
    tokens, groups = torch.cat([encoded.d_prefix, encoded.d], 1), groups_of(encoded)
    right = own_pairs(owner, len(tokens))
    result = {}
    for norm, space in ((True, "cosine"), (False, "raw dot product")):
        for pairs, which in ((right, "right photo"), (~right, "wrong photos")):
            result[f"{space}, {which}"] = argmax_share(encoded.q, tokens, groups, pairs=pairs, normalize=norm)
    result["cosine, right photo,\nthe query is the crop's CLS"] = argmax_share(
        encoded.q_prefix[:, :1], tokens, groups, pairs=right, normalize=True
    )
    return result


def distribution(encoded: Encoded, owner: Tensor) -> SimilarityDistribution:
    """Samples the similarities of the query patches on their own photo, by token type."""
    tokens = torch.cat([encoded.d_prefix, encoded.d], 1)
    return similarity_distribution(encoded.q, tokens, groups_of(encoded), pairs=own_pairs(owner, len(tokens)))


def norms(encoded: Encoded) -> TokenNorms:
    """Measures the token norms of the photos before and after the final norm."""
    after = torch.cat([encoded.d_prefix, encoded.d], 1)
    return token_norms(encoded.d_before, after, groups=groups_of(encoded))


def simulations(tick: Callable[[], Any] = lambda: None, *, trials: int = 4, seed: int = 0) -> dict[str, Any]:
    """Simulates the curves of the eight panels.

    Args:
        tick: called after each curve, `N_CURVES` times.
        trials: trials per curve.
        seed: seed of the first trial.

    Returns:
        panel -> label -> `ClsSimulation`; "pointing" and "retrieval" hold one simulation without label.
    """

    def curve(knob: str, values: tuple[float, ...], **settings: Any) -> ClsSimulation:
        result = simulate_cls_dominance(knob, values, trials=trials, seed=seed, **settings)
        tick()
        return result

    ratios, noises, sizes = (0.5, 1, 1.5, 2, 3, 4, 6), (0, 0.5, 1, 1.5, 2, 3), (16, 64, 256, 1024)
    shared = (0, 0.1, 0.2, 0.4, 0.6, 0.8)
    absorbed = tuple(i / 8 for i in range(9))
    by_alignment = {f"absorbed {a:g}": curve("alignment", _ALIGNMENT, absorbed=a) for a in (1.0, 0.9, 0.7)}
    raw = curve("norm_ratio", ratios, alignment=0.0, normalize=False)
    return {
        "alignment": by_alignment,
        "absorbed": {f"alignment {t:g}": curve("absorbed", absorbed, alignment=t) for t in (0.8, 0.6, 0.0)},
        "norm_ratio": {
            "raw, alignment 0.5": curve("norm_ratio", ratios, alignment=0.5, normalize=False),
            "raw, alignment 0": raw,
            "cosine, alignment 0.5": curve("norm_ratio", ratios, alignment=0.5),
        },
        "noise": {f"alignment {t:g}": curve("noise", noises, alignment=t) for t in (0.8, 0.5, 0.0)},
        "n_patches": {f"alignment {t:g}": curve("n_patches", sizes, alignment=t) for t in (0.8, 0.5, 0.0)},
        "shared": {f"alignment {t:g}": curve("shared", shared, alignment=t) for t in (0.8, 0.5, 0.0)},
        "pointing": by_alignment["absorbed 0.9"],
        "retrieval": raw,
    }


# The number of curves that `simulations` computes.
N_CURVES = 18


def simulation_numbers(panels: dict[str, Any]) -> dict[str, Any]:
    """Returns the curves as plain lists, means over trials."""

    def plain(sim: ClsSimulation) -> dict[str, Any]:
        means = ("win_rate", "pointing_kept", "pointing_dropped", "retrieval_kept", "retrieval_dropped")
        return {
            "knob": sim.knob,
            "values": sim.values.tolist(),
            "chance": sim.chance.tolist(),
            "pointing_chance": sim.pointing_chance.tolist(),
            "retrieval_chance": sim.retrieval_chance,
            **{name: getattr(sim, name).mean(0).tolist() for name in means},
            "settings": sim.settings,
        }

    return {
        panel: plain(value) if isinstance(value, ClsSimulation) else {label: plain(s) for label, s in value.items()}
        for panel, value in panels.items()
    }


def norm_numbers(result: TokenNorms) -> dict[str, Any]:
    """Returns median and maximum norm by group before and after the final norm, and the number of outliers."""

    def plain(values: Tensor) -> dict[str, float]:
        return {"median": float(values.median()), "max": float(values.max())}

    stages = {"before": result.before}
    if result.after is not None:
        stages["after"] = result.after
    return {
        "groups": {name: {when: plain(groups[name]) for when, groups in stages.items()} for name in result.before},
        "outliers": int(result.outlier.sum()),
        "patches": result.outlier.numel(),
        "outliers_per_photo": result.outlier.sum(1).tolist(),
        "k": result.k,
        "largest_ratio": result.largest_ratio,
    }
