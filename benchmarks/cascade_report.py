"""The two tables of docs/cascade.md, from the results of `benchmarks.cascade`: python -m benchmarks.cascade_report"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.pages import put_between
from benchmarks.quality.table import table

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/cascade.md", ROOT / "benchmarks/results"
BEGIN, END = "<!-- begin: python -m benchmarks.cascade_report -->", "<!-- end of the report -->"
NAMES = {
    "demo": "robot commands, exact match",
    "demo-fields": "robot commands, right fields",
    "headlines": "headlines, exact match",
    "headlines-smollm2": "headlines on SmolLM2, exact match",
}
"""Name of the results -> of the data and the quality."""
REPRESENTATIVE = "escalations <= 0.2"
"""The promise over whose resamplings areas and errors are averaged; no data refuse it."""


def models_table(found: dict[str, dict[str, Any]]) -> str:
    """What both models are worth alone, the areas under the curves, and the calibration errors."""
    lines = []
    for name, result in found.items():
        entries = result["promises"][REPRESENTATIVE]["resamplings"]

        def average(key: str, digits: int, entries: list[dict[str, Any]] = entries) -> str:
            return f"{statistics.mean(entry[key] for entry in entries):.{digits}f}"

        lines.append(
            [
                NAMES[name], f"{result['rows']:,}", average("shadow_quality", 3), average("attached_quality", 3),
                average("area", 4), average("random_area", 4), result["curves_above_random"],
                average("calibration_error_before", 3), average("calibration_error_after", 3),
            ]
        )  # fmt: skip
    heads = [
        "data and quality", "rows", "shadow alone", "attached alone", "area", "random area", "curves above random",
        "calibration error before", "after",
    ]  # fmt: skip
    return table(heads, lines)


def promises_table(found: dict[str, dict[str, Any]]) -> str:
    """Every promise: how often it could be made, was kept, and was broken beyond the noise of the test half."""
    lines = []
    for name, result in found.items():
        for promise, entries in result["promises"].items():
            of = entries["summary"]
            cells = ["-"] * 5
            if of["promised"]:
                values = [f"{of['mean_value']:.3f}", f"{of['worst_value']:.3f}", f"{of['mean_escalated']:.1%}"]
                cells = [str(of["kept"]), str(of["broken_beyond_noise"]), *values]
            lines.append([NAMES[name], promise, str(of["promised"]), *cells])
    heads = ["data and quality", "promise", "promised", "kept", "broken beyond noise", "mean value", "worst value", "asked"]
    return table(heads, lines)


def results() -> dict[str, dict[str, Any]]:
    """Name -> result."""
    return {name: json.loads((RESULTS / f"cascade-{name}.json").read_text(encoding="utf-8")) for name in NAMES}


def markdown() -> str:
    """Both tables."""
    found = results()
    return (
        f"{models_table(found)}\n\nAreas and errors are means over the resamplings of one promise. "
        f'"Curves above random" counts all resamplings of all promises.\n\n{promises_table(found)}'
    )


def totals() -> dict[str, int]:
    """Promises with a confidence over all data: how many were made, kept on the test half, and broken beyond noise."""
    promises = [item for result in results().values() for item in result["promises"].items()]
    summaries = [entries["summary"] for promise, entries in promises if "expectation" not in promise]
    return {key: sum(of.get(key, 0) for of in summaries) for key in ("promised", "kept", "broken_beyond_noise")}


if __name__ == "__main__":
    put_between(PAGE, markdown(), BEGIN, END)
    print(totals())
