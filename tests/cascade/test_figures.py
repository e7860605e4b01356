"""docs/cascade.md has the figures of the committed results."""

from __future__ import annotations

from benchmarks import cascade_report as report


def test_the_tables_are_those_of_the_results() -> None:
    """Otherwise run: python -m benchmarks.cascade_report"""
    page = report.PAGE.read_text(encoding="utf-8")
    assert page.split(report.BEGIN)[1].split(report.END)[0].strip() == report.markdown()
    assert report.markdown().count("\n| ") > 4 * 8


def test_the_text_counts_the_promises() -> None:
    of = report.totals()
    others = of["promised"] - of["kept"]
    said = f"Of the {of['promised']} promises with a confidence of 95 %, {of['kept']} are kept on their test half"
    page = report.PAGE.read_text(encoding="utf-8")
    assert said in page
    assert f"and {of['broken_beyond_noise']} of the {others} others are broken beyond noise" in page
