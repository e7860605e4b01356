"""Which tokens were targets in training: what an adapter's answers are made of, and so what its drafts need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_STORED = 32768
"""Token ids that a checkpoint holds at most, the most frequent ones."""


class LabelTokens:
    """Token ids and how often each was a target.

    Args:
        ids: those of an earlier training, the most frequent first; how often is forgotten, and they count as few.
    """

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self._counts = torch.zeros(max(ids, default=-1) + 1, dtype=torch.long)
        self._counts[list(ids)] = torch.arange(len(ids), 0, -1)

    def count(self, targets: Tensor, vocab_size: int) -> None:
        """Count targets of any shape, token ids in [0, vocab_size); others are none. Waits for no device."""
        if not vocab_size:
            return
        counts = self._counts.to(targets.device)
        if len(counts) < vocab_size:
            counts = F.pad(counts, (0, vocab_size - len(counts)))
        flat = targets.flatten()
        within = flat.ge(0) & flat.lt(vocab_size)
        self._counts = counts.index_add_(0, flat.clamp(0, vocab_size - 1), within.long())

    def most_frequent(self, number: int) -> list[int]:
        """Up to so many token ids, the most frequent first."""
        order = self._counts.argsort(descending=True, stable=True)[:number]
        ids: list[int] = order[self._counts[order] > 0].tolist()
        return ids
