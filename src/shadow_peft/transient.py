"""Transient correction: a layer reads a corrected state, and the residual stream keeps nothing of the correction.

    delta = alpha * drop((h - s) @ D) @ U
    h'    = layer(h + delta) - delta                     variant "transient"

    h, h'  [B, T, d]  hidden state of the base before and after a layer
    s      [B, T, d]  shadow state, the same at every layer
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


def correct(h: Tensor, s: Tensor, down: Tensor, up: Tensor, alpha: float, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """What a layer reads, and what is to be taken back from what it returns.

    Args:
        h: hidden state of the base before the layer, `[B, T, d]`.
        s: shadow state, `[B, T, d]`.
        down: D, `[d, r]`.
        up: U, `[r, d]`.
        alpha: factor of the correction.
        dropout: probability of dropping entries of the down product; 0 outside training.

    Returns:
        h + delta and delta, both `[B, T, d]`.
    """
    flat, state = h.flatten(0, -2), s.flatten(0, -2)
    if torch.is_grad_enabled():
        keep = draw_kept((flat.shape[0], down.shape[1]), h.device, dropout)
        corrected, delta = _Correct.apply(flat, state, down, up, keep, alpha, dropout)
    else:
        corrected, delta = _added(flat, _delta((flat - state) @ down, up, alpha))
    return corrected.view_as(h), delta.view_as(h)


def _delta(z: Tensor, up: Tensor, alpha: float) -> Tensor:
    return z @ up if alpha == 1 else (alpha * z) @ up


def _added(h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """h + delta, and what that added: in half precision a rounded sum adds something else than delta."""
    corrected = h + delta
    return corrected, corrected - h if h.dtype.itemsize < 4 else delta


class _Correct(torch.autograd.Function):
    """`correct` on flat tensors, without chance.

    Kept are h + delta, which the layer keeps anyway as the input of its norm, s, which is one for all layers, and z, which
    is thin; h comes back as (h + delta) - alpha * z @ U, up to rounding. The gradients can't be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, s: Tensor, down: Tensor, up: Tensor, keep: Tensor | None, alpha: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        z = dropped((h - s) @ down, keep, dropout)
        corrected, delta = _added(h, _delta(z, up, alpha))
        ctx.save_for_backward(corrected, s, z, down, up, keep)
        ctx.settings = alpha, dropout
        return corrected, delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_delta: Tensor) -> Any:
        corrected, s, z, down, up, keep = ctx.saved_tensors
        alpha, dropout = ctx.settings
        with torch.autocast(grad.device.type, enabled=False):
            difference = torch.addmm(corrected, z, up, alpha=-alpha).sub_(s)
            onto_delta = grad + grad_delta
            grad_up = alpha * (z.T @ onto_delta)
            grad_z = dropped(alpha * (onto_delta @ up.T), keep, dropout)
            through = grad_z @ down.T
            return grad + through, -through, difference.T @ grad_z, grad_up, None, None, None
