"""What a model is worth on a split, from one forward over prompts and right completions.

Greedy decoding writes the right completion exactly if every token of it (the end token too) is the most probable one after
the right tokens before it, so exact match needs no generation. Where a method has a shadow, its own logits are scored beside
the attached model's, and `agreement` is the share of completion tokens on which both have the same first choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.training import IGNORE, Row, collate

BATCH = 40
Scores: TypeAlias = dict[str, float]
Inputs: TypeAlias = dict[str, Tensor]
Logits: TypeAlias = Callable[[Inputs], tuple[Tensor, Tensor | None]]
"""Inputs -> logits `[B, T, V]` of the attached model and of the shadow."""


@dataclass
class Tally:
    """Sums over completion tokens and over rows."""

    loss: float = 0.0
    exact: int = 0
    tokens: int = 0
    rows: int = 0

    def add(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Count logits `[N, T, V]`; returns the first choices `[N, T]`."""
        here, choices = targets.ne(IGNORE), logits.argmax(-1)
        self.loss += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"))
        self.exact += int((choices.eq(targets) | ~here).all(-1).sum())
        self.tokens += int(here.sum())
        self.rows += len(targets)
        return choices

    def scores(self, prefix: str = "") -> Scores:
        """Mean loss in nats per completion token, and the share of rows that are right."""
        return {f"{prefix}loss": self.loss / self.tokens, f"{prefix}exact": self.exact / self.rows}


@torch.no_grad()
def score(model: nn.Module, logits_of: Logits, rows: list[Row]) -> Scores:
    """Scores of the attached model and, where there is one, of the shadow."""
    model.eval()
    attached, detached, agreed = Tally(), Tally(), 0
    for start in range(0, len(rows), BATCH):
        inputs = collate(rows[start : start + BATCH])
        targets = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE)
        logits, shadow_logits = logits_of(inputs)
        choices = attached.add(logits, targets)
        if shadow_logits is not None:
            agreed += int((detached.add(shadow_logits, targets).eq(choices) & targets.ne(IGNORE)).sum())
    scores = attached.scores()
    if detached.rows:
        scores |= detached.scores("detached_") | {"agreement": agreed / detached.tokens}
    return scores
