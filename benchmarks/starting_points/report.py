"""Table and picture of the starting points, from the results that are there.

python -m benchmarks.starting_points.report            writes both into docs/
python -m benchmarks.starting_points.report --print    only prints the table
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.pages import put_between, report_options
from benchmarks.quality.table import shown, table
from benchmarks.starting_points.plan import RESULTS, ROOT, SEEDS, STARTS, Cell

Result: TypeAlias = dict[str, Any]

PAGE, PICTURE = ROOT / "docs/pretraining.md", ROOT / "docs/starting-points.svg"
BEGIN, END = "<!-- begin: python -m benchmarks.starting_points.report -->", "<!-- end of the starting points -->"
NOT_MEASURED = "Not measured."

COLUMNS: dict[str, tuple[Callable[[Result, Result], float], float, int]] = {
    "text, nats": (lambda run, tuned: run["shadow"]["held_out"], 1, 3),
    "attached loss": (lambda run, tuned: tuned["attached"]["loss"], 1, 3),
    "attached right, %": (lambda run, tuned: tuned["attached"]["exact"], 100, 1),
    "detached loss": (lambda run, tuned: tuned["detached"]["loss"], 1, 3),
    "detached right, %": (lambda run, tuned: tuned["detached"]["exact"], 100, 1),
    "tokens a base pass": (lambda run, tuned: tuned["drafts"]["tokens_per_pass"], 1, 2),
    "drafts accepted, %": (lambda run, tuned: tuned["drafts"]["acceptance"], 100, 1),
}
"""Head -> how a run and its fine-tuning are read, in which unit, with how many digits."""


def results(folder: Path = RESULTS) -> dict[str, list[Result]]:
    """The runs of every starting point.

    Raises:
        ValueError: they are of several bases, or were not made with the same settings.
    """
    found = {start: [_read(p) for seed in SEEDS if (p := Cell(start, seed).path(folder)).exists()] for start in STARTS}
    every = [run for runs in found.values() for run in runs]
    for name in ("base", "settings"):
        if any(run[name] != every[0][name] for run in every):
            raise ValueError(f"The results in {folder} differ in {name}: they are no comparison.")
    return found


def best_scale(runs: Sequence[Result]) -> str:
    """The rate of the backbone at which the mean loss on the dev split is lowest."""
    return min(runs[0]["tuned"], key=lambda scale: statistics.mean(run["tuned"][scale]["dev_loss"] for run in runs))


def values(runs: Sequence[Result], column: str) -> list[float]:
    """A column's value in every run, at the rate that the dev split chose."""
    read, unit, _ = COLUMNS[column]
    return [unit * read(run, run["tuned"][best_scale(runs)]) for run in runs]


def markdown(found: dict[str, list[Result]]) -> str:
    """The table under a sentence on what it is of, or that nothing was measured."""
    every = [run for runs in found.values() for run in runs]
    if not every:
        return NOT_MEASURED
    lines = []
    for start, runs in found.items():
        cells = [shown(values(runs, column), digits) for column, (_, _, digits) in COLUMNS.items()]
        tokens = f"{runs[0]['shadow']['tokens']:,}" if runs else "-"
        lines.append([start, tokens, *cells, best_scale(runs) if runs else "-", f"{len(runs)} of {len(SEEDS)}"])
    heads = ["starts from", "tokens read", *COLUMNS, "backbone's rate", "seeds"]
    settings, parameters = every[0]["settings"], every[0]["shadow"]["parameters"]
    said = (
        f"Base `{every[0]['base']}` (SHA-256 over config, weights, tokenizer), {parameters:,} trained parameters; "
        f"{settings['tune_steps']} steps of fine-tuning, {settings['commands']} test commands, of which "
        f"{settings['drafted']} are answered with drafts of {settings['draft_tokens']} tokens. Mean ± deviation over seeds."
    )
    return f"{said}\n\n{table(heads, lines)}\n\n![The same as bars]({PICTURE.name})"


def draw(found: dict[str, list[Result]], path: Path) -> None:
    """Bars of the starting points that were run: loss on text, exact match, tokens a base pass."""
    from matplotlib.figure import Figure

    from benchmarks.plots import Bar, draw_bars, save

    figure = Figure(figsize=(9.6, 2.6), layout="constrained", facecolor="none")
    columns = {
        "text, nats": ("loss on text before fine-tuning,\nnats per token", ".2f"),
        "attached right, %": ("exact match, %\n(light: detached)", ".1f"),
        "tokens a base pass": ("tokens a base pass,\ndrafting", ".2f"),
    }
    for axes, (column, (title, form)) in zip(figure.subplots(1, 3, sharey=True), columns.items(), strict=True):
        second = "detached right, %" if column == "attached right, %" else None
        bars = [
            Bar(start, statistics.mean(values(runs, column)), second and statistics.mean(values(runs, second)), True)
            for start, runs in found.items()
            if runs
        ]
        draw_bars(axes, bars, title, form, max(bar.value for bar in bars) or 1.0)
    save(figure, path, "Means over seeds; the demo's base and task, one shape of the shadow.")


def main() -> None:
    asked = report_options(__doc__, RESULTS, PAGE, PICTURE)
    found = results(asked.results)
    if asked.print:
        print(markdown(found))
        return
    put_between(asked.page, markdown(found), BEGIN, END)
    if any(found.values()):
        draw(found, asked.picture)


def _read(path: Path) -> Result:
    return dict(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
