"""The picture of the comparison: each method's difference to LoRA with its interval, and what its training costs.

Colours are of middle brightness on a transparent ground, so that it can be read on a light page and on a dark one. Figures
are written beside the points, as text of the SVG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.real.bootstrap import Difference
from benchmarks.quality.real.results import Results

TEXT, OURS, THEIRS = "#7d848c", "#d9730d", "#4a8fd6"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "shadow-peft", "font.size": 9, "text.color": TEXT, "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "font.family": "sans-serif",
}  # fmt: skip
MISSING = "not run yet"


def label(difference: Difference | None, digits: int, scale: float) -> str:
    """What is written beside a point."""
    return MISSING if difference is None else f"{scale * difference.estimate:+.{digits}f}"


def draw(results: Results, methods: Sequence[str], tasks: Sequence[str], reference: str, path: Path) -> None:
    """Write the picture as SVG: means over tasks."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    rows = [method for method in methods if method != reference]
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, 3, figsize=(9.5, 0.8 + 0.34 * len(rows)), sharey=True, layout="constrained")
        panels = (
            ("loss", "loss, nats per target\n(left is better)", 3, 1.0),
            ("exact", "right, points\n(right is better)", 1, 100.0),
        )
        for axis, (measure, title, digits, scale) in zip(axes, panels, strict=False):
            found = [results.difference(method, reference, tasks, measure) for method in rows]
            for place, (method, difference) in enumerate(zip(rows, found, strict=True)):
                _point(axis, place, method, difference, digits, scale)
            axis.axvline(0, color=TEXT, linewidth=0.8)
            axis.set_title(f"Difference to LoRA: {title}", fontsize=9)
        _costs(axes[2], results, rows, tasks, reference)
        axes[0].set_yticks(range(len(rows)), rows)
        axes[0].set_ylim(len(rows) - 0.4, -0.7)
        for axis in axes:
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(left=False)
            axis.locator_params(axis="x", nbins=5)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def _point(axis: Any, place: int, method: str, difference: Difference | None, digits: int, scale: float) -> None:
    text = label(difference, digits, scale)
    if difference is None:
        axis.annotate(text, (0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        return
    low, high = (scale * limit for limit in difference.interval)
    axis.plot([low, high], [place, place], color=_colour(method), linewidth=2.2, solid_capstyle="round")
    axis.plot([scale * difference.estimate], [place], "o", color=_colour(method), markersize=5)
    above = (scale * difference.estimate, place)
    axis.annotate(text, above, xytext=(0, 4), textcoords="offset points", ha="center", fontsize=7)


def _costs(axis: Any, results: Results, rows: Sequence[str], tasks: Sequence[str], reference: str) -> None:
    """Processor time and memory of a step, as ratios to the reference."""
    for place, method in enumerate(rows):
        time = results.ratio(method, reference, tasks, lambda result: result["cpu_seconds"])
        memory = results.ratio(method, reference, tasks, lambda result: result["step_bytes"])
        if time is None or memory is None:
            axis.annotate(MISSING, (1, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
            continue
        axis.plot([time], [place], "o", color=_colour(method), markersize=5)
        axis.plot([memory], [place], "s", color=_colour(method), markersize=5, fillstyle="none")
    axis.axvline(1, color=TEXT, linewidth=0.8)
    axis.set_title("Ratio to LoRA (left is better):\n● training time   □ memory of a step", fontsize=9)


def _colour(method: str) -> str:
    return OURS if method.startswith(("readout", "published")) else THEIRS
