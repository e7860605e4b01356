"""The tokens that drafts are chosen among: those of the adapter's labels in training, of the prompt, and of the text so far.

The head of a vocabulary of 50,000 tokens is a fifth of the weights of a small base, and nearly all that a drafted token
costs. Drafts are proposals, so they need no token that is never right: the shadow's logits are computed with the S rows of
the head whose tokens are likely, all other logits are FLOOR, and the base still writes every token. The softmax of these
logits is what is sampled from, so sampling stays exact. The idea of likely tokens is that of FR-Spec (arXiv 2502.14856).

A token outside ends a draft. The base's tokens are counted: while more than an eighth of the latest ones lay outside, drafts
read the whole head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from shadow_peft.base.task_head import TaskHead

FLOOR = -1e4
"""Logit of a token outside: its probability is 0 in float32, yet processors that leave no other token find a finite one."""
MOST_OUTSIDE = 1 / 8
"""Share of the latest tokens outside, above which drafts read the whole head."""
KEPT_PER_TOKEN = 0.95
"""What is left of both counts after another token."""
PRIOR_TOKENS = 8.0
"""Tokens inside that a generation begins with."""


class DraftVocabulary:
    """The S likely tokens of one generation.

    Args:
        ids: distinct token ids `[S]`, on the device of the states.
        vocab_size: V.

    Attributes:
        ids: with those that were taken in.
        size: V.
    """

    def __init__(self, ids: Tensor, vocab_size: int) -> None:
        self.ids, self.size = ids, vocab_size
        self._is_inside = torch.zeros(vocab_size, dtype=torch.bool, device=ids.device).index_fill_(0, ids, True)
        self._heads: dict[TaskHead, Callable[[Tensor], Tensor]] = {}
        self._outside, self._seen = 0.0, PRIOR_TOKENS

    @property
    def share(self) -> float:
        """S / V."""
        return len(self.ids) / self.size

    @property
    def is_used(self) -> bool:
        """Whether few enough of the latest tokens lay outside."""
        return self._outside <= MOST_OUTSIDE * self._seen

    def add(self, tokens: Tensor) -> None:
        """Take in the tokens `[N]` of a text."""
        tokens = tokens.to(self.ids.device)
        new = tokens[~self._are_inside(tokens) & tokens.ge(0) & tokens.lt(self.size)].unique()
        if len(new):
            self._is_inside[new] = True
            self.ids = torch.cat([self.ids, new])

    def update(self, tokens: Tensor) -> None:
        """Count the tokens `[N]` that the base wrote, and take them in."""
        for inside in self._are_inside(tokens.to(self.ids.device)).tolist():
            self._outside = KEPT_PER_TOKEN * self._outside + (not inside)
            self._seen = KEPT_PER_TOKEN * self._seen + 1
        self.add(tokens)

    def _are_inside(self, tokens: Tensor) -> Tensor:
        """Whether tokens `[N]` are among the likely ones; ids that the head has no row for, as those of images, are not."""
        return self._is_inside[tokens.clamp(0, self.size - 1)] & tokens.ge(0) & tokens.lt(self.size)

    def narrowed(self, head: TaskHead) -> Callable[[Tensor], Tensor]:
        """The head that computes the logits of these tokens alone; the head itself where its rows cannot be read."""
        if head not in self._heads:
            rows = head.select(self.ids, self.size)
            self._heads[head] = head if rows is None else _NarrowHead(self, head, rows)
        return self._heads[head]

    def spread(self, logits: Tensor) -> Tensor:
        """Logits `[..., S]` of these tokens among those of all, `[..., V]`."""
        every = logits.new_full((*logits.shape[:-1], self.size), FLOOR)
        return every.index_copy_(-1, self.ids, logits)


class _NarrowHead:
    """A head with the rows of a vocabulary that grows."""

    def __init__(self, vocabulary: DraftVocabulary, head: TaskHead, rows: tuple[Tensor, ...]) -> None:
        self._vocabulary, self._head, self._rows = vocabulary, head, rows

    def __call__(self, states: Tensor) -> Tensor:
        """Logits `[..., V]` of states `[..., d]`."""
        if len(self._rows[0]) < len(self._vocabulary.ids):
            new = self._head.select(self._vocabulary.ids[len(self._rows[0]) :], self._vocabulary.size)
            assert new is not None
            self._rows = tuple(map(torch.cat, zip(self._rows, new, strict=True)))
        weight, *bias = self._rows
        return self._vocabulary.spread(F.linear(states.to(weight.dtype), weight, *bias))
