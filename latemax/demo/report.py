"""What the demo prints."""

from __future__ import annotations

from typing import Any

from latemax.viz._style import number


def print_ranking(result: dict[str, Any]) -> None:
    """Prints the rank of every crop's own photo, R@1 of each kind of scoring and chance, pointing and timing."""
    queries, photos = result["queries"], result["photos"]
    print(f"\n{result['model']}; {len(queries)} crops of {len(photos)} photos as queries, CLS dropped")
    print("rank of the right photo, crop by crop (1 is a hit):")
    width = max(map(len, photos))
    cells = []
    for photo in photos:
        ranks = [str(q["rank"]) for q in queries if q["photo"] == photo]
        cells.append(f"  {photo:<{width}} {' '.join(f'{r:>2}' for r in ranks)}")
    per_row = 3
    for at in range(0, len(cells), per_row):
        print("   ".join(cells[at : at + per_row]))
    print(f"\nR@1 (chance {result['recall_at_1_chance']:.3f})")
    for name, value in result["recall_at_1"].items():
        print(f"  {name:<36} {value:.3f}")
    p = result["pointing"]
    print("best matches of the crop's patches on the right photo")
    print(f"  inside the crop's place              {p['in_box']:.3f}  (chance {p['in_box_chance']:.3f})")
    print(f"  within 1.5 patches of the true place {p['near']:.3f}  (chance {p['near_chance']:.3f})")
    t = result["scoring"]
    print(
        f"scoring {t['n_q']} x {t['n_d']} pairs of {t['l_q']} x {t['l_d']} tokens, dim {t['dim']}: "
        f"{t['median_ms']:.1f} ms (median of {t['repeats']}, {t['threads']} threads, backend {t['backend']})\n",
        flush=True,
    )


def print_words(numbers: dict[str, Any]) -> None:
    """Prints how often a word's best match is a patch of its photo."""
    print(
        f"\n{numbers['photos']} words trained through MaxSim on {numbers['train']} canvases; their best match on "
        f"{numbers['test']} canvases of other crops is in their photo (all photos were seen in training)"
    )
    for how, value in numbers["trained"].items():
        print(
            f"  CLS {how:<8} {value['pointing']:.3f}  (untrained {numbers['untrained'][how]['pointing']:.3f}, chance "
            f"{numbers['chance'][how]:.3f}; the best match is CLS {100 * value['cls']:.1f} %)"
        )
    print(flush=True)


def print_study(result: dict[str, Any]) -> None:
    """Prints CLS win rates and chance, mean similarities, token norms and the main curve of the simulation."""
    if "cls_share" not in result:
        print("\nThis model has no CLS token: no CLS study.")
    else:
        print("\nHow often CLS holds the maximum when it is kept")
        for label, groups in result["cls_share"].items():
            row = groups["CLS"]
            print(f"  {label:<48} {100 * row['share']:5.1f} %  (chance {100 * row['chance']:.1f} %)")
        print("Mean similarity of query patches on the right photo")
        for space, means in result["similarity"].items():
            print(f"  {space:<7}", ", ".join(f"{name} {number(value)}" for name, value in means.items()))
        for name, row in result["norms"]["groups"].items():
            text = ", ".join(f"{when} {row[when]['median']:.3g} (max {row[when]['max']:.3g})" for when in row)
            print(f"Norm of {name}, median: {text}")
        n = result["norms"]
        print(
            f"Flagged patches: {n['outliers']} of {n['patches']} (above median + {n['k']:g} MAD before the norm), "
            f"the largest norm is {n['largest_ratio']:.1f} times its photo's median"
        )
    curve = result["simulation"]["alignment"]["absorbed 0.9"]
    print("Simulated CLS win rate by the alignment of the queries with the pooled image")
    points = (f"{v:.1f}: {100 * w:.1f} %" for v, w in zip(curve["values"], curve["win_rate"], strict=True))
    print("  " + "  ".join(points))
    print(f"  chance {100 * curve['chance'][0]:.1f} %\n", flush=True)
