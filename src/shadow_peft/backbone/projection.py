"""P: from the backbone's width S to the base's width d, and what is fitted by least squares."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadow_peft.base.architectures import read_size

PROJECTION = "shadow_hidden_projection"


def make_projection(backbone: PreTrainedModel, hidden_size: int) -> nn.Module:
    """P: the projection that the backbone carries, a new one for another width, or the identity.

    Raises:
        ValueError: the carried projection does not map the backbone's width to the base's.
    """
    width = backbone_width(backbone)
    carried = carried_projection(backbone)
    if carried is not None:
        if (carried.in_features, carried.out_features) != (width, hidden_size):
            raise ValueError(
                f"The shadow's projection maps {carried.in_features} to {carried.out_features}, but the shadow is "
                f"{width} wide and the base {hidden_size}."
            )
        return carried
    return nn.Identity() if width == hidden_size else nn.Linear(width, hidden_size, bias=False)


def carried_projection(model: PreTrainedModel) -> nn.Linear | None:
    """The projection that an explicit shadow brings along, or None."""
    projection = getattr(model, PROJECTION, None)
    return projection if isinstance(projection, nn.Linear) else None


def backbone_width(backbone: PreTrainedModel) -> int:
    """Width S of the hidden states that a backbone returns."""
    return read_size(backbone.config.get_text_config(decoder=True), "hidden_size")


def fit_embedding_map(source: Tensor, target: Tensor) -> Tensor:
    """M `[d, S]` that minimises |source @ M - target| for two embedding tables `[V, d]` and `[V, S]` of one vocabulary."""
    return _least_squares(source, target).to(target.dtype)


def fit_projection(large_head: Tensor, small_head: Tensor) -> Tensor:
    """P `[d, S]` that minimises |W_large @ P - W_small| over the vocabulary both heads share, `[V, d]` and `[V, S]`."""
    return _least_squares(large_head, small_head)


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    """X in float64 that minimises |a @ X - b| over the rows that both have."""
    rows = min(a.shape[0], b.shape[0])
    return torch.linalg.lstsq(a[:rows].detach().double(), b[:rows].detach().double()).solution
