"""Dropout in two steps: sample a mask, apply it.

    mask ~ Bernoulli(1 - p)        apply_mask(x) = mask * x / (1 - p)

The mask is a tensor of its own, so a step that is recomputed in the backward pass sees the same one, and everything after
sampling is deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_mask(shape: tuple[int, ...], device: torch.device, probability: float) -> Tensor | None:
    """Which entries dropout keeps, as booleans of a shape; None keeps all of them."""
    if not probability:
        return None
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - probability)


def apply_mask(x: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """`x` without what was dropped, scaled so that the mean stays; a gradient goes back the same way."""
    return x if mask is None else x * mask * (1 / (1 - probability))
