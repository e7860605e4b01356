"""What a cascade answers, and what decides who answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from shadow_peft.cascade.scorer import Scorer
from shadow_peft.cascade.signals import TOKEN_SIGNALS, Takeover, signals_for
from shadow_peft.cascade.trace import Trace


class AnsweredBy(StrEnum):
    """Who answered."""

    SHADOW = "shadow"
    ATTACHED = "attached"
    SHADOW_THEN_ATTACHED = "shadow, then attached"
    REMOTE = "remote"
    SHADOW_THEN_REMOTE = "shadow, then remote"
    SHADOW_REMOTE_FAILED = "shadow (remote failed)"


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: the answer; of a classifier, the name of the class.
        answered_by: who answered.
        confidence: that in the shadow's answer, or in the token where the attached model took over, in [0, 1].
        shadow_tokens: how many tokens of the answer the shadow wrote.
        tokens: the ids of the answer's tokens, the one that ends it included; None where a remote model wrote some of them.
            Of a classifier, the index of the class.
        reason: why the remote model gave no answer, where it was asked and failed.
    """

    text: str
    answered_by: AnsweredBy
    confidence: float
    shadow_tokens: int
    tokens: tuple[int, ...] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Policy:
    """When the attached model takes over: where the confidence is below the threshold.

    Attributes:
        scorer: from a trace to a confidence.
        threshold: minus infinity never asks, infinity always.
        takeover: per answer, or within it at the first unsure token.
    """

    scorer: Scorer
    threshold: float
    takeover: Takeover = "answer"

    def __post_init__(self) -> None:
        if self.threshold != self.threshold:
            raise ValueError("The threshold is not a number.")
        signals_for(self.takeover)
        if self.takeover == "token" and self.scorer.signal not in TOKEN_SIGNALS:
            raise ValueError(
                f"The signal {self.scorer.signal!r} needs the whole answer, so takeover='token' cannot use it; it can use "
                f"{', '.join(TOKEN_SIGNALS)}."
            )

    def decide(self, trace: Trace) -> tuple[int | None, float]:
        """The token from which the attached model writes, or None, and the confidence that decided it."""
        if self.takeover == "answer":
            confidence = self.scorer(trace)
            return (0 if confidence < self.threshold else None), confidence
        confidences = self.scorer.of_tokens(trace)
        first = next((i for i, confidence in enumerate(confidences) if confidence < self.threshold), None)
        return first, min(confidences) if first is None else confidences[first]
