"""Transient injection and output correction: the injected correction is removed after the layer, and what the layer adds is
corrected too.

    delta = alpha * drop((n(h) - n(s)) @ D) @ U          n(x) = x / rms(x), or n(x) = x where nothing is normalized
    c     = layer(h + delta) - delta - h                 what the layer adds to the residual stream
    h'    = h + c + c @ E @ V                            variant "readout"

    h, h'  [B, T, d]  hidden state of the base before and after a layer
    s      [B, T, d]  shadow state, the same at every layer
    D, E   [d, r] [d, q]  down projections, drawn from N(0, 1 / d)
    U, V   [r, d] [q, d]  up projections, zero at the start: a fresh adapter changes nothing

The first acts like a low-rank change of the weights that read the residual stream, conditioned on the shadow; the second
like one of the weights that write to it. The injected correction itself is removed, since such corrections accumulate over
the layers. Where nothing is normalized, h outgrows s within a few layers, and s is lost in the difference (LOG.md has the
figures of all forms).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shadow_peft.layers.casts import cast_pairs
from shadow_peft.layers.dropout import apply_mask, sample_mask

_SHORTEST = 1e-4
"""Length below which a state is not scaled up further; half precision holds its inverse."""


def inject_transient(
    h: Tensor,
    s: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: float,
    dropout: float = 0.0,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """What a layer reads, and what is to be taken back from what it returns.

    Args:
        h: hidden state of the base before the layer, `[B, T, d]`.
        s: shadow state, `[B, T, d]`; already n(s) where h is normalized, since it is the same at all layers.
        down: D, `[d, r]`.
        up: U, `[r, d]`.
        alpha: factor of the correction.
        dropout: probability of dropping entries of the down product; 0 outside training.
        normalize: whether n divides h by its root mean square.
        dtype: without gradients, the dtype that h + delta is rounded to; None is that of `h`.

    Returns:
        h + delta and delta, both `[B, T, d]`.
    """
    flat, state = h.flatten(0, -2), s.flatten(0, -2)
    if torch.is_grad_enabled():
        mask = sample_mask((flat.shape[0], down.shape[1]), h.device, dropout)
        corrected, delta = _InjectTransient.apply(flat, state, down, up, mask, alpha, dropout, normalize)
    else:
        corrected, delta = _inject(flat, _lack(flat, state, normalize) @ down, up, alpha, dtype)
    return corrected.view_as(h), delta.view_as(h)


def correct_output(out: Tensor, delta: Tensor, h: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What the stream keeps of a layer.

    Args:
        out: what the layer returned, `[B, T, d]`.
        delta: what was added to its input, `[B, T, d]`.
        h: hidden state before the layer, without delta, `[B, T, d]`.
        down: E, `[d, q]`.
        up: V, `[q, d]`.

    Returns:
        h', `[B, T, d]`.
    """
    if torch.is_grad_enabled():
        corrected_output: Tensor = _CorrectOutput.apply(out, delta, h, down, up)
        return corrected_output
    return _correct_output(out, delta, h, down, up)[0]


def _correct_output(out: Tensor, delta: Tensor, h: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h', which is no view of anything, c and its thin product, both flat."""
    corrected_output = (out - delta).contiguous()  # a layer may return any layout
    added = (corrected_output - h).flatten(0, -2)
    z = added @ down
    corrected_output.flatten(0, -2).addmm_(z, up)
    return corrected_output, added, z


class ShadowOutputModel(nn.Module):
    """The output corrections of N layers: `output_downs` `[N, d, q]` and `output_ups` `[N, q, d]`.

    Args:
        num_layers: N, the number of injected layers.
        hidden_size: d, the width of the base.
        rank: q.
    """

    def __init__(self, num_layers: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.output_downs = nn.Parameter(torch.empty(num_layers, hidden_size, rank).normal_(std=hidden_size**-0.5))
        self.output_ups = nn.Parameter(torch.zeros(num_layers, rank, hidden_size))

    def extra_repr(self) -> str:
        """The sizes that `print(model)` shows."""
        layers, width, rank = self.output_downs.shape
        return f"layers={layers}, d={width}, q={rank}"

    def weights(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """(E, V) of every injected layer in the dtype of the computation."""
        return cast_pairs(self.output_downs, self.output_ups, dtype)


def unit_rms(x: Tensor) -> Tensor:
    """n(x) = x / rms(x), `[..., d]`; zeros stay zeros."""
    return x * (x.shape[-1] ** 0.5 / _length(x))


def _length(x: Tensor) -> Tensor:
    """The Euclidean norm of the last dimension, `[..., 1]`, bounded from below."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_SHORTEST)


def _lack(h: Tensor, s: Tensor, normalize: bool) -> Tensor:
    """s - n(h)."""
    if not normalize:
        return s - h
    return torch.addcdiv(s, h, _length(h), value=-(h.shape[-1] ** 0.5))  # few operations, one rounding


def _inject(h: Tensor, z: Tensor, up: Tensor, alpha: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """h + delta rounded, and what that added; z `[N, r]` is the down product of s - n(h)."""
    corrected = torch.addmm(h, z, up, alpha=-alpha).to(dtype or h.dtype)
    return corrected, corrected - h


class _InjectTransient(torch.autograd.Function):
    """`inject_transient` on flat tensors, deterministic.

    Saved are h + delta, which the layer saves anyway as the input of its norm, s, which is one for all layers, and z, which
    is thin; h comes back as (h + delta) + alpha * z @ U, up to rounding. The gradients can't be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, s: Tensor, down: Tensor, up: Tensor, mask: Tensor | None, alpha: float, dropout: float,
        normalize: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        z = apply_mask(_lack(h, s, normalize) @ down, mask, dropout)
        corrected, delta = _inject(h, z, up, alpha)
        ctx.save_for_backward(corrected, s, z, down, up, mask)
        ctx.settings = alpha, dropout, normalize
        return corrected, delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_delta: Tensor) -> Any:
        corrected, s, z, down, up, mask = ctx.saved_tensors
        alpha, dropout, normalize = ctx.settings
        with torch.autocast(grad.device.type, enabled=False):
            h = torch.addmm(corrected, z, up, alpha=alpha)
            onto_delta = grad + grad_delta
            grad_up = -alpha * (z.T @ onto_delta)
            grad_z = apply_mask(alpha * (onto_delta @ up.T), mask, dropout)
            through = grad_z @ down.T
            if not normalize:
                return grad + through, -through, (h - s).T @ grad_z, grad_up, None, None, None, None
            scale = h.shape[-1] ** 0.5 / _length(h)
            unit = h * scale
            # d n(h) / d h = scale * (1 - n n^T / d): what points along h changes nothing
            along = (through * unit).mean(-1, keepdim=True)
            onto_h = torch.addcmul(through, unit, along, value=-1).mul_(scale).add_(grad)
            return onto_h, -through, (unit - s).T @ grad_z, grad_up, None, None, None, None


class _CorrectOutput(torch.autograd.Function):
    """`correct_output`; saved are c and its down product. The gradients can't be differentiated again."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, delta: Tensor, h: Tensor, down: Tensor, up: Tensor) -> Tensor:
        corrected_output, *saved = _correct_output(out, delta, h, down, up)
        ctx.save_for_backward(*saved, down, up)
        return corrected_output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        added, z, down, up = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            flat = grad.flatten(0, -2)
            grad_z = flat @ up.T
            through = (grad_z @ down.T).view_as(grad)
            onto_out = grad + through
            return onto_out, -onto_out, -through, added.T @ grad_z, z.T @ flat
