"""The figures of the page on runtimes are those of the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.runtimes import FORMATS, RESULTS, merged, table

PAGE = Path(__file__).parents[2] / "docs" / "runtimes.md"


def test_the_table_is_that_of_the_results() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert table(results) in PAGE.read_text(encoding="utf-8")
    names = [row["name"] for row in results["rows"]]
    assert names == [name for name in ("transformers", *(name for name, *_ in FORMATS)) if name in names]


def test_rows_that_are_measured_again_take_their_place() -> None:
    before = json.loads(RESULTS.read_text(encoding="utf-8"))
    again = {**before["rows"][1], "megabytes": 99.0}
    after = {**before, "rows": [before["rows"][0], again]}
    both = merged(before, after)
    assert both["rows"] == [before["rows"][0], again, *before["rows"][2:]]
    fewer = {**before, "rows": [row for row in before["rows"] if row["name"] != "OpenVINO"]}
    assert "| OpenVINO | not measured | | | |" in table(fewer)
    with pytest.raises(ValueError, match="of another shadow"):
        merged(before, {**after, "parameters": 7})


def test_float32_answers_as_transformers_and_8_bits_lose_little() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results["rows"]}
    for name in ("llama.cpp, f32", "onnxruntime", "OpenVINO", "page in Chromium"):
        assert rows[name]["same"] == results["commands"] == 300, name
    assert rows["llama.cpp, q8_0"]["exact"] >= rows["transformers"]["exact"] - 0.02
