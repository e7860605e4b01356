"""Bounds of a risk that hold for every distribution, from n independent losses in [0, 1].

    losses 0 or 1    P(Bin(n, a) <= k), the exact p-value of "the risk is a or more"; inverted, it is Clopper-Pearson's bound
    other losses     Hoeffding-Bentkus: min(exp(-n KL(min(m, a), a)), e P(Bin(n, a) <= ceil(n m))), m their mean

A threshold is chosen by testing a fixed order of thresholds, the safest first, until one is not proven: then the error of
the whole choice is at most that of one test. `conformal_choice` is conformal risk control (arXiv 2208.02814): it bounds the
expectation, over the data and the next example.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_STEPS = 60
"""Halvings of an interval; the rest is far below the precision of a double."""


def p_value(losses: Array, risk: float) -> float:
    """How likely so small losses `[n]` are at most, if the risk is `risk` or more."""
    from scipy.stats import binom

    n, mean = len(losses), float(losses.mean())
    if not 0 < risk < 1:
        return 1.0 if risk <= 0 else 0.0
    if is_binary(losses):
        return float(binom.cdf(round(mean * n), n, risk))
    hoeffding = math.exp(-n * _divergence(min(mean, risk), risk))
    bentkus = math.e * float(binom.cdf(math.ceil(mean * n - 1e-9), n, risk))
    return min(1.0, hoeffding, bentkus)


def upper_bound(losses: Array, error: float) -> float:
    """The least risk that losses `[n]` exclude with an error of at most `error`; Clopper-Pearson's for losses 0 and 1."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(losses, middle) <= error else (middle, high)
    return high


def fixed_sequence_choice(losses: Array, risk: float, error: float) -> int | None:
    """The last column of losses `[n, m]`, tested in order, up to which all are proven to have a risk below `risk`.

    Args:
        losses: a column for each threshold, in an order that does not depend on these losses.
        risk: the risk not to be exceeded.
        error: how likely a wrong choice may be.

    Returns:
        Its index, or None if the first is not proven.
    """
    chosen = None
    for column in range(losses.shape[1]):
        if p_value(losses[:, column], risk) > error:
            break
        chosen = column
    return chosen


def conformal_choice(losses: Array, risk: float) -> int | None:
    """The last column of losses `[n, m]` whose expected loss on the next example is at most `risk`.

    Losses of an example that fall along the order are raised to what they were before, since the method needs losses that
    do not fall. The first column must be one whose loss never exceeds `risk`.

    Returns:
        Its index, or None if there are too few examples.
    """
    n = len(losses)
    raised = np.maximum.accumulate(losses, axis=1)
    allowed = (raised.sum(axis=0) + 1) / (n + 1) <= risk
    return int(allowed.nonzero()[0][-1]) if allowed.any() else None


def is_binary(losses: Array) -> bool:
    """Whether all losses are 0 or 1."""
    return bool(np.isin(losses, (0.0, 1.0)).all())


def _divergence(mean: float, risk: float) -> float:
    """KL divergence of two Bernoulli distributions, in nats."""
    parts = [(mean, risk), (1 - mean, 1 - risk)]
    return sum(a * math.log(a / b) for a, b in parts if a > 0)
