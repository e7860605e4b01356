"""Two pictures drawn from the committed results: docs/quality.svg (on the demo's former base) and docs/speed.svg.

python -m benchmarks.plots
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from benchmarks.quality.run import FORMER
from benchmarks.quality.table import results
from benchmarks.quality.tasks import TASKS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
WIDTH = 0.36
INK, OURS, PEERS, LIGHTER = "#22262e", "#d9822b", "#9aa3b2", "#f3c48d"
"""The colours of docs/path.svg: what is trained here is orange. A white card is readable on a dark page too."""

METHODS = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "peft-shadow": "Shadow of peft",
    "shadow-peft-0.1.1": "shadow-peft 0.1.1",
    "ours": "readout",
    "ours-pretrained": "readout, pretrained shadow",
}
"""Method of `benchmarks.quality` -> its label, in the order from above."""

DECODING = {
    "LoRA": "LoRA, not merged",
    "DoRA": "DoRA, not merged",
    "peft Shadow": "Shadow of peft",
    "shadow-peft 0.1.1": "shadow-peft 0.1.1",
    "ours, variant published": "published",
    "ours": "readout",
}
TRAINING = {
    "LoRA": "LoRA",
    "DoRA": "DoRA",
    "peft's Shadow": "Shadow of peft",
    "shadow-peft 0.1.1": "shadow-peft 0.1.1",
    "ours": "readout",
}
"""Row of the results -> its label."""


class Bar(NamedTuple):
    """A bar: its label, its length, the length of the thin bar below it (None: there is none), whether it is ours."""

    label: str
    value: float
    second: float | None
    ours: bool


def quality_bars(score: str) -> list[Bar]:
    """Means of a score over tasks and seeds, of the attached model and of the detached shadow."""

    def mean(method: str, key: str) -> float | None:
        found = [[r["test"][key] for r in results(method, task, FORMER) if key in r["test"]] for task in TASKS]
        return statistics.mean(map(statistics.mean, found)) if all(found) else None

    bars = []
    for method, label in METHODS.items():
        value = mean(method, score)
        if value is not None:
            bars.append(Bar(label, value, mean(method, f"detached_{score}"), method.startswith("ours")))
    return bars


def cost_bars(file: str, labels: dict[str, str], read: Callable[[dict[str, Any]], float]) -> list[Bar]:
    """Ratios of a committed result, those of `labels`."""
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    return [Bar(label, read(rows[name]), None, name.startswith("ours")) for name, label in labels.items()]


def training_bars(key: str) -> list[Bar]:
    """A cost of training as ratios to LoRA's."""
    return cost_bars("training_cost.json", TRAINING, lambda row: row["ratios"][key])


def draw_bars(axes: Any, bars: Sequence[Bar], title: str, form: str, end: float, reference: float | None = None) -> None:
    """Horizontal bars with their values beside them; a longer one than `end` is cut off there and says its value."""
    for place, bar in enumerate(bars):
        paired = bar.second is not None
        pairs = [(bar.value, OURS if bar.ours else PEERS), (bar.second, LIGHTER if bar.ours else "#d5d9e0")]
        for i, (value, colour) in enumerate(pairs):
            if value is not None:
                y = place + (i - 0.5) * WIDTH * paired
                label = format(value, form) + (" (cut off)" if value > end else "")
                axes.barh(y, min(value, end), height=WIDTH if paired else 0.6, color=colour)
                axes.text(
                    min(value, end) + 0.012 * end, y, label, va="center", fontsize=8.5, color=INK, backgroundcolor="white"
                )
                axes.texts[-1].get_bbox_patch().set_boxstyle("square", pad=0.08)
    if reference is not None:
        axes.axvline(reference, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=9.5, color=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlim(0, end * 1.2)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9)
    axes.set_xticks([])
    axes.set_facecolor("none")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#7b8494")


def save(figure: Figure, path: Path, note: str) -> None:
    """Save as SVG with its text as text, the same bytes from the same results."""
    figure.text(0.016, 0.022, note, fontsize=8.5, color="#3d4450", va="bottom")
    (width, height), edge = figure.get_size_inches(), 0.02
    card = FancyBboxPatch(
        (edge, edge), width - 2 * edge, height - 2 * edge, boxstyle="round,pad=0,rounding_size=0.11",
        facecolor="white", edgecolor="#d5d9e0", transform=figure.dpi_scale_trans, zorder=-1,
    )  # fmt: skip
    figure.add_artist(card)
    figure.get_layout_engine().set(rect=(0.012, 0.075, 0.976, 0.905))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "shadow-peft"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def draw_quality(path: Path) -> None:
    """Loss and exact match of docs/quality.md, attached and detached."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained", facecolor="none")
    left, right = figure.subplots(1, 2, sharey=True)
    draw_bars(left, quality_bars("loss"), "test loss, nats per token (lower is better)", ".3f", 3.5)
    draw_bars(right, quality_bars("exact"), "exact match (higher is better)", ".1%", 0.16)
    data = "A base of 3 M parameters, means of 4 tasks and 3 seeds, one budget."
    save(figure, path, f"Dark: the adapted base. Light: the detached shadow alone. {data}")


def draw_speed(path: Path) -> None:
    """Decoding, a training step and its memory, of docs/speed.md."""
    figure = Figure(figsize=(9.6, 3.1), layout="constrained", facecolor="none")
    panels = figure.subplots(1, 3)
    bars = cost_bars("decoding.json", DECODING, lambda row: row["decode b1"])
    draw_bars(panels[0], bars, "a decoded token,\ntimes the bare base", ".2f", 1.6, 1.0)
    for axes, key, title in ((panels[1], "step", "a training step"), (panels[2], "peak", "peak memory of a step")):
        draw_bars(axes, training_bars(key), f"{title},\ntimes LoRA's", ".2f", 2.0, 1.0)
    save(
        figure,
        path,
        "Shorter is better. One thread of a CPU, random Llamas of width 512 with 12 layers, float32, one budget.",
    )


def main() -> None:
    draw_quality(DOCS / "quality.svg")
    draw_speed(DOCS / "speed.svg")


if __name__ == "__main__":
    main()
