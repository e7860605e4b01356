"""A generation without networks: an oracle drafts, passes take what a fake clock is told they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from shadow_peft.generation import pass_times
from shadow_peft.generation.draft_length import DraftLength
from shadow_peft.generation.drafting import grow_draft
from shadow_peft.generation.pass_times import Costs, PassTimes

VOCABULARY = 64


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(pass_times, "clock", lambda: self.seconds)


@dataclass
class World:
    """What things take, in seconds: a base pass, a token more in it, the backbone and the head for one drafted token.

    `noise(i)` is a factor on the i-th thing that happens; `prior` is what the model believes before it measures.
    """

    verify: float
    draft: float
    base: float = 1.0
    noise: Callable[[int], float] = lambda i: 1.0
    prior: Costs | None = None
    events: int = 0

    def takes(self, clock: Clock, seconds: float) -> None:
        clock.seconds += seconds * self.noise(self.events)
        self.events += 1

    def believed(self) -> Costs:
        return self.prior or Costs(self.draft / self.base, self.verify / self.base)


@dataclass
class Oracle:
    """Texts whose place `i` the shadow drafts rightly where `right[row, i]`, and is `sure[row, i]` of."""

    right: Tensor
    sure: Tensor
    world: World
    clock: Clock
    lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = torch.zeros(len(self.right), dtype=torch.long)

    going_on = slice(None)

    def _at(self, values: Tensor, ahead: int) -> Tensor:
        return values.gather(1, (self.lengths + ahead).clamp(max=values.shape[1] - 1)[:, None])[:, 0]

    def state_of_last(self, ahead: int) -> Tensor:
        self.world.takes(self.clock, self.world.draft)
        return torch.zeros(len(self.right), 1, 1)

    def processed_logits(self, state: Tensor, ahead: int) -> Tensor:
        sure = self._at(self.sure, ahead)[:, None]
        rest = ((1 - sure) / (VOCABULARY - 1)).expand(-1, VOCABULARY - 1)
        return torch.cat([sure, rest], 1).log()

    def append(self, tokens: Tensor, ahead: int) -> bool:
        return True

    def accepted(self, count: int) -> list[int]:
        rights = [self._at(self.right, ahead) for ahead in range(count)]
        return torch.stack(rights, 1).long().cumprod(1).sum(1).tolist() if count else [0] * len(self.right)


def decode(oracle: Oracle, length: DraftLength, tokens: int, most: int = 20) -> float:
    """Seconds that a generation of so many tokens a row takes, drafts included; rows that are done wait for the others."""
    started, config = oracle.clock.seconds, SimpleNamespace(do_sample=False, assistant_confidence_threshold=0.0)
    while int(oracle.lengths.min()) < tokens:
        room = int((tokens - oracle.lengths).max()) - 1
        draft = grow_draft(oracle, SimpleNamespace(), config, length, min(most, room))
        count = 0 if draft is None else draft.tokens.shape[1]
        oracle.world.takes(oracle.clock, oracle.world.base + count * oracle.world.verify)
        accepted = oracle.accepted(count)
        length.update([[]] * len(accepted) if draft is None else draft.confidences.tolist(), accepted)
        oracle.lengths += torch.tensor(accepted) + 1
    return oracle.clock.seconds - started


def known_times(world: World) -> PassTimes:
    """Times of a model whose passes without drafts were measured before."""
    times = PassTimes(world.believed())
    for _ in range(3):
        times.add_pass(0, world.base)
    return times


def adaptive(world: World) -> DraftLength:
    """Lengths that adapt, of a model's first drafts."""
    return DraftLength(known_times(world))


def best_fixed(make: Callable[[], Oracle], tokens: int, most: int = 20) -> float:
    """Seconds of the best draft length that never changes, no draft included."""
    return min(decode(make(), DraftLength(None), tokens, limit) for limit in range(most + 1))
