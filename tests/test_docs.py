"""Tables in README.md and docs/ are what benchmarks/results/*.json says."""

from benchmarks import report


def test_tables_are_fresh(monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    assert report.main() == 0, "run: python -m benchmarks.report"


def test_a_stale_table_is_seen():
    text = "before\n<!-- table:aot -->\n| old |\n<!-- /table -->\nafter\n"
    assert "| old |" not in report.render(text) and report.render(text).startswith(
        "before\n<!-- table:aot -->\n| kernel |"
    )
    unknown = text.replace("aot", "unheard-of")
    assert report.render(unknown) == unknown
