"""Renders the tables of README.md and docs/ from benchmarks/results/*.json, so that no number is typed by hand.

    python -m benchmarks.report           rewrite every table
    python -m benchmarks.report --check   fail where a table is stale

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
MARKER = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)


def result(name: str):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def cpu() -> str:
    data = result("cpu")
    machine = data["machine"]
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in data["rows"]))
    names = list(dict.fromkeys(row["name"] for row in data["rows"]))
    cells = {(tuple(row["shape"]), row["name"]): row for row in data["rows"]}
    rows = []
    for name in names:
        line = [f"**{name}**" if name.startswith("latemax") else name]
        for shape in shapes:
            row = cells[shape, name]
            error = f", error {row['max_error']:.2g}" if "approximate" in name or "bfloat16" in name else ""
            line.append(f"{row['ms_p50']:.1f} ms ({row['vs_latemax']:.2f}×{error})")
        rows.append(line)
    head = ["(l_q, n_d, l_d, dim)", *(str(shape) for shape in shapes)]
    peers = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    return markdown(head, rows) + (
        f"\nMedian of interleaved rounds; in brackets the time as a multiple of latemax float32. {machine['cpu']} "
        f"({machine['capability']}), {machine['threads']} threads, torch {machine['torch']}, {peers}, commit "
        f"{machine['commit']}, {machine['date']}.\n"
    )


def aot() -> str:
    head = ["arch", "kernel", "case", "registers", "spills", "shared bytes", "wgmma", "mma", "inner loop"]
    keys = ["kernel", "case", "registers", "spills", "shared", "wgmma", "mma", "loop"]
    rows = [[f"sm_{row['arch']}", *(row[key] for key in keys)] for row in result("aot")]
    return markdown(head, rows)


TABLES = {"cpu": cpu, "aot": aot}


def render(text: str) -> str:
    def table(match):
        name = match["name"]
        return match[1] + TABLES[name]() + match[4] if name in TABLES else match[0]

    return MARKER.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a table is stale")
    check = parser.parse_args().check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text()
        after = render(before)
        if before != after:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(after)
    for name in stale:
        print(("stale: " if check else "rewritten: ") + name)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
