"""The table of the comparison, Markdown: every method at the rate chosen on dev, mean and deviation over seeds, on test.

python -m benchmarks.quality.table [FOLDER]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.quality.methods import METHODS
from benchmarks.quality.run import RESULTS, path_of
from benchmarks.quality.sweep import SEEDS, chosen_rate
from benchmarks.quality.tasks import TASKS

Result: TypeAlias = dict[str, Any]

SCORES = {
    "loss": "loss", "exact": "exact match", "detached_loss": "detached loss", "detached_exact": "detached exact match",
    "agreement": "agreement",
}  # fmt: skip
COSTS = {"trainable": "trained", "cpu_seconds": "CPU s", "peak_memory_mb": "peak MB"}


def results(method: str, task: str, folder: Path = RESULTS) -> list[Result]:
    """The runs of a method on a task at its chosen rate, one for each seed that was run."""
    rate = chosen_rate(method, folder)
    paths = [] if rate is None else [path_of(method, task, seed, rate, folder) for seed in SEEDS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± deviation; the mean alone of one value, a dash of none."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join([row(heads), row(["---"] * len(heads)), *map(row, lines)])


def task_table(task: str, folder: Path) -> str:
    """One task: quality of both paths, forgetting, rate and seeds."""
    lines = []
    for method in METHODS:
        found = results(method, task, folder)
        if found:
            scores = [shown([r["test"][key] for r in found if key in r["test"]]) for key in SCORES]
            forgotten = shown([r["forgetting"]["after"] - r["forgetting"]["before"] for r in found])
            lines.append([method, *scores, forgotten, f"{found[0]['lr']:g}", str(len(found))])
    return table(["method", *SCORES.values(), "forgetting", "rate", "seeds"], lines)


def mean_table(tasks: Sequence[str], folder: Path) -> str:
    """All tasks that every listed method has: means over tasks and seeds, and the cost of a run."""
    lines = []
    for method in METHODS:
        found = {task: results(method, task, folder) for task in tasks}
        if not all(found.values()):
            continue
        means = []
        for key in SCORES:
            per_task = [statistics.mean(r["test"][key] for r in rs) for rs in found.values() if key in rs[0]["test"]]
            means.append(f"{statistics.mean(per_task):.3f}" if per_task else "-")
        every = [r for rs in found.values() for r in rs]
        forgotten = statistics.mean(r["forgetting"]["after"] - r["forgetting"]["before"] for r in every)
        costs = [f"{statistics.mean(r[key] for r in every):,.0f}" for key in COSTS]
        lines.append([method, *means, f"{forgotten:.3f}", *costs])
    return table(["method", *SCORES.values(), "forgetting", *COSTS.values()], lines)


def main(folder: Path = RESULTS) -> None:
    print(
        "Loss in nats per completion token, exact match of the whole completion, both on test; forgetting is the rise of the"
    )
    print("loss on text like the pretraining's. Mean ± standard deviation over seeds; rate chosen on dev.\n")
    print(f"### Mean over {', '.join(TASKS)}\n\n{mean_table(TASKS, folder)}\n")
    for task in TASKS:
        print(f"### {task}\n\n{task_table(task, folder)}\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
