"""How many tokens a draft gets: another one while it is expected to win more tokens per cost than the pass so far.

A pass of the base and a draft of n tokens cost 1 + n (d + v), in base passes, and are expected to win 1 + a_1 + .. + a_n
tokens, a_i being the chance that the base accepts all of the first i. Costs are measured (see `pass_times`), chances are
learned (see `acceptance`). A token is decided on twice: before the shadow computes it, by how often the shadow is right, and
before it is drawn, by the shadow's confidence, since verifying costs v more. Neither decision sees the token, so sampling
stays unbiased.

Drafts have an account, in base passes: what they won, less what they cost. It starts with a credit of 2, and no draft risks
more than half of what is there. While nothing is drafted, every pass sets 1/64 aside, which pays for a token that tries
again; a try that wins is followed by another. So a shadow that is never right costs no more than 2 base passes and 1/64 of
decoding without drafts, at any batch size.

Account, at most that credit, and how often drafts were right go on in the next generation of the same model and number of
rows. It has one try besides. So where drafts do not pay, later generations lose that try and 1/64; where they do again, the
try is followed by others.

With the schedule "constant", drafts end only at `num_assistant_tokens` or below `assistant_confidence_threshold`.
"""

from __future__ import annotations

from torch import Tensor

from shadow_peft.generation import pass_times
from shadow_peft.generation.acceptance import AcceptanceEstimate, Experience
from shadow_peft.generation.pass_times import Costs, PassTimes

CREDIT, RISKED, SET_ASIDE, FIRST_TRY = 2.0, 0.5, 1 / 64, 1.0


class DraftLength:
    """The lengths of one generation's drafts, for one row or the mean of several.

    Args:
        times: what passes take; None for drafts that do not adapt.
    """

    def __init__(self, times: PassTimes | None) -> None:
        before = None if times is None else times.experience
        self._times, self._estimate = times, AcceptanceEstimate() if before is None else AcceptanceEstimate(before.rate)
        self._account = CREDIT if before is None else min(CREDIT, before.account)
        self._saved = 0.0 if before is None else FIRST_TRY
        self._costs = Costs(0.0, 0.0)
        self._chances: Tensor | float = 1.0
        self._chance = self._won = self._spent = 1.0
        self._steps = self._tokens = 0
        self._tries = False
        self._began: float | None = None
        self._ended: float | None = None

    def begin(self) -> None:
        """The draft of another pass begins, and the pass before it, if there was one, has ended."""
        if self._times is None:
            return
        self._began = pass_times.clock()
        if self._ended is not None:
            self._times.add_pass(self._tokens, self._began - self._ended)
        self._costs = self._times.costs()
        self._chances = self._chance = self._won = self._spent = 1.0
        self._steps = self._tokens = 0
        self._tries = False

    def end(self) -> None:
        """The draft has ended, and the pass that verifies it begins."""
        if self._times is None or self._began is None:
            return
        self._ended = pass_times.clock()
        if self._steps:
            self._times.add_draft(self._steps, self._ended - self._began)

    def drafts(self) -> bool:
        """Whether to draft the next token, by how often the shadow is right."""
        if self._times is None:
            return True
        if not self._times.knows_base:
            return False
        cost = sum(self._costs)
        pays = self._chance * self._estimate.rate * self._spent >= cost * self._won
        affordable = self._spent - 1 + cost <= RISKED * self._account
        if self._steps == 0:
            self._tries = self._saved >= cost and not (pays and affordable)
        drafts = self._steps == 0 if self._tries else pays and affordable
        if drafts:
            self._steps += 1
            self._spent += self._costs.draft
        return drafts

    def verifies(self, confidence: Tensor) -> bool:
        """Whether the token that is about to be drawn is worth verifying, by the shadow's confidence `[B]` in it."""
        if self._times is None:
            return True
        chances = self._estimate.chances(confidence)
        self._chances = self._chances * chances
        chance = float(self._chances.mean())
        if not self._tries and chance * self._spent < self._costs.verify * self._won:
            self._estimate.count_expected(float(chances.mean()))
            return False
        self._chance = chance
        self._won += chance
        self._spent += self._costs.verify
        self._tokens += 1
        return True

    def update(self, confidences: list[list[float]], accepted: list[int]) -> None:
        """Book what the base accepted of every row's draft."""
        if self._times is None:
            return
        self._estimate.update(confidences, accepted)
        lost = self._spent - 1 - sum(accepted) / max(1, len(accepted))
        if self._steps == 0:
            self._saved += SET_ASIDE
        elif self._tries and lost > 0:
            self._saved = 0.0
        else:
            self._account -= lost
        self._times.experience = Experience(self._estimate.rate, self._account)
