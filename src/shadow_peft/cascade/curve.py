"""Quality against the share of answers for which the attached model was asked, over all thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shadow_peft.cascade.outcomes import Outcome, Steps, Table, tabulate


@dataclass(frozen=True)
class Curve:
    """The points of all thresholds, from "never asked" to "always asked".

    Attributes:
        shares: share of answers for which the attached model was asked, rising from 0 to 1.
        qualities: mean quality of the answers.
    """

    shares: tuple[float, ...]
    qualities: tuple[float, ...]

    @property
    def area(self) -> float:
        """The area under the curve: the mean quality over all shares."""
        return float(np.trapezoid(self.qualities, self.shares))

    @property
    def random_area(self) -> float:
        """The area under the line that asking about random prompts gives: from the shadow alone to the attached alone."""
        return (self.qualities[0] + self.qualities[-1]) / 2

    def quality_at(self, share: float) -> float:
        """The quality at a share of answers asked for, between thresholds by a line."""
        return float(np.interp(share, self.shares, self.qualities))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with both areas."""
        points = {"shares": list(self.shares), "qualities": list(self.qualities)}
        return {**points, "area": self.area, "random_area": self.random_area}


def all_thresholds(steps: list[Steps]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Every threshold that does something else than the one before: minus infinity, each confidence, infinity."""
    values = np.unique(np.concatenate([step.confidences for step in steps]))
    return np.concatenate([[-np.inf], values[1:], [np.inf]])


def curve_of(outcomes: list[Outcome], steps: list[Steps]) -> Curve:
    """The curve of examples, given where thresholds let the attached model take over."""
    return curve_of_table(tabulate(outcomes, steps, all_thresholds(steps)))


def curve_of_table(table: Table) -> Curve:
    """The curve of a table whose thresholds reach from minus infinity to infinity."""
    return Curve(tuple(table.asked.mean(axis=0).tolist()), tuple(table.qualities.mean(axis=0).tolist()))


def draw_curves(path: Path, curves: Mapping[str, Curve], chosen: tuple[float, float] | None = None) -> None:
    """Plot curves as PNG, with the line of random asking.

    Args:
        path: the file.
        curves: name -> curve, all of the same answers.
        chosen: share and quality of the threshold that was chosen.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for name, curve in curves.items():
        axes.plot(curve.shares, curve.qualities, label=f"{name}: area {curve.area:.3f}")
    first = next(iter(curves.values()))
    ends = (first.qualities[0], first.qualities[-1])
    axes.plot((0, 1), ends, color="gray", linestyle="--", label=f"random: area {first.random_area:.3f}")
    if chosen is not None:
        axes.plot(*chosen, marker="o", color="black", linestyle="none", label="chosen threshold")
    axes.set(xlabel="share of answers for which the attached model was asked", ylabel="mean quality", xlim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)
