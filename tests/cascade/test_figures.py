"""The tables of docs/cascade.md have the figures of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NAMES = {
    "demo": "robot commands, exact match",
    "demo-fields": "robot commands, right fields",
    "headlines": "headlines, exact match",
    "headlines-smollm2": "headlines on SmolLM2, exact match",
}


def results(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "benchmarks" / "results" / f"cascade-{name}.json").read_text(encoding="utf-8")))


def table_rows(name: str) -> list[str]:
    """The rows of both tables for one data set."""
    found = results(name)
    first = found["promises"]["escalations <= 0.5"]["resamplings"]
    mean = {key: sum(e[key] for e in first) / len(first) for key in first[0] if isinstance(first[0][key], float)}
    rows = [
        f"| {NAMES[name]} | {found['rows']:,} | {mean['shadow_quality']:.3f} | {mean['attached_quality']:.3f} | "
        f"{mean['area']:.4f} | {mean['random_area']:.4f} | {found['curves_above_random']} | "
        f"{mean['calibration_error_before']:.3f} | {mean['calibration_error_after']:.3f} |"
    ]
    for promise, result in found["promises"].items():
        s = result["summary"]
        if "kept" in s:
            rows.append(
                f"| {NAMES[name]} | {promise} | {s['promised']} | {s['kept']} | {s['broken_beyond_noise']} | "
                f"{s['mean_value']:.3f} | {s['worst_value']:.3f} | {s['mean_escalated']:.1%} |"
            )
        else:
            rows.append(f"| {NAMES[name]} | {promise} | 0 | - | - | - | - | - |")
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_figures_of_the_results(name: str) -> None:
    lines = (ROOT / "docs" / "cascade.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in table_rows(name) if row not in lines] == []
