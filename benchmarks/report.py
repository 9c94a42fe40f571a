"""Renders the tables of README.md and docs/ from benchmarks/results/*.json, so that no number is typed by hand.

    python -m benchmarks.report           rewrite every table
    python -m benchmarks.report --check   fail if a table is stale

A table is between ``<!-- table:NAME -->`` and ``<!-- /table -->``; the modules in ``suites`` and ``static`` name theirs
in ``TABLES``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import pkgutil
import re
import sys

from benchmarks import harness, static, suites
from benchmarks.tables import Table

MARKER = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)


def tables() -> dict[str, Table]:
    """Name -> table, of every suite."""
    found: dict[str, Table] = {}
    for package in (suites, static):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            found |= importlib.import_module(module.name).TABLES
    return found


def render(table: Table) -> str:
    path = harness.RESULTS / f"{table.result}.json"
    if table.absent and not path.exists():
        return table.absent
    return table.render(json.loads(path.read_text()))


def refresh(text: str, page: str, known: dict[str, Table]) -> tuple[str, list[str]]:
    """The page with every table rendered anew, and the names of those that differ from before.

    Raises:
        ValueError: the page names a table that no suite has.
    """
    stale = []

    def fresh(match: re.Match) -> str:
        name = match["name"]
        if name not in known:
            raise ValueError(f"{page}: no table is called {name}; {', '.join(sorted(known))} are")
        block = match[1] + render(known[name]) + match[4]
        if block != match[0]:
            stale.append(name)
        return block

    return MARKER.sub(fresh, text), stale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a table is stale")
    parser.add_argument("--file", type=pathlib.Path, action="append", help="a page (default: README.md, docs/*.md)")
    options = parser.parse_args()
    pages = options.file or [harness.ROOT / "README.md", *sorted((harness.ROOT / "docs").glob("*.md"))]
    known, any_stale = tables(), False
    for page in pages:
        try:
            text, stale = refresh(page.read_text(), page.name, known)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        for name in stale:
            print(f"{'stale' if options.check else 'rewritten'}: table:{name} in {page.name}")
        if stale and not options.check:
            page.write_text(text)
        any_stale |= bool(stale)
    return int(options.check and any_stale)


if __name__ == "__main__":
    sys.exit(main())
