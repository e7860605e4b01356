"""Injection: the base's hidden state is corrected by what it lacks of the shadow's state.

    h' = h + alpha * drop((h - s) @ D) @ U              variant "released"
    h' = h + alpha * (drop(h - s) @ D) @ U              variant "paper"

    h, s   [B, T, d]  hidden state of the base before a layer; shadow state
    D      [d, r]     down map, drawn from N(0, 0.02)
    U      [r, d]     up map, zero at the start: a fresh adapter changes nothing

The maps of all layers are stored stacked, as the files have them, and taken apart once per forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def inject(
    h: Tensor, s: Tensor, down: Tensor, up: Tensor, alpha: float, dropout: float = 0.0, drop_difference: bool = False
) -> Tensor:
    """Correct the base's hidden state; one subtraction and two thin products.

    Args:
        h: hidden state of the base before a layer, `[B, T, d]`.
        s: shadow state, `[B, T, d]`.
        down: D, `[d, r]`.
        up: U, `[r, d]`.
        alpha: factor of the correction.
        dropout: probability of dropping; 0 outside training.
        drop_difference: drop entries of h - s (variant "paper") instead of entries of its down product.

    Returns:
        The corrected hidden state, `[B, T, d]`, in the dtype of `h`.
    """
    flat = h.flatten(0, -2)
    difference = flat - s.flatten(0, -2)
    if drop_difference:
        z = F.dropout(difference, dropout) @ down if dropout else difference @ down
    else:
        z = F.dropout(difference @ down, dropout) if dropout else difference @ down
    return torch.addmm(flat, z, up, alpha=alpha).view_as(h)


class ShadowInjectionModel(nn.Module):
    """The injection maps of N layers: `injection_downs` `[N, d, r]` and `injection_ups` `[N, r, d]`.

    Args:
        num_layers: N, the number of injected layers.
        hidden_size: d, the width of the base.
        rank: r.
        linear_init: draw D like the weight of an `nn.Linear` (variant "paper") instead of from N(0, 0.02).
    """

    def __init__(self, num_layers: int, hidden_size: int, rank: int, linear_init: bool = False) -> None:
        super().__init__()
        self.injection_downs = nn.Parameter(torch.empty(num_layers, hidden_size, rank))
        self.injection_ups = nn.Parameter(torch.zeros(num_layers, rank, hidden_size))
        bound = hidden_size**-0.5
        with torch.no_grad():
            if linear_init:
                self.injection_downs.uniform_(-bound, bound)
            else:
                self.injection_downs.normal_(std=0.02)

    def maps(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """(D, U) of every injected layer in the dtype of the computation, with one cast and one split for all layers."""
        downs = self.injection_downs.to(dtype).unbind(0)
        ups = self.injection_ups.to(dtype).unbind(0)
        return list(zip(downs, ups, strict=True))
