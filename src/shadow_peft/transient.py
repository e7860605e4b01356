"""Transient correction: a layer reads a corrected state, and the residual stream keeps nothing of the correction.

    z     = drop(h @ D - s @ D)
    delta = alpha * z @ U
    h'    = layer(h + delta) - delta                     variant "transient"

    h, h'  [B, T, d]  hidden state of the base before and after a layer
    s      [B, T, d]  shadow state, the same at every layer, so s @ D is one product for all layers
    D      [d, r]     down map, drawn from N(0, 1 / d)
    U      [r, d]     up map, zero at the start: a fresh adapter changes nothing

So what a layer adds to the stream is what it would add if it had read the corrected state; that is what a low-rank change of
all maps that read the stream does, too, but with what the shadow knows. Corrections that stay in the stream pile up over the
layers (LOG.md has what either form reaches).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shadow_peft.dropping import draw_kept, dropped


def projected_states(s: Tensor, downs: Tensor) -> Tensor:
    """s @ D of every layer, `[L, B, T, r]`, of a shadow state `[B, T, d]` and stacked down maps `[L, d, r]`."""
    flat = s.flatten(0, -2).expand(len(downs), -1, -1)
    return torch.bmm(flat, downs).unflatten(1, s.shape[:-1])


def correct(
    h: Tensor, projected: Tensor, down: Tensor, up: Tensor, alpha: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What a layer reads, and what is to be taken back from what it returns.

    Args:
        h: hidden state of the base before the layer, `[B, T, d]`.
        projected: s @ D of this layer, `[B, T, r]`.
        down: D, `[d, r]`.
        up: U, `[r, d]`.
        alpha: factor of the correction.
        dropout: probability of dropping entries of z; 0 outside training.

    Returns:
        h + delta and delta, both `[B, T, d]`.
    """
    flat, flat_projected = h.flatten(0, -2), projected.flatten(0, -2)
    if torch.is_grad_enabled():
        keep = draw_kept(tuple(flat_projected.shape), h.device, dropout)
        corrected, delta = _Correct.apply(flat, flat_projected, down, up, keep, alpha, dropout)
    else:
        delta = torch.addmm(flat_projected, flat, down, beta=-alpha, alpha=alpha) @ up
        corrected = flat + delta
    return corrected.view_as(h), delta.view_as(h)


class _Correct(torch.autograd.Function):
    """`correct` on flat tensors, without chance.

    Kept are h + delta, which the layer keeps anyway as the input of its norm, and z, which is thin; h comes back as
    (h + delta) - alpha * z @ U, up to rounding. The gradients can't be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, projected: Tensor, down: Tensor, up: Tensor, keep: Tensor | None, alpha: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        z = dropped(torch.addmm(projected, h, down, beta=-1), keep, dropout)
        delta = (alpha * z) @ up
        corrected = h + delta
        ctx.save_for_backward(corrected, z, down, up, keep)
        ctx.settings = alpha, dropout
        return corrected, delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_delta: Tensor) -> Any:
        corrected, z, down, up, keep = ctx.saved_tensors
        alpha, dropout = ctx.settings
        with torch.autocast(grad.device.type, enabled=False):
            h = torch.addmm(corrected, z, up, alpha=-alpha)
            onto_delta = grad + grad_delta
            grad_up = alpha * (z.T @ onto_delta)
            grad_z = dropped(alpha * (onto_delta @ up.T), keep, dropout)
            grad_h = torch.addmm(grad, grad_z, down.T)
            return grad_h, -grad_z, h.T @ grad_z, grad_up, None, None, None
