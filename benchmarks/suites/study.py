"""Tables of the grounding study, which ``examples/train_grounding.py`` and ``latemax demo`` measure.

    python -m benchmarks.suites.study [--json FILE]

runs ``examples/train_grounding.py`` (whose own options remain there). The demo writes its demo.json itself; the tables
read benchmarks/results/train_grounding.json and demo.json.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import harness
from benchmarks.tables import Table, markdown, percent

OBJECTIVES = {
    "pooled": "one pooled vector (CLS), CLIP-style",
    "kept": "MaxSim, CLS kept",
    "dropped": "MaxSim, CLS dropped",
}


def measure(tiny: bool = False) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "train_grounding.json"
        command = [sys.executable, str(harness.ROOT / "examples" / "train_grounding.py"), "--json", str(path)]
        subprocess.run([*command, *(["--quick"] if tiny else [])], check=True, stdout=sys.stderr)
        return json.loads(path.read_text())


def table(result: dict) -> str:
    """Retrieval, pointing and argmax at CLS, by objective and LoRA."""
    rows = []
    for row in result["summary"]:
        mean, sd = row["mean"], row["sd"]
        cells = [f"{mean[m]:.3f} ({sd[m]:.3f})" for m in ("p_at_1_pooled", "p_at_1_kept", "p_at_1_dropped",
                                                          "pointing_kept", "pointing_dropped")]  # fmt: skip
        wins = f"{percent(mean['cls_wins'])} ({100 * sd['cls_wins']:.1f})"
        rows.append((OBJECTIVES[row["trained"]], "yes" if row["lora"] else "no", *cells, wins))
    chance = result["chance"]
    rows.append(("chance", "", *[f"{chance['p_at_1']:.3f}"] * 3, *[f"{chance['pointing']:.3f}"] * 2,
                 percent(chance["cls_wins"])))  # fmt: skip
    head = ("trained by", "LoRA", "P@1, pooled CLS", "P@1, MaxSim, CLS kept", "P@1, MaxSim, CLS dropped",
            "pointing, CLS kept", "pointing, CLS dropped", "names won by CLS")  # fmt: skip
    return markdown(head, rows)


def table_of_cosines(result: dict) -> str:
    """Mean cosine of a name with the tokens of its own canvas."""
    rows = [
        (OBJECTIVES[row["trained"]], "yes" if row["lora"] else "no",
         *(f"{row['mean'][f'cosine_{name}']:.2f}" for name in ("CLS", "patches", "maximum")))
        for row in result["summary"]
    ]  # fmt: skip
    return markdown(("trained by", "LoRA", "CLS", "patch, mean", "best token"), rows)


def settings(result: dict) -> str:
    """How the training results came about."""
    s, machine = result["settings"], result["machine"]
    factors = f"rank {s['rank']} in the last {s['blocks']} blocks"
    return (
        f"{len(result['seeds'])} seeds, each with its own {s['n_train']} canvases to train on and {s['n_test']} held "
        f"out; {s['size']} px, {result['grid'][0]}x{result['grid'][1]} patches; {s['dim']} features per token; "
        f"{s['warm_steps']} steps with the ViT frozen, then {s['steps']} with or without LoRA ({factors}), "
        f"{s['batch']} captions per batch. {result['seconds']:.0f} s in all, {result['cpu_seconds']:.0f} s of "
        f"processor time, on {machine['threads']} threads of {machine['cpu_count']} {machine['processor']} cores, "
        f"torch {machine['torch']}.\n"
    )


def table_of_untrained_retrieval(demo: dict) -> str:
    """R@1 of the demo's crops, without any training."""
    rows = [(name, f"{value:.3f}") for name, value in demo["recall_at_1"].items()]
    return markdown(
        (f"{len(demo['queries'])} crops against {len(demo['photos'])} photos, scored by", "R@1"),
        [*rows, ("chance", f"{demo['recall_at_1_chance']:.3f}")],
    )


def table_of_untrained_wins(demo: dict) -> str:
    """How often the argmax is CLS in the demo, without any training."""
    rows = []
    for label, groups in demo["cls_share"].items():
        cls = groups["CLS"]
        rows.append((label, percent(cls["share"]), f"{cls['wins']:,}", percent(cls["chance"])))
    return markdown(("query patches against", "won by CLS", "wins", "chance"), rows)


def hits(demo: dict) -> str:
    """What a frozen ViT finds, in one sentence."""
    found: dict[str, int] = {}
    for query in demo["queries"]:
        found[query["photo"]] = found.get(query["photo"], 0) + (query["rank"] == 1)
    each, p = len(demo["queries"]) // len(found), demo["pointing"]
    full, none = ([name for name, n in found.items() if n == wanted] for wanted in (each, 0))
    return (
        f"A frozen DINOv2 ViT-S/14 ranks the right photo first for {sum(found.values())} of {len(demo['queries'])} "
        f"random crops of {len(found)} photos (chance {percent(demo['recall_at_1_chance'])}): for all {each} crops of "
        f"{len(full)} photos ({', '.join(full[:4])} …), for no crop of {' and '.join(none) or 'none'}. "
        f"{percent(p['in_box'])} of a crop's patches have their best match where the crop was cut (chance "
        f"{percent(p['in_box_chance'])}).\n"
    )


def demo_words(demo: dict) -> str:
    """What the words of the demo find, in one sentence."""
    w, seconds = demo["words"], demo["seconds"]
    how = w["trained"]["dropped"]["pointing"], w["untrained"]["dropped"]["pointing"], w["chance"]["dropped"]
    return (
        f"On {w['test']} canvases that were not trained on, {percent(how[0])} of the words find a patch of their photo "
        f"(untrained {percent(how[1])}, chance {percent(how[2])}; all photos were seen in training). With the weights "
        f"on disk, the words are ready after {seconds['model'] + seconds['words']:.0f} s and the whole demo after "
        f"{sum(seconds.values()):.0f} s ({demo['machine']['cpu_count']} cores without other load).\n"
    )


TABLES = {
    "demo-hits": Table("demo", hits),
    "demo-words": Table("demo", demo_words),
    "trained": Table("train_grounding", table),
    "cosines": Table("train_grounding", table_of_cosines),
    "train-run": Table("train_grounding", settings),
    "untrained-retrieval": Table("demo", table_of_untrained_retrieval),
    "untrained-wins": Table("demo", table_of_untrained_wins),
}


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    harness.finish(measure(options.tiny), table, options.json)


if __name__ == "__main__":
    main()
