"""From a trace to a calibrated confidence: a signal, then a rising curve that isotonic regression fitted.

    confidence = g(signal(trace)),   g piecewise linear through the centres of the steps that isotonic regression finds

Isotonic regression alone is constant on each step, so thresholds could not tell the answers of a step apart. Centres joined
by lines (centred isotonic regression) rise strictly. Applying a scorer needs numpy alone; fitting one needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from shadow_peft.cascade.bounds import Array
from shadow_peft.cascade.signals import ANSWER_SIGNALS, HEAD, TOKEN_SIGNALS, features
from shadow_peft.cascade.trace import Trace

_FOLDS = 5


@dataclass(frozen=True)
class LogisticHead:
    """A logistic regression over the features of a trace.

    Attributes:
        weights: one for each feature.
        bias: added to their weighted sum.
    """

    weights: tuple[float, ...]
    bias: float

    def __call__(self, trace: Trace) -> float:
        """The probability that the answer is right."""
        return float(1 / (1 + np.exp(-(np.dot(self.weights, features(trace)) + self.bias))))


@dataclass(frozen=True)
class Scorer:
    """The calibrated confidence in an answer of the shadow, in [0, 1].

    Attributes:
        signal: one of `signals`.
        knots: values of the signal, rising strictly from 0 to 1.
        levels: the confidence at each knot, rising strictly.
        head: the weights of the signal "head"; None for the others.
    """

    signal: str = "min_margin"
    knots: tuple[float, ...] = (0.0, 1.0)
    levels: tuple[float, ...] = (0.0, 1.0)
    head: LogisticHead | None = None

    def __post_init__(self) -> None:
        known = (*ANSWER_SIGNALS, HEAD)
        if self.signal not in known:
            raise ValueError(f"signal is one of {', '.join(known)}, got {self.signal!r}.")
        if (self.head is not None) != (self.signal == HEAD):
            raise ValueError("A scorer has weights of a head exactly if its signal is 'head'.")
        if len(self.knots) != len(self.levels) or len(self.knots) < 2:
            raise ValueError("A scorer has as many knots as levels, at least two.")
        if any(b <= a for values in (self.knots, self.levels) for a, b in pairwise(values)):
            raise ValueError("The knots and the levels of a scorer rise strictly.")

    def raw(self, trace: Trace) -> float:
        """The signal itself."""
        return ANSWER_SIGNALS[self.signal](trace) if self.head is None else self.head(trace)

    def __call__(self, trace: Trace) -> float:
        """The confidence in the whole answer."""
        return float(self.level(self.raw(trace)))

    def level(self, values: Any) -> Any:
        """The confidence at values of the signal."""
        return np.interp(values, self.knots, self.levels)

    def of_tokens(self, trace: Trace) -> list[float]:
        """The confidence token by token; that in the answer is the least of them.

        Raises:
            ValueError: the signal needs the whole answer.
        """
        if self.signal not in TOKEN_SIGNALS:
            raise ValueError(f"The signal {self.signal!r} needs the whole answer; per token: {', '.join(TOKEN_SIGNALS)}.")
        return [float(value) for value in self.level(TOKEN_SIGNALS[self.signal](trace))]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        head = None if self.head is None else {"weights": list(self.head.weights), "bias": self.head.bias}
        return {"signal": self.signal, "knots": list(self.knots), "levels": list(self.levels), "head": head}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scorer:
        """From what `to_dict` returned."""
        stored = data["head"]
        head = None if stored is None else LogisticHead(tuple(map(float, stored["weights"])), float(stored["bias"]))
        return cls(data["signal"], tuple(map(float, data["knots"])), tuple(map(float, data["levels"])), head)


@dataclass(frozen=True)
class FittedScorer:
    """A scorer, and what its signal is on the traces that it was fitted to.

    Attributes:
        scorer: the scorer.
        values: the signal `[n]`; of a head, from regressions that have not seen the trace.
    """

    scorer: Scorer
    values: Array


def fit_scorer(signal: str, traces: Sequence[Trace], qualities: Array, seed: int = 0) -> FittedScorer:
    """Fit a scorer to traces and the qualities `[n]` of the shadow's answers, in [0, 1]."""
    if signal != HEAD:
        values = np.array([ANSWER_SIGNALS[signal](trace) for trace in traces])
        return FittedScorer(Scorer(signal, *_rising(values, qualities)), values)
    head, values = _fit_head(traces, qualities, seed)
    return FittedScorer(Scorer(signal, *_rising(values, qualities), head=head), values)


def _rising(values: Array, qualities: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Knots and levels of the centred isotonic regression; the levels are drawn in a little, so that both ends rise too."""
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0, y_max=1).fit_transform(values, qualities).round(9)
    margin = 1 / (2 * (len(values) + 1))
    steps = np.unique(fitted)
    points = [(float(values[fitted == step].mean()), float(margin + (1 - 2 * margin) * step)) for step in steps]
    if points[0][0] > 0:
        points.insert(0, (0.0, points[0][1] - margin / 2))
    if points[-1][0] < 1:
        points.append((1.0, points[-1][1] + margin / 2))
    knots, levels = zip(*points, strict=True)
    return knots, levels


def _fit_head(traces: Sequence[Trace], qualities: Array, seed: int) -> tuple[LogisticHead, Array]:
    """A logistic regression, and its probabilities `[n]` from folds that left the trace out.

    A quality between 0 and 1 counts as an answer that is right and one that is wrong, weighted so.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold
    from sklearn.preprocessing import StandardScaler

    x = np.array([features(trace) for trace in traces])

    def fit(rows: Any) -> LogisticHead:
        scaler = StandardScaler().fit(x[rows])
        doubled = np.concatenate([scaler.transform(x[rows])] * 2)
        labels = np.repeat([1, 0], len(rows))
        weights = np.concatenate([qualities[rows], 1 - qualities[rows]])
        present = [label for label in (1, 0) if weights[labels == label].sum() > 0]
        if len(present) == 1:
            return LogisticHead((0.0,) * x.shape[1], 10.0 if present == [1] else -10.0)
        model = LogisticRegression().fit(doubled, labels, sample_weight=weights)
        scaled = model.coef_[0] / scaler.scale_
        return LogisticHead(tuple(map(float, scaled)), float(model.intercept_[0] - scaled @ scaler.mean_))

    values = np.empty(len(x))
    for kept, left_out in KFold(_FOLDS, shuffle=True, random_state=seed).split(x):
        head = fit(kept)
        values[left_out] = [head(traces[i]) for i in left_out]
    return fit(np.arange(len(x))), values


def calibration_error(confidences: Array, qualities: Array, bins: int = 15) -> float:
    """Expected calibration error of confidences `[n]`: the mean gap to the quality `[n]`, over bins of equal width."""
    places = np.minimum((confidences * bins).astype(int), bins - 1)
    gaps = [abs(float((confidences - qualities)[places == place].sum())) for place in np.unique(places)]
    return sum(gaps) / len(confidences)
