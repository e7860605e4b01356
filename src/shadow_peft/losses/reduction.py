"""How summed losses become means, and in which dtype they are computed."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""A target that no loss counts."""


def token_count(targets: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The divisor of a mean over targets: the trainer's count, or the count of `targets`, at least 1.

    A step without any target has the count 0, and the loss 0.

    Raises:
        ValueError: the trainer's count is not positive, although there are targets; a compiled graph does not check that.
    """
    if num_items_in_batch is None:
        return targets.ne(IGNORE_INDEX).sum().clamp(min=1)
    count = torch.as_tensor(num_items_in_batch, device=targets.device)
    if not torch.compiler.is_compiling() and int(count) < 1 and targets.ne(IGNORE_INDEX).any():
        raise ValueError(
            f"num_items_in_batch is {int(count)}, but this batch has {int(targets.ne(IGNORE_INDEX).sum())} targets. It "
            "counts those of all batches of an optimizer step; leave it out for a mean over this batch."
        )
    return count.clamp(min=1)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in a dtype whose sums over a vocabulary are accurate."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
