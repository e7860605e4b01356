"""The results of a race: a table, a picture, a JSON file, three commands with every answer."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shadow_peft.demo.race import Contender, RaceSettings
from shadow_peft.demo.robot_commands import Command
from shadow_peft.storage.versions import versions_of

HEADINGS = ("path", "exact match", "fields", "loss", "trainable", "seconds", "peak MB")
PACKAGES = ("torch", "transformers", "trl", "peft")


def table(contenders: Sequence[Contender]) -> str:
    """The table as text; seconds and peak memory are those of training."""
    rows = [HEADINGS, *(_row(contender) for contender in contenders)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = ["  ".join(_padded(cell, widths[i], left=i == 0) for i, cell in enumerate(row)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def examples(contenders: Sequence[Contender], commands: Sequence[Command], count: int = 3) -> str:
    """The first `count` commands with the right answer and that of each contender."""
    width = max(len(contender.name) for contender in contenders)
    blocks = []
    for index, command in enumerate(commands[:count]):
        answers = [f"  {c.name:<{width}}  {_short(c.scores.answers[index])}" for c in contenders]
        blocks.append("\n".join([command.sentence, f"  {'(right)':<{width}}  {command.completion.strip()}", *answers]))
    return "\n\n".join(blocks)


def save_results(path: Path, settings: RaceSettings, contenders: Sequence[Contender], seconds: float) -> None:
    """Save all measurements with settings and versions as JSON."""
    results = {
        "seconds_in_all": round(seconds, 1),
        "settings": {**asdict(settings), "base": settings.base.name, "shadow_model": settings.shadow_model.name},
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "versions": versions_of(PACKAGES),
        "contenders": [asdict(contender) for contender in contenders],
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def draw_results(path: Path, contenders: Sequence[Contender]) -> None:
    """Plot the training losses over the steps, and the right answers beside them, as PNG; a colour a contender."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses: Any
    answers: Any
    losses, answers = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = {contender.name: f"C{index}" for index, contender in enumerate(contenders)}
    for contender in contenders:
        for curve_name, curve in (contender.training.curves if contender.training else {}).items():
            name = contender.name if curve_name == "answer" else curve_name
            losses.plot(*zip(*curve, strict=True), label=name, color=colours.get(name))
    losses.set(xlabel="step", ylabel="training loss (nats per token)", yscale="log")
    losses.legend()
    shares = [100 * contender.scores.exact_match for contender in contenders]
    bars = answers.barh(list(colours), shares, color=list(colours.values()))
    answers.bar_label(bars, fmt="%.1f %%", padding=3)
    answers.set(xlabel="test commands answered exactly (%)", xlim=(0, max(1.3 * max(shares), 1)))
    answers.invert_yaxis()
    figure.savefig(path, dpi=120)


def _row(contender: Contender) -> tuple[str, ...]:
    scores, training = contender.scores, contender.training
    measured = (f"{scores.exact_match:.1%}", f"{scores.fields:.1%}", f"{scores.loss:.3f}")
    if training is None:
        return (contender.name, *measured, "-", "-", "-")
    cost = (f"{training.trainable:,}", f"{training.seconds:.0f}", f"{training.peak_memory_mb:.0f}")
    return (contender.name, *measured, *cost)


def _padded(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _short(line: str, limit: int = 110) -> str:
    """A text on one line, shortened to `limit` characters."""
    flat = line.replace("\n", " | ") or "(nothing)"
    return flat if len(flat) <= limit else flat[:limit] + " ..."
