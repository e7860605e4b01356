"""Every run of the comparison, one process after another; what has a JSON is skipped, so it can be stopped and resumed.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.sweep --peer /path/to/python/with/shadow-peft-0.1.1
    ... --methods lora ours --tasks robot --stages rates seeds

Stage `rates` runs the whole grid on two of the tasks with seed 0; stage `seeds` runs every task and seed at the rate that
had the lowest mean loss on dev of those two, for each method.
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

GRID = (3e-3, 5e-3, 1e-2, 1e-3)
SEEDS = (0, 1, 2)
CHOOSING = ("robot", "signature")
PEER = "shadow-peft-0.1.1"

Run: TypeAlias = tuple[str, str, int, float]


def dev_losses(method: str, rate: float, folder: Path) -> list[float]:
    """Losses on dev at a rate, of the tasks on which rates are chosen, as far as they were run."""
    paths = [path_of(method, task, SEEDS[0], rate, folder) for task in CHOOSING]
    return [json.loads(path.read_text(encoding="utf-8"))["dev"]["loss"] for path in paths if path.exists()]


def chosen_rate(method: str, folder: Path = RESULTS) -> float | None:
    """The rate of the grid with the lowest mean loss on dev, among those that were run on most tasks; None of none."""
    losses = {rate: dev_losses(method, rate, folder) for rate in GRID}
    most = max(map(len, losses.values()))
    complete = {rate: sum(found) for rate, found in losses.items() if len(found) == most}
    return min(complete, key=lambda rate: complete[rate]) if most else None


def runs(stage: str, methods: list[str], tasks: list[str]) -> Iterator[Run]:
    """The runs of a stage, seed after seed and task after task, so that a stop leaves whole columns."""
    if stage == "rates":
        yield from ((m, task, SEEDS[0], rate) for task in tasks if task in CHOOSING for m in methods for rate in GRID)
        return
    for seed in SEEDS:
        for task in tasks:
            yield from ((m, task, seed, rate) for m in methods if (rate := chosen_rate(m)) is not None)


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
    parser.add_argument(
        "--peer", help="Python of an environment with shadow-peft 0.1.1, torch, transformers and accelerate."
    )
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
