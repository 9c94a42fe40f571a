"""README.md and docs/: tables are what benchmarks/results/*.json says, links lead somewhere, and every public name is
in the reference."""

import importlib
import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *ROOT.glob("*.md"),
    *DOCS.glob("*.md"),
    ROOT / "examples" / "README.md",
    ROOT / "benchmarks" / "GPU_PENDING.md",
]
FENCE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def test_tables_are_fresh(monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    assert report.main() == 0, "run: python -m benchmarks.report"


def test_a_stale_table_is_seen():
    text = "before\n<!-- table:aot -->\n| old |\n<!-- /table -->\nafter\n"
    known = report.tables()
    fresh, stale = report.refresh(text, "a page", known)
    assert stale == ["aot"] and "| old |" not in fresh and fresh.endswith("<!-- /table -->\nafter\n")
    assert fresh.startswith("before\n<!-- table:aot -->\n| kernel |")
    assert report.refresh(fresh, "a page", known) == (fresh, [])
    with pytest.raises(ValueError, match="a page: no table is called unheard-of; aot, "):
        report.refresh(text.replace("aot", "unheard-of"), "a page", known)


def slug(heading):
    """The anchor of a heading, as GitHub and Python-Markdown make it."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def dead_links(page, text):
    dead = []
    for target, anchor in LINK.findall(FENCE.sub("", text)):
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            dead.append(target)
        # the anchors of the reference are made from the sources
        elif anchor and file.suffix == ".md" and file.name != "reference.md":
            anchors = map(slug, HEADING.findall(FENCE.sub("", file.read_text())))
            dead += [f"{target}#{anchor}"] if anchor not in anchors else []
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert dead_links(page, page.read_text()) == []


def test_a_dead_link_is_seen():
    text = "[a](gone.md) [b](corpus.md#two-stages) [c](corpus.md#three-stages) [d](https://x.y/z.md) `[e](e.md)`"
    assert dead_links(DOCS / "scale.md", text) == ["gone.md", "corpus.md#three-stages"]


@pytest.mark.parametrize("name", ["", "analysis", "encoders", "search", "store", "viz", "compat", "distributed", "ray"])
def test_every_public_name_is_in_the_reference_and_has_a_docstring(name):
    module = importlib.import_module(f"latemax.{name}" if name else "latemax")
    shown = re.findall(r"^::: latemax\.([\w.]+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert len(shown) == len(set(shown))
    prefix = f"{name}." if name else ""
    for public in module.__all__:
        assert f"{prefix}{public}" in shown or (not name and public in {one.split(".")[-1] for one in shown}), public
        assert (getattr(module, public).__doc__ or "").strip(), public


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f": {page.name}\n" not in navigation] == []


@pytest.mark.parametrize("page", [*DOCS.glob("*.md")], ids=lambda page: page.name)
def test_lists_and_tables_of_the_site_follow_an_empty_line(page):
    """Python-Markdown takes them as a part of the paragraph otherwise."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = hooks.FENCE.sub("```", hooks.on_page_markdown(page.read_text(), None))
    lines = text.split("\n")
    begins = [(a, b) for a, b in pairwise(lines) if re.match(r"- |\d+\. |\|", b)]
    assert [b for a, b in begins if a and not re.match(r"#|- |\d+\. |\||  ", a)] == []


def test_the_help_of_search_says_what_was_measured(capsys):
    from latemax import cli

    queries = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["queries"]
    hits = sum(query["rank"] == 1 for query in queries)
    with pytest.raises(SystemExit):
        cli.main(["search", "--help"])
    assert f"{hits} of {len(queries)} random crops" in " ".join(capsys.readouterr().out.split())
