"""What calibration data show: for each example, what the answer is worth wherever the attached model takes over.

A threshold decides where that is. So one measurement of the two networks tells what every threshold would have done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from shadow_peft.cascade.bounds import Array
from shadow_peft.cascade.scorer import Scorer
from shadow_peft.cascade.signals import TOKEN_SIGNALS, Takeover
from shadow_peft.cascade.trace import Trace

Quality = Callable[[str, str], float]
"""An answer and the reference -> what the answer is worth, in [0, 1]."""


def exact_match(answer: str, reference: str) -> float:
    """1 if the answer is the reference, but for whitespace around them; else 0."""
    return float(answer.strip() == reference.strip())


def word_overlap(answer: str, reference: str) -> float:
    """The F1 of the words of the answer and those of the reference, without regard to case and order."""
    given, wanted = answer.lower().split(), reference.lower().split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum(min(given.count(word), wanted.count(word)) for word in set(given))
    return 2 * common / (len(given) + len(wanted))


def json_fields(answer: str, reference: str) -> float:
    """The share of the fields of the reference, a JSON object, that the answer has right; 0 if that is no JSON object.

    Raises:
        ValueError: the reference is no JSON object with fields.
    """
    wanted = json.loads(reference)
    if not isinstance(wanted, dict) or not wanted:
        raise ValueError(f"json_fields compares JSON objects with fields, the reference is {reference[:40]!r}.")
    try:
        given = json.loads(answer)
    except ValueError:
        return 0.0
    if not isinstance(given, dict):
        return 0.0
    return sum(key in given and given[key] == value for key, value in wanted.items()) / len(wanted)


QUALITIES: dict[str, Quality] = {
    "exact_match": exact_match,
    "word_overlap": word_overlap,
    "json_fields": json_fields,
}
"""Measures of quality that the command line knows by name."""


@dataclass(frozen=True)
class Outcome:
    """One example.

    Attributes:
        trace: of the shadow's whole answer.
        shadow: the quality of that answer, in [0, 1].
        takeovers: token from which the attached model writes -> the quality of the answer then. 0 is always there: the
            attached model writes all.
    """

    trace: Trace
    shadow: float
    takeovers: dict[int, float]

    def __post_init__(self) -> None:
        if 0 not in self.takeovers:
            raise ValueError("An outcome needs the quality of the attached model's whole answer: takeovers[0].")
        wrong = [q for q in (self.shadow, *self.takeovers.values()) if not 0 <= q <= 1]
        if wrong:
            raise ValueError(f"A quality lies between 0 and 1, got {wrong[0]}.")


def record_lows(values: Sequence[float]) -> list[int]:
    """Positions of values that are lower than all before: where a falling threshold can strike first."""
    lows: list[int] = []
    for position, value in enumerate(values):
        if not lows or value < values[lows[-1]]:
            lows.append(position)
    return lows


def takeover_positions(trace: Trace) -> list[int]:
    """All tokens at which some signal and threshold would let the attached model take over."""
    return sorted({position for values in TOKEN_SIGNALS.values() for position in record_lows(values(trace))})


@dataclass(frozen=True)
class Steps:
    """The steps of one example: at thresholds above `confidences[k]` the attached model writes from `positions[k]` on.

    Attributes:
        confidences: falling; at thresholds not above the last, the shadow's answer stands.
        positions: tokens from which the attached model writes.
    """

    confidences: list[float]
    positions: list[int]


def steps_of(outcome: Outcome, scorer: Scorer, takeover: Takeover, answer_confidence: float | None = None) -> Steps:
    """Where the attached model takes over, by threshold.

    Args:
        outcome: the example.
        scorer: its confidence.
        takeover: per answer or per token.
        answer_confidence: the confidence in the answer, where it is known better than by the scorer.
    """
    if takeover == "answer":
        return Steps([scorer(outcome.trace) if answer_confidence is None else answer_confidence], [0])
    confidences = scorer.of_tokens(outcome.trace)
    lows = record_lows(confidences)
    return Steps([confidences[position] for position in lows], lows)


@dataclass(frozen=True)
class Table:
    """What thresholds would have done to n examples.

    Attributes:
        thresholds: `[m]`, rising.
        qualities: `[n, m]`.
        asked: 1 where the attached model was asked, else 0, `[n, m]`.
        shadow: quality of the shadow alone, `[n]`.
        attached: quality of the attached model alone, `[n]`.
    """

    thresholds: Array
    qualities: Array
    asked: Array
    shadow: Array
    attached: Array


def tabulate(outcomes: Sequence[Outcome], steps: Sequence[Steps], thresholds: Array) -> Table:
    """What thresholds `[m]`, rising, would have done to the examples."""
    shadow = np.array([outcome.shadow for outcome in outcomes])
    attached = np.array([outcome.takeovers[0] for outcome in outcomes])
    qualities = np.repeat(shadow[:, None], len(thresholds), axis=1)
    asked = np.zeros_like(qualities)
    for row, (outcome, step) in enumerate(zip(outcomes, steps, strict=True)):
        for confidence, position in zip(reversed(step.confidences), reversed(step.positions), strict=True):
            first = int(np.searchsorted(thresholds, confidence, side="right"))
            qualities[row, first:] = outcome.takeovers[position]
            asked[row, first:] = 1.0
    return Table(thresholds, qualities, asked, shadow, attached)


def save_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write outcomes as JSON lines, since measuring them takes longest."""
    path.write_text("".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes), encoding="utf-8")


def load_outcomes(path: Path) -> list[Outcome]:
    """Read what `save_outcomes` wrote."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        trace = Trace(**{name: tuple(values) for name, values in data["trace"].items()})
        found.append(Outcome(trace, data["shadow"], {int(k): q for k, q in data["takeovers"].items()}))
    return found
