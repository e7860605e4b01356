"""Which runs there are, in the order in which they say most, and which of them is next.

A method's rate comes from one grid: `RATES` on `CHOOSING` with the first seed, extended by a factor of two as long as the
lowest dev loss lies at an edge. Ablations take the rate of the variant that they are of. Then every task runs with every
seed. Runs that are under way are locked (`flock`: the lock goes with its process), so several loops may run side by side.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.locks import lock
from benchmarks.quality.real.packages import ROOT

RESULTS = ROOT / "benchmarks/results/quality-smollm2"
SEEDS = (0, 1, 2)
RATES = (2e-3, 1e-3, 4e-3)
SLOWEST, FASTEST = 1e-4, 7e-2
CHOOSING = ("commands", "headlines")
PLANNED = ("commands", "headlines", "quartz")
FURTHER = ("robot", "mails")
"""Tasks for the methods of `CORE` alone."""
CORE = ("readout", "lora", "published")
UPPER = ("readout-upper", "lora-upper")
OTHERS = ("rslora", "dora", "lily", "peft-shadow", "shadow-peft-0.1.1")
ZERO = ("readout-zero-state", "published-zero-state")
PRETRAINED = ("readout-pretrained", "published-pretrained")
PARTS = (
    "readout-unnormalized", "readout-frozen-untrained", "readout-only", "readout-injection", "readout-correction",
    "published-frozen-untrained",
)  # fmt: skip
FROZEN_PRETRAINED = ("readout-frozen-pretrained", "published-frozen-pretrained")
DRAFTED = ("readout", "readout-upper", "published", *PRETRAINED)
"""The methods whose decoding is timed."""
WAIT = 20.0


@dataclass(frozen=True)
class Run:
    """What distinguishes one run from all others."""

    method: str
    task: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.method}--{self.task}--s{self.seed}--lr{self.rate:g}"

    def path(self, folder: Path) -> Path:
        """Its result."""
        return folder / f"{self.name}.json"

    def failure(self, folder: Path) -> Path:
        """Its error."""
        return folder / "failed" / f"{self.name}.json"

    def done(self, folder: Path) -> bool:
        """Whether there is a result or an error."""
        return self.path(folder).exists() or self.failure(folder).exists()


def dev_loss(method: str, rate: float, folder: Path) -> float | None:
    """Sum of the dev losses at a rate over the tasks on which rates are chosen; None unless all of them were run."""
    paths = [Run(method, task, SEEDS[0], rate).path(folder) for task in CHOOSING]
    if not all(path.exists() for path in paths):
        return None
    return sum(json.loads(path.read_text(encoding="utf-8"))["dev"]["loss"] for path in paths)


def rates(method: str, folder: Path) -> tuple[list[float], float | None]:
    """The rates of a method's grid as far as they can be told, and the best one when it lies inside."""
    grid = sorted(RATES)
    while True:
        losses = {rate: dev_loss(method, rate, folder) for rate in grid}
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        if len(known) < len(grid):
            return grid, None
        best = min(known, key=lambda rate: known[rate])
        if best == grid[0] and best / 2 >= SLOWEST:
            grid.insert(0, best / 2)
        elif best == grid[-1] and best * 2 <= FASTEST:
            grid.append(best * 2)
        else:
            return grid, best


def parent(method: str) -> str:
    """The method whose rate a method takes: of an ablation the variant, else itself."""
    return method.partition("-")[0] if method in (*ZERO, *PARTS, *FROZEN_PRETRAINED) else method


def grids(methods: tuple[str, ...], folder: Path) -> Iterator[Run]:
    """The runs that choose rates, one task after the other."""
    for task in CHOOSING:
        for method in methods:
            order = sorted(
                rates(method, folder)[0], key=lambda rate: (rate not in RATES, RATES.index(rate) if rate in RATES else rate)
            )
            yield from (Run(method, task, SEEDS[0], rate) for rate in order)


def finals(methods: tuple[str, ...], names: tuple[str, ...], seeds: tuple[int, ...], folder: Path) -> Iterator[Run]:
    """The runs at chosen rates, of those methods whose rate is known."""
    for seed in seeds:
        for task in names:
            for method in methods:
                rate = rates(parent(method), folder)[1]
                if rate is not None:
                    yield Run(method, task, seed, rate)


def runs(folder: Path = RESULTS) -> Iterator[Run]:
    """The plan, as far as it can be told from the results that are there."""
    yield from grids(CORE, folder)
    yield from finals((*CORE, *ZERO), CHOOSING, SEEDS, folder)
    for methods in (UPPER, OTHERS):
        yield from grids(methods, folder)
        yield from finals(methods, CHOOSING, SEEDS, folder)
    yield from finals(PARTS, CHOOSING, SEEDS, folder)
    yield from grids(PRETRAINED, folder)
    yield from finals((*PRETRAINED, *FROZEN_PRETRAINED), CHOOSING, SEEDS, folder)
    yield from finals((*CORE, *UPPER, *OTHERS, *PRETRAINED), PLANNED, SEEDS, folder)
    yield from finals(CORE, FURTHER, SEEDS, folder)


def missing(folder: Path = RESULTS) -> list[Run]:
    """The runs of the plan that have neither result nor error, each once."""
    return [run for run in dict.fromkeys(runs(folder)) if not run.done(folder)]


@contextmanager
def claimed(folder: Path, one: Run | None = None) -> Iterator[Run | None]:
    """The run that is asked for, or the next one of the plan, locked; None if nothing is to be done.

    While all that is missing is done by others, it waits: their results may tell further runs.
    """
    while True:
        wanted = missing(folder) if one is None else [one]
        for run in wanted:
            locked = lock(folder, run.name)
            if locked is None:
                continue
            try:
                if not run.done(folder):
                    yield run
                    return
            finally:
                os.close(locked)
        if one is not None or not missing(folder):
            break
        time.sleep(WAIT)
    say_what_failed(folder)
    yield None


def say_what_failed(folder: Path) -> None:
    """Name the runs that left an error, on the standard error."""
    for path in sorted((folder / "failed").glob("*.json")):
        print(f"Failed: {path.stem}: {json.loads(path.read_text(encoding='utf-8'))['error']}", file=sys.stderr)
