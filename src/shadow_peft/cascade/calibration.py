"""Calibration: from outcomes on data with references to a threshold that keeps a promise.

    first part    fits the scorer of each signal; the signal with the largest area under its curve is taken; from its
                  confidences come the thresholds and the order in which they are tested
    second part   tests them in that order with a bound of `bounds`; the last proven threshold asks least

    promise "quality"       the mean quality of the answers is at least the target
    promise "regret"        the mean of max(0, quality of the attached model's answer - quality of the answer) is at most it
    promise "escalations"   the share of answers for which the attached model is asked is at most it

With a confidence, the promise is broken by at most 1 - confidence of all calibrations, the refused ones counted as kept.
Without one it holds in expectation.
Both need data like those to come, drawn independently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from shadow_peft.cascade.bounds import Array, conformal_choice, fixed_sequence_choice, upper_bound
from shadow_peft.cascade.curve import Curve, curve_of
from shadow_peft.cascade.outcomes import Outcome, Steps, Table, steps_of, tabulate
from shadow_peft.cascade.scorer import FittedScorer, Scorer, calibration_error, fit_scorer
from shadow_peft.cascade.signals import Takeover, signals_for

PromiseKind = Literal["quality", "regret", "escalations"]
KINDS: tuple[PromiseKind, ...] = ("quality", "regret", "escalations")

FEWEST = 40
"""Examples that a calibration needs; a promise of any use needs hundreds."""

_LEVELS = 200
"""Thresholds that are tested, at equal steps of the confidences."""


@dataclass(frozen=True)
class Promise:
    """What is promised, and how surely.

    Attributes:
        kind: "quality", "regret" or "escalations".
        target: the least quality, or the most regret or escalations, in (0, 1).
        confidence: how surely, in (0, 1); None promises the expectation.
    """

    kind: PromiseKind
    target: float
    confidence: float | None = 0.95

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"promise is one of {', '.join(KINDS)}, got {self.kind!r}.")
        if not 0 < self.target < 1:
            raise ValueError(f"target must lie between 0 and 1, got {self.target}.")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {self.confidence}.")
        if self.confidence is None and self.kind == "quality":
            raise ValueError(
                "A quality can be promised with a confidence alone: in expectation, the method needs that asking always "
                "keeps the promise. Give a confidence, or promise a regret."
            )

    @property
    def risk(self) -> float:
        """The risk not to be exceeded."""
        return 1 - self.target if self.kind == "quality" else self.target

    def losses(self, table: Table) -> Array:
        """The losses `[n, m]` whose mean is the risk."""
        if self.kind == "quality":
            return 1 - table.qualities
        if self.kind == "escalations":
            return table.asked
        return np.maximum(0, table.attached[:, None] - table.qualities)

    def of_risk(self, risk: float) -> float:
        """The target that belongs to a risk."""
        return 1 - risk if self.kind == "quality" else risk


@dataclass(frozen=True)
class Calibration:
    """A threshold with its promise, and what the data showed. Saved and loaded by `storage`.

    Attributes:
        scorer: from a trace to a confidence.
        threshold: below this confidence the attached model takes over; may be infinite.
        takeover: per answer or per token.
        promise: what is promised.
        bound: what the second part of the data shows of this threshold with that confidence: a lower bound of the quality,
            or an upper one; in expectation, the mean.
        report: what was measured, on the second part where nothing else is said: "escalated" (share of answers), "quality",
            "shadow_quality", "attached_quality", "calibration_error_before", "calibration_error_after", "area" and
            "random_area" of the curve; "signal_areas" on the first part; "examples" of both.
        curve: quality against share on the second part; None once loaded from a file.
        provenance: versions, models, data and settings.
    """

    scorer: Scorer
    threshold: float
    takeover: Takeover
    promise: Promise
    bound: float
    report: dict[str, Any]
    curve: Curve | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def calibrate(
    outcomes: Sequence[Outcome],
    promise: Promise,
    *,
    takeover: Takeover = "answer",
    signals: Sequence[str] | None = None,
    seed: int = 0,
) -> Calibration:
    """Find the threshold that keeps a promise and asks least; for a share of escalations, the one that asks most.

    Args:
        outcomes: examples that neither network was trained on, like those to come.
        promise: what is promised.
        takeover: where the attached model takes over; per token needs outcomes that were measured so.
        signals: the signals to choose from; None takes all that the takeover allows.
        seed: of the division into two parts.

    Raises:
        ValueError: too few examples, an unknown signal, or a promise that the data cannot carry; then the message says what
            can be promised.
    """
    if len(outcomes) < FEWEST:
        raise ValueError(f"A calibration needs {FEWEST} examples or more, got {len(outcomes)}.")
    names = tuple(signals or signals_for(takeover))
    unknown = set(names) - set(signals_for(takeover))
    if unknown:
        raise ValueError(
            f"No signal {', '.join(sorted(unknown))} for takeover={takeover!r}; take {', '.join(signals_for(takeover))}."
        )
    order = np.random.default_rng(seed).permutation(len(outcomes))
    first, second = ([outcomes[i] for i in part] for part in np.array_split(order, 2))
    fitted, areas = _compare(first, names, takeover, seed)
    chosen = max(areas, key=lambda name: areas[name])  # the first of the best
    sequence = _sequence(first, fitted[chosen], takeover, promise)
    scorer = fitted[chosen].scorer
    steps = [steps_of(outcome, scorer, takeover) for outcome in second]
    losses = promise.losses(tabulate(second, steps, np.sort(sequence)))[:, np.argsort(np.argsort(sequence))]
    place = _choose(losses, promise)
    threshold = float(sequence[place])
    curve = curve_of(second, steps)
    report = _report(second, steps, scorer, threshold) | {"area": curve.area, "random_area": curve.random_area}
    report |= {"signal_areas": areas, "examples": {"first_part": len(first), "second_part": len(second)}, "seed": seed}
    return Calibration(scorer, threshold, takeover, promise, _bound(losses[:, place], promise), report, curve)


def _compare(
    outcomes: list[Outcome], signals: tuple[str, ...], takeover: Takeover, seed: int
) -> tuple[dict[str, FittedScorer], dict[str, float]]:
    """The fitted scorer of each signal, and the area under its curve."""
    qualities = np.array([outcome.shadow for outcome in outcomes])
    traces = [outcome.trace for outcome in outcomes]
    fitted = {name: fit_scorer(name, traces, qualities, seed) for name in signals}
    return fitted, {name: curve_of(outcomes, _fitted_steps(outcomes, f, takeover)).area for name, f in fitted.items()}


def _fitted_steps(outcomes: list[Outcome], fitted: FittedScorer, takeover: Takeover) -> list[Steps]:
    """Where the attached model takes over on the examples that the scorer was fitted to."""
    levels = fitted.scorer.level(fitted.values)
    return [steps_of(o, fitted.scorer, takeover, float(level)) for o, level in zip(outcomes, levels, strict=True)]


def _sequence(outcomes: list[Outcome], fitted: FittedScorer, takeover: Takeover, promise: Promise) -> Array:
    """Thresholds in the order in which they are tested, the safest first, from the first part of the data alone.

    For escalations they rise from minus infinity. For a quality or a regret they fall from the threshold that did best.
    """
    steps = _fitted_steps(outcomes, fitted, takeover)
    values = np.concatenate([step.confidences for step in steps])
    levels = np.unique(np.quantile(values, np.linspace(0, 1, _LEVELS + 1), method="closest_observation"))
    thresholds = np.concatenate([[-np.inf], levels, [np.inf]])
    if promise.kind == "escalations":
        return thresholds
    risks = promise.losses(tabulate(outcomes, steps, thresholds)).mean(axis=0)
    best = len(risks) - 1 - int(np.argmin(risks[::-1]))  # of equals, the one that asks most
    return thresholds[best::-1]


def _choose(losses: Array, promise: Promise) -> int:
    """The place in the sequence, from losses `[n, m]` in its order.

    Raises:
        ValueError: not even the first threshold keeps the promise.
    """
    if promise.confidence is None:
        place = conformal_choice(losses, promise.risk)
        best = 1 / (len(losses) + 1)
    else:
        place = fixed_sequence_choice(losses, promise.risk, 1 - promise.confidence)
        best = upper_bound(losses[:, 0], 1 - promise.confidence)
    if place is not None:
        return place
    how = "in expectation" if promise.confidence is None else f"with confidence {promise.confidence:g}"
    digits = 1e4  # rounded to the side on which the promise holds
    shown = math.floor(promise.of_risk(best) * digits) if promise.kind == "quality" else math.ceil(best * digits)
    raise ValueError(
        f"These data cannot carry {promise.kind} {promise.target:g} {how}: the best that can be promised is "
        f"{shown / digits:g}, from {len(losses)} examples that test thresholds. On other rows, give that as target; or give "
        "more data, or less confidence."
    )


def _bound(losses: Array, promise: Promise) -> float:
    risk = float(losses.mean()) if promise.confidence is None else upper_bound(losses, 1 - promise.confidence)
    return promise.of_risk(risk)


def _report(outcomes: list[Outcome], steps: list[Steps], scorer: Scorer, threshold: float) -> dict[str, Any]:
    """What was measured on the second part of the data."""
    at = tabulate(outcomes, steps, np.array([threshold]))
    raw = np.array([scorer.raw(outcome.trace) for outcome in outcomes])
    calibrated = np.array([scorer(outcome.trace) for outcome in outcomes])
    return {
        "escalated": float(at.asked.mean()),
        "quality": float(at.qualities.mean()),
        "shadow_quality": float(at.shadow.mean()),
        "attached_quality": float(at.attached.mean()),
        "calibration_error_before": calibration_error(raw, at.shadow),
        "calibration_error_after": calibration_error(calibrated, at.shadow),
    }
