"""Injection: the base's hidden state is corrected by what it lacks of the shadow's state.

    h' = h + alpha * drop((h - s) @ D) @ U              variant "published"
    h' = h + alpha * (drop(h - s) @ D) @ U              variant "peft"

    h, s   [B, T, d]  hidden state of the base before a layer; shadow state
    D      [d, r]     down projection, drawn from N(0, 0.02)
    U      [r, d]     up projection, zero at the start: a fresh adapter changes nothing

The weights of all layers are stored stacked, as in the files, and split once per forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shadow_peft.layers.casts import cast_pairs
from shadow_peft.layers.dropout import apply_mask, sample_mask


def inject(
    h: Tensor, s: Tensor, down: Tensor, up: Tensor, alpha: float, dropout: float = 0.0, dropout_before_down: bool = False
) -> Tensor:
    """Correct the base's hidden state; one subtraction and two thin products.

    Args:
        h: hidden state of the base before a layer, `[B, T, d]`.
        s: shadow state, `[B, T, d]`.
        down: D, `[d, r]`.
        up: U, `[r, d]`.
        alpha: factor of the correction.
        dropout: probability of dropping; 0 outside training.
        dropout_before_down: drop entries of h - s (variant "peft") instead of entries of its down product.

    Returns:
        The corrected hidden state, `[B, T, d]`, in the dtype of `h`.
    """
    flat = h.flatten(0, -2)
    mask = sample_mask((flat.shape[0], mask_width(down, dropout_before_down)), h.device, dropout)
    z = thin_product(flat - s.flatten(0, -2), down, mask, dropout, dropout_before_down)
    return torch.addmm(flat, z, up, alpha=alpha).view_as(h)


def mask_width(down: Tensor, dropout_before_down: bool) -> int:
    """Entries per token that dropout may drop: d of the difference or r of its down product."""
    return down.shape[0 if dropout_before_down else 1]


def thin_product(difference: Tensor, down: Tensor, mask: Tensor | None, dropout: float, dropout_before_down: bool) -> Tensor:
    """z `[N, r]` of h - s `[N, d]`; `mask` is what dropout keeps, `[N, d]` with `dropout_before_down` and else `[N, r]`."""
    if dropout_before_down:
        return apply_mask(difference, mask, dropout) @ down
    return apply_mask(difference @ down, mask, dropout)


class ShadowInjectionModel(nn.Module):
    """The injection weights of N layers: `injection_downs` `[N, d, r]` and `injection_ups` `[N, r, d]`.

    Args:
        num_layers: N, the number of injected layers.
        hidden_size: d, the width of the base.
        rank: r.
        variant: how D is drawn: "published" from N(0, 0.02), "readout" from N(0, 1 / d), "peft" as an `nn.Linear` does.
    """

    def __init__(self, num_layers: int, hidden_size: int, rank: int, variant: str = "published") -> None:
        super().__init__()
        self.injection_downs = nn.Parameter(torch.empty(num_layers, hidden_size, rank))
        self.injection_ups = nn.Parameter(torch.zeros(num_layers, rank, hidden_size))
        scale = hidden_size**-0.5
        with torch.no_grad():
            if variant == "peft":
                self.injection_downs.uniform_(-scale, scale)
            else:
                self.injection_downs.normal_(std=scale if variant == "readout" else 0.02)

    def extra_repr(self) -> str:
        """The sizes that `print(model)` shows."""
        layers, width, rank = self.injection_downs.shape
        return f"layers={layers}, d={width}, r={rank}"

    def weights(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """(D, U) of every injected layer in the dtype of the computation, with one cast and one split for all layers."""
        return cast_pairs(self.injection_downs, self.injection_ups, dtype)
