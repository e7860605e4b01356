"""The results that are there: every method at the rate that was chosen for it, by task and seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks.quality.real.bootstrap import Array, Difference, mean, paired
from benchmarks.quality.real.plan import RESULTS, SEEDS, Run, parent, rates

Result: TypeAlias = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Results:
    """A folder of results, each file read once."""

    folder: Path = RESULTS

    @cache  # noqa: B019 - a report reads one folder and ends
    def of(self, method: str, task: str) -> dict[int, Result]:
        """Seed -> result; empty as long as no rate is chosen."""
        rate = rates(parent(method), self.folder)[1]
        paths = {} if rate is None else {seed: Run(method, task, seed, rate).path(self.folder) for seed in SEEDS}
        return {seed: json.loads(path.read_text(encoding="utf-8")) for seed, path in paths.items() if path.exists()}

    def mean(self, method: str, task: str, value: Callable[[Result], float | None]) -> float | None:
        """Mean of a value over seeds; None where there is no run, or where runs do not have it."""
        values = [value(result) for result in self.of(method, task).values()]
        found = [one for one in values if one is not None]
        return statistics.mean(found) if found else None

    def mean_over(self, method: str, tasks: Sequence[str], value: Callable[[Result], float | None]) -> float | None:
        """Mean over tasks of the mean over seeds; None unless every task has it."""
        means = [self.mean(method, task, value) for task in tasks]
        known = [one for one in means if one is not None]
        return statistics.mean(known) if len(known) == len(means) else None

    def ratio(self, method: str, other: str, tasks: Sequence[str], value: Callable[[Result], float]) -> float | None:
        """Mean over tasks of the ratio to another method on the same task; None unless every task has both."""
        pairs = [(self.mean(method, task, value), self.mean(other, task, value)) for task in tasks]
        known = [first / second for first, second in pairs if first is not None and second is not None]
        return statistics.mean(known) if len(known) == len(pairs) else None

    def difference(self, method: str, other: str, tasks: Sequence[str], measure: str) -> Difference | None:
        """`method - other` in a measure, mean over tasks; None unless every task has a seed that both were run with.

        Args:
            measure: "loss" or "exact", of the shadow "detached_loss" or "detached_exact".
        """
        found = []
        for task in tasks:
            first, second = self.of(method, task), self.of(other, task)
            seeds = [seed for seed in first if seed in second]
            if not seeds or not all(measure in runs[seed]["test"] for runs in (first, second) for seed in seeds):
                return None
            (ours, weights), (theirs, _) = (values([runs[seed] for seed in seeds], measure) for runs in (first, second))
            found.append(paired(ours, theirs, weights))
        return mean(found)

    def common_tasks(self, methods: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
        """The tasks that every method which has any run has all runs of, or where there is none, one.

        So means over them are of the same tasks for all.
        """
        begun = [method for method in methods if self.count(method, tasks)]
        fewest = {task: min(len(self.of(method, task)) for method in begun) for task in tasks} if begun else {}
        complete = tuple(task for task, runs in fewest.items() if runs == len(SEEDS))
        return complete or tuple(task for task, runs in fewest.items() if runs)

    def count(self, method: str, tasks: Sequence[str]) -> int:
        """Number of runs at the chosen rate."""
        return sum(len(self.of(method, task)) for task in tasks)


def values(runs: list[Result], measure: str) -> tuple[Array, Array]:
    """A measure of every run and test example `[S, N]`, and the examples' weights `[N]`."""
    shadow, _, name = measure.rpartition("_")
    every = [run["test"][f"{shadow}_each" if shadow else "each"] for run in runs]
    rows = np.array([each[name] for each in every], dtype=np.float64)
    weights = every[0]["tokens"] if name == "loss" else np.ones(rows.shape[1])
    return rows, np.array(weights, dtype=np.float64)
