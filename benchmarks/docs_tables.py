"""Renders the study's tables in README.md and docs/ from benchmarks/results/*.json, so that no number is typed by hand.

    python -m benchmarks.docs_tables           rewrite every table
    python -m benchmarks.docs_tables --check   fail where a table is stale

Markers as in `benchmarks.report`. The results: `python examples/train_grounding.py --json
benchmarks/results/train_grounding.json`, and the demo.json that `latemax demo` writes, as benchmarks/results/demo.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import report

OBJECTIVES = {
    "pooled": "one pooled vector (CLS), CLIP-style",
    "kept": "MaxSim, CLS kept",
    "dropped": "MaxSim, CLS dropped",
}


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def trained() -> str:
    """Retrieval, pointing and CLS wins by objective and LoRA."""
    train = report.result("train_grounding")
    rows = []
    for row in train["summary"]:
        mean, sd = row["mean"], row["sd"]
        cells = [f"{mean[m]:.3f} ({sd[m]:.3f})" for m in ("p_at_1_pooled", "p_at_1_kept", "p_at_1_dropped",
                                                          "pointing_kept", "pointing_dropped")]  # fmt: skip
        wins = f"{percent(mean['cls_wins'])} ({100 * sd['cls_wins']:.1f})"
        rows.append((OBJECTIVES[row["trained"]], "yes" if row["lora"] else "no", *cells, wins))
    chance = train["chance"]
    rows.append(("chance", "", *[f"{chance['p_at_1']:.3f}"] * 3, *[f"{chance['pointing']:.3f}"] * 2,
                 percent(chance["cls_wins"])))  # fmt: skip
    head = ("trained by", "LoRA", "P@1, pooled CLS", "P@1, MaxSim, CLS kept", "P@1, MaxSim, CLS dropped",
            "pointing, CLS kept", "pointing, CLS dropped", "names won by CLS")  # fmt: skip
    return report.markdown(head, rows)


def cosines() -> str:
    """Mean cosine of a name with the tokens of its own canvas."""
    rows = [
        (OBJECTIVES[row["trained"]], "yes" if row["lora"] else "no",
         *(f"{row['mean'][f'cosine_{name}']:.2f}" for name in ("CLS", "patches", "maximum")))
        for row in report.result("train_grounding")["summary"]
    ]  # fmt: skip
    return report.markdown(("trained by", "LoRA", "CLS", "patch, mean", "best token"), rows)


def train_run() -> str:
    """How the training results came about."""
    r = report.result("train_grounding")
    s, machine = r["settings"], r["machine"]
    factors = f"rank {s['rank']} in the last {s['blocks']} blocks"
    return (
        f"{len(r['seeds'])} seeds, each with its own {s['n_train']} canvases to train on and {s['n_test']} held out; "
        f"{s['size']} px, {r['grid'][0]}x{r['grid'][1]} patches; {s['dim']} features a token; {s['warm_steps']} steps "
        f"with the ViT frozen, then {s['steps']} with or without LoRA ({factors}), {s['batch']} captions a batch. "
        f"{r['seconds']:.0f} s in all, {r['cpu_seconds']:.0f} s of processor time, on {machine['threads']} threads "
        f"of {machine['cpu_count']} {machine['processor']} cores, torch {machine['torch']}.\n"
    )


def untrained_retrieval() -> str:
    """R@1 of the demo's crops, without any training."""
    demo = report.result("demo")
    rows = [(name, f"{value:.3f}") for name, value in demo["recall_at_1"].items()]
    return report.markdown(
        (f"{len(demo['queries'])} crops against {len(demo['photos'])} photos, scored by", "R@1"),
        [*rows, ("chance", f"{demo['recall_at_1_chance']:.3f}")],
    )


def untrained_wins() -> str:
    """How often CLS wins in the demo, without any training."""
    rows = []
    for label, groups in report.result("demo")["cls_share"].items():
        cls = groups["CLS"]
        rows.append((label, percent(cls["share"]), f"{cls['wins']:,}", percent(cls["chance"])))
    return report.markdown(("query patches against", "won by CLS", "wins", "chance"), rows)


TABLES = {
    "trained": trained, "cosines": cosines, "train-run": train_run,
    "untrained-retrieval": untrained_retrieval, "untrained-wins": untrained_wins,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a table is stale")
    parser.add_argument("--file", type=Path, action="append", help="a page (default: README.md and docs/*.md)")
    options = parser.parse_args()
    pages = options.file or [report.ROOT / "README.md", *sorted((report.ROOT / "docs").glob("*.md"))]
    status = 0
    for page in pages:
        text, stale = page.read_text(), []

        def fresh(match, stale=stale, page=page):
            name = match["name"]
            if name not in TABLES:
                if name not in report.TABLES:
                    raise SystemExit(f"{page.name}: no table is called {name}; {', '.join(TABLES)} are")
                return match[0]
            block = match[1] + TABLES[name]() + match[4]
            if block != match[0]:
                stale.append(name)
            return block

        text = report.MARKER.sub(fresh, text)
        for name in stale:
            print(f"{'stale' if options.check else 'rewritten'}: table:{name} in {page.name}")
        if stale and not options.check:
            page.write_text(text)
        status |= bool(stale and options.check)
    return status


if __name__ == "__main__":
    sys.exit(main())
