"""Tables in README.md and docs/ are what benchmarks/results/*.json says."""

import pytest

from benchmarks import report


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
