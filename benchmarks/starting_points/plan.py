"""The runs, and the next of them that nobody does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.locks import lock

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/starting_points"
STARTS = ("random", "base layers", "next token", "distilled")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One run."""

    start: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.start.replace(' ', '-')}--s{self.seed}"

    def path(self, folder: Path) -> Path:
        """Its result."""
        return folder / f"{self.name}.json"


def cells() -> list[Cell]:
    """All runs, seed after seed."""
    return [Cell(start, seed) for seed in SEEDS for start in STARTS]


@contextmanager
def claimed(folder: Path, asked: Cell | None = None) -> Iterator[Cell | None]:
    """The run that is asked for, or the next one, locked; None where it has a result or others do all that is missing."""
    for cell in cells() if asked is None else [asked]:
        if cell.path(folder).exists():
            continue
        held = lock(folder, cell.name)
        if held is None:
            continue
        try:
            yield cell
            return
        finally:
            os.close(held)
    yield None
