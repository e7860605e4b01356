"""How summed losses become means, and in which dtype they are computed."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""A target that no loss counts."""


def token_count(targets: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The divisor of a mean over targets: the trainer's count, or the count of `targets`, at least 1."""
    if num_items_in_batch is not None:
        return torch.as_tensor(num_items_in_batch, device=targets.device)
    return targets.ne(IGNORE_INDEX).sum().clamp(min=1)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in a dtype whose sums over a vocabulary are accurate."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
