"""How likely the base accepts a drafted token, learned from what it accepted of the drafts before.

    p(c) = (A_b + 2 p0(c)) / (V_b + 2)            the bucket b of the shadow's confidence c: accepted of verified tokens
    p0(c) = (c A / C + A / V) / 2                 what all buckets say: half as the shadow is sure, half as it was right

    A, V, C    decaying sums over verified tokens: accepted ones, all, and their confidences; A_b, V_b those of a bucket

So a shadow that is right though never sure is soon believed, and one that is sure and never right is not.
"""

from __future__ import annotations

from bisect import bisect
from typing import NamedTuple

import torch
from torch import Tensor

BOUNDS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Where the buckets of confidence end; the last one ends at 1."""
KEPT_PER_TOKEN = 0.95
"""What is left of every count after another verified token a row."""
PRIOR_WEIGHT = 2.0
"""Verified tokens that p0 weighs as much as."""


class Experience(NamedTuple):
    """What a generation leaves to the next one of the same model over as many rows.

    Attributes:
        rate: how often drafted tokens were right.
        account: what drafts won, less what they cost, in base passes.
    """

    rate: float
    account: float


class AcceptanceEstimate:
    """The counts of one generation; they start as if two tokens that the shadow was sure of had been right by `rate`."""

    def __init__(self, rate: float = 0.9) -> None:
        self._accepted, self._verified, self._confident = 2.0 * rate, 2.0, 2.0
        self._accepted_in, self._verified_in = ([0.0] * (len(BOUNDS) + 1) for _ in range(2))
        self._expected, self._seen = 2.0 * rate, 2.0

    @property
    def rate(self) -> float:
        """Chance of the next token, before anything is known of it: how often drafted ones were right."""
        return self._expected / self._seen

    def chances(self, confidences: Tensor) -> Tensor:
        """p `[B]` of tokens whose likeliest choice has probability c `[B]`; no token itself is looked at."""
        return torch.tensor([self._chance(c) for c in confidences.tolist()], device=confidences.device)

    def _chance(self, confidence: float) -> float:
        bucket = bisect(BOUNDS, confidence)
        prior = (confidence * self._accepted / self._confident + self._accepted / self._verified) / 2
        accepted = self._accepted_in[bucket] + PRIOR_WEIGHT * min(1.0, prior)
        return accepted / (self._verified_in[bucket] + PRIOR_WEIGHT)

    def update(self, confidences: list[list[float]], accepted: list[int]) -> None:
        """Count one pass; tokens behind the first rejected one were not verified.

        Args:
            confidences: of every drafted token of every row.
            accepted: how many of them the base accepted.
        """
        if not any(confidences):
            return
        verified = [min(right + 1, len(row)) for row, right in zip(confidences, accepted, strict=True)]
        self._decay(KEPT_PER_TOKEN ** (sum(verified) / len(verified)))
        for row, right in zip(confidences, accepted, strict=True):
            for place, confidence in enumerate(row[: right + 1]):
                self._count(confidence, float(place < right))

    def count_expected(self, chance: float) -> None:
        """Count a token that was not worth verifying as right with this chance: the next one may be no better."""
        self._expected, self._seen = KEPT_PER_TOKEN * self._expected + chance, KEPT_PER_TOKEN * self._seen + 1

    def _count(self, confidence: float, accepted: float) -> None:
        bucket = bisect(BOUNDS, confidence)
        self._accepted_in[bucket] += accepted
        self._verified_in[bucket] += 1
        self._accepted += accepted
        self._verified += 1
        self._confident += confidence
        self._expected += accepted
        self._seen += 1

    def _decay(self, kept: float) -> None:
        for name in ("_accepted", "_verified", "_confident", "_expected", "_seen"):
            setattr(self, name, kept * getattr(self, name))
        for counts in (self._accepted_in, self._verified_in):
            counts[:] = (kept * count for count in counts)
