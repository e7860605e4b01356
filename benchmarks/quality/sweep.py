"""Every run of the comparison, one process after another; what has a JSON is skipped, so it can be stopped and resumed.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.sweep --peer /path/to/python/with/shadow-peft-0.1.1
    ... --methods lora ours --tasks robot --stages rates seeds

Stage `rates` runs the whole grid with seed 0; stage `seeds` runs the other seeds at the rate that had the lowest loss on
dev for that method and task.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from benchmarks.quality.methods import METHODS
from benchmarks.quality.run import RESULTS, path_of
from benchmarks.quality.tasks import DATA, ROOT, TASKS

GRID = (3e-3, 1e-2, 1e-3)
SEEDS = (0, 1, 2)
PEER = "shadow-peft-0.1.1"

Run: TypeAlias = tuple[str, str, int, float]


def chosen_rate(method: str, task: str, folder: Path = RESULTS) -> float | None:
    """The rate of the grid with the lowest loss on dev at seed 0; None where nothing was run."""
    losses = {}
    for rate in GRID:
        path = path_of(method, task, SEEDS[0], rate, folder)
        if path.exists():
            losses[rate] = json.loads(path.read_text(encoding="utf-8"))["dev"]["loss"]
    return min(losses, key=lambda rate: losses[rate]) if losses else None


def runs(stage: str, methods: list[str], tasks: list[str]) -> Iterator[Run]:
    """The runs of a stage, those of one task after another, so that a stop leaves whole columns."""
    for task in tasks:
        for method in methods:
            if stage == "rates":
                yield from ((method, task, SEEDS[0], rate) for rate in GRID)
            elif (rate := chosen_rate(method, task)) is not None:
                yield from ((method, task, seed, rate) for seed in SEEDS[1:])


def start(run: Run, peer: str | None) -> None:
    """One run in a process of its own, with the environment that has the package it means."""
    method, task, seed, rate = run
    words = ["--method", method, "--task", task, "--seed", str(seed), "--lr", f"{rate:g}"]
    python, path = sys.executable, f"{ROOT / 'src'}"
    if method == PEER:
        if peer is None:
            return
        python, path = peer, ""
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, "-m", "benchmarks.quality.run", *words], cwd=ROOT, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=sorted(METHODS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--stages", nargs="+", default=["rates", "seeds"], choices=["rates", "seeds"])
    parser.add_argument("--peer", help="Python of an environment with shadow-peft 0.1.1, torch, transformers and accelerate.")
    parser.add_argument("--list", action="store_true", help="Only name the runs that are missing.")
    asked = parser.parse_args()
    if not DATA.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.quality.tasks"], cwd=ROOT, check=True)
    for stage in asked.stages:
        for run in runs(stage, asked.methods, asked.tasks):
            if path_of(*run).exists():
                continue
            if asked.list:
                print(*run)
            else:
                start(run, asked.peer)


if __name__ == "__main__":
    main()
