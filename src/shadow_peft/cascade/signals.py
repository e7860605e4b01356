"""Signals of confidence: one number in [0, 1] of a trace, the more the surer.

    min_probability    min_t p_t                 min_margin    min_t m_t        certainty    min_t c_t
    mean_probability   exp(mean_t log p(x_t))    mean_margin   mean_t m_t       head         a logistic regression over all

p_t, m_t, c_t: probability, margin and certainty of `trace`. A signal that is the minimum over the tokens can be read after
each of them, so the attached model can take over within an answer; the others need the whole answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from shadow_peft.cascade.trace import Trace

Takeover = Literal["answer", "token"]

HEAD = "head"
"""The signal that is learned."""


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


TOKEN_SIGNALS: dict[str, Callable[[Trace], tuple[float, ...]]] = {
    "min_probability": lambda trace: trace.probabilities,
    "min_margin": lambda trace: trace.margins,
    "certainty": lambda trace: trace.certainties,
}
"""Signal -> its values token by token; that of the answer is their minimum."""

ANSWER_SIGNALS: dict[str, Callable[[Trace], float]] = {
    "min_probability": lambda trace: min(trace.probabilities),
    "mean_probability": lambda trace: math.exp(_mean(trace.log_probabilities)),
    "min_margin": lambda trace: min(trace.margins),
    "mean_margin": lambda trace: _mean(trace.margins),
    "certainty": lambda trace: min(trace.certainties),
}
"""Signal -> its value for an answer; without the head, which has weights."""


def signals_for(takeover: Takeover) -> tuple[str, ...]:
    """The signals that can decide a takeover per answer, or per token.

    Raises:
        ValueError: an unknown takeover.
    """
    if takeover == "answer":
        return (*ANSWER_SIGNALS, HEAD)
    if takeover == "token":
        return tuple(TOKEN_SIGNALS)
    raise ValueError(f"takeover is 'answer' or 'token', got {takeover!r}.")


def features(trace: Trace) -> list[float]:
    """What the head reads of a trace: the answer's signals, those near 1 as logarithms, and its length."""
    surprises = [-math.log(max(ANSWER_SIGNALS[name](trace), 1e-6)) for name in ("min_probability", "mean_probability")]
    rest = [ANSWER_SIGNALS[name](trace) for name in ("min_margin", "mean_margin", "certainty")]
    return [*surprises, *rest, _mean(trace.certainties), math.log(len(trace))]
