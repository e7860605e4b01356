"""The figures of the page on runtimes are those of the results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.runtimes import FORMATS, RESULTS, table

PAGE = Path(__file__).parents[2] / "docs" / "runtimes.md"


def test_the_table_is_that_of_the_results() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert table(results) in PAGE.read_text(encoding="utf-8")
    assert [row["name"] for row in results["rows"]] == ["transformers", *(name for name, *_ in FORMATS)]


def test_float32_answers_as_transformers_and_8_bits_lose_little() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results["rows"]}
    for name in ("llama.cpp, f32", "onnxruntime", "OpenVINO", "page in Chromium"):
        assert rows[name]["same"] == results["commands"] == 300, name
    assert rows["llama.cpp, q8_0"]["exact"] >= rows["transformers"]["exact"] - 0.02
