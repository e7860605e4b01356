"""What a model is worth on a split, example by example, from one forward over prompts and right completions.

Greedy decoding writes the right completion exactly if every token of it (the end token too) is the most probable one after
the right tokens before it, so exact match needs no generation. Of a classifier the class is the one token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.methods import Contender
from benchmarks.quality.real.batches import collate
from benchmarks.quality.training import IGNORE

BATCH = 16
Scores: TypeAlias = dict[str, Any]


@dataclass
class Answers:
    """Per example: summed loss in nats, number of targets, and whether all of them are the first choice."""

    loss: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    exact: list[int] = field(default_factory=list)

    def add(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Count logits `[N, T, C]` of targets `[N, T]`; returns the first choices `[N, T]`."""
        here, choices = targets.ne(IGNORE), logits.argmax(-1)
        losses = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none").sum(1)
        self.loss += [round(loss, 5) for loss in losses.tolist()]
        self.tokens += here.sum(1).tolist()
        self.exact += (choices.eq(targets) | ~here).all(-1).int().tolist()
        return choices

    def scores(self, prefix: str = "") -> Scores:
        """Mean loss in nats per target, share of examples that are right, and both of every example."""
        means = {"loss": sum(self.loss) / sum(self.tokens), "exact": sum(self.exact) / len(self.exact)}
        return {f"{prefix}{name}": value for name, value in {**means, "each": vars(self)}.items()}


@torch.no_grad()
def score(contender: Contender, rows: list[dict[str, Any]]) -> Scores:
    """Scores of the attached model and, where there is one, of the shadow; `agreement` is over all targets."""
    contender.model.eval()
    attached, detached, agreed = Answers(), Answers(), 0
    device = next(contender.model.parameters()).device
    for start in range(0, len(rows), BATCH):
        inputs = {name: one.to(device) for name, one in collate(rows[start : start + BATCH]).items()}
        labels = inputs.pop("labels")
        targets = labels[:, None] if labels.dim() == 1 else F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        logits, shadow_logits = (None if found is None else _of(found, labels) for found in contender.logits(inputs))
        assert logits is not None
        choices = attached.add(logits, targets)
        if shadow_logits is not None:
            agreed += int((detached.add(shadow_logits, targets).eq(choices) & targets.ne(IGNORE)).sum())
    scores = attached.scores()
    if detached.loss:
        scores |= detached.scores("detached_") | {"agreement": agreed / sum(detached.tokens)}
    return scores


def bare(model: nn.Module) -> Contender:
    """A model without an adapter, to be scored."""
    return Contender(model, lambda inputs: (model(**inputs).logits, None))


def _of(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits `[N, T, C]`, of a classifier `[N, 1, C]`."""
    return logits[:, None] if labels.dim() == 1 else logits
