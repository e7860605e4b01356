"""Paired bootstrap of the difference between two methods on one task, over seeds and test examples.

    S  seeds that both methods were run with      N  examples of the test split      D  draws

A draw takes S seeds and N examples with replacement, the same for both methods. Its difference is

    sum_n mean_s (a[s, n] - b[s, n]) / sum_n w[n]

with w[n] = targets of the example for a loss that is summed over targets, and 1 for being right or wrong. The interval
holds the middle 95 % of the draws. Three seeds are few: the spread between seeds is known roughly, and so is its part of
the interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
DRAWS, SEED, MIDDLE = 4000, 0, 95


@dataclass(frozen=True)
class Difference:
    """An estimate and its draws `[D]`."""

    estimate: float
    draws: Array

    @property
    def interval(self) -> tuple[float, float]:
        """The limits between which the middle of the draws lies."""
        low, high = np.percentile(self.draws, [(100 - MIDDLE) / 2, (100 + MIDDLE) / 2])
        return float(low), float(high)


def paired(first: Array, second: Array, weights: Array) -> Difference:
    """`first - second` of one task: values `[S, N]` of both methods, weights `[N]`."""
    differences = first - second
    random = np.random.default_rng(SEED)
    seeds = random.integers(len(differences), size=(DRAWS, len(differences)))
    examples = random.integers(len(weights), size=(DRAWS, len(weights)))
    of_seeds = differences[seeds].mean(axis=1)  # [D, N]
    drawn = np.take_along_axis(of_seeds, examples, axis=1).sum(axis=1) / weights[examples].sum(axis=1)
    return Difference(float(differences.mean(axis=0).sum() / weights.sum()), drawn)


def mean(differences: list[Difference]) -> Difference:
    """The mean over tasks; draws of different tasks are independent."""
    random = np.random.default_rng(SEED)
    shuffled = [random.permutation(one.draws) for one in differences]
    return Difference(float(np.mean([one.estimate for one in differences])), np.mean(shuffled, axis=0))
