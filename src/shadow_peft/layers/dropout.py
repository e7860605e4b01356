"""Dropout in two steps: which entries are kept, and what remains of a tensor.

    keep ~ Bernoulli(1 - p)        dropped(x) = keep * x / (1 - p)

The choice is a tensor of its own, so that a step which is computed again in the backward pass meets the same one, and what
follows the choice is a function without chance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_mask(shape: tuple[int, ...], device: torch.device, probability: float) -> Tensor | None:
    """Which entries stay when they are dropped with a probability, as booleans; None keeps all of them."""
    if not probability:
        return None
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - probability)


def apply_mask(x: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """What remains of `x`, scaled so that the mean stays; a gradient's way back is the same."""
    return x if mask is None else x * mask * (1 / (1 - probability))
