"""Update and injection between two layers as one autograd step, which saves little for the backward pass.

    s' = update(h, s)        h' = inject(h, s')          see `update` and `injection` for the formulas

    h, s      [N, d]   output of a layer; shadow state before it
    h', s'    [N, d]   input of the next layer; shadow state beside it
    z         [N, r]   down product of the injection, after its dropout

Saved are h', which the next layer saves anyway as the input of its norm; s', which the next step reads; z; and the dropout
masks, which are small (in the variant "peft" the injection's is one byte per entry of h). The rest is recomputed:
h = h' - alpha * z @ U up to rounding, and every product of width r or k. The gradients are written out, so that a compiler
can trace them; they can't be differentiated again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from shadow_peft.layers.dropout import apply_mask, sample_mask
from shadow_peft.layers.injection import mask_width, thin_product
from shadow_peft.layers.update import NORM_EPS, Norm, UpdateWeights, thin_input, transform_and_gate

aten = torch.ops.aten


def fused_update_injection(
    h: Tensor,
    s: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: float,
    dropout: float = 0.0,
    dropout_before_down: bool = False,
    weights: UpdateWeights | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    """Update the shadow state and correct the base's hidden state with it.

    The values are those of `update` and `inject`, one after the other, and so are the gradients.

    Args:
        h: hidden state of the base, `[B, T, d]`.
        s: shadow state, `[B, T, d]`.
        down: D of the injection, `[d, r]`.
        up: U of the injection, `[r, d]`.
        alpha: factor of the correction.
        dropout: probability of dropping.
        dropout_before_down: where injection drops, see `inject`.
        weights: weights of the update; None injects without an update before.
        norm: the shared LayerNorm of the update, or None (variant "peft").

    Returns:
        h' and s', both `[B, T, d]`.
    """
    flat_h, flat_s = h.flatten(0, -2), s.flatten(0, -2)
    tokens = flat_h.shape[0]
    transform_mask = None
    if weights is not None and norm is not None:  # the variant "peft" has no dropout in its transform
        transform_mask = sample_mask((tokens, weights.gate_up.shape[1]), h.device, dropout)
    mask = sample_mask((tokens, mask_width(down, dropout_before_down)), h.device, dropout)
    update_tensors = () if weights is None else _UpdateTensors.of(weights, norm)
    updated, corrected = _FusedUpdateInjection.apply(
        alpha, dropout, dropout_before_down, flat_h, flat_s, down, up, mask, transform_mask, *update_tensors
    )
    return corrected.view_as(h), s if weights is None else updated.view_as(h)


class _UpdateTensors(NamedTuple):
    """The tensors of an update, or their gradients; None where the variant has none."""

    down: Tensor
    gate_up: Tensor
    transform_up: Tensor
    down_bias: Tensor | None
    gate_up_bias: Tensor | None
    transform_up_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    @classmethod
    def of(cls, weights: UpdateWeights, norm: Norm | None) -> _UpdateTensors:
        norm_weight, norm_bias = (None, None) if norm is None else (norm.weight, norm.bias)
        biases = (weights.down_bias, weights.gate_up_bias, weights.transform_up_bias)
        return cls(weights.down, weights.gate_up, weights.transform_up, *biases, norm_weight, norm_bias)

    @property
    def weights(self) -> UpdateWeights:
        return UpdateWeights(*self[:6])

    @property
    def norm(self) -> Norm | None:
        return None if self.norm_weight is None or self.norm_bias is None else Norm(self.norm_weight, self.norm_bias)


class _FusedUpdateInjection(torch.autograd.Function):
    """`fused_update_injection` on flat tensors, deterministic; without update tensors s' is None."""

    @staticmethod
    def forward(
        ctx: Any,
        alpha: float,
        dropout: float,
        dropout_before_down: bool,
        h: Tensor,
        s: Tensor,
        down: Tensor,
        up: Tensor,
        mask: Tensor | None,
        transform_mask: Tensor | None,
        *update_tensors: Any,
    ) -> tuple[Tensor | None, Tensor]:
        updated = None
        if update_tensors:
            updated = _update(h, s, _UpdateTensors(*update_tensors), transform_mask, dropout)
        z = thin_product(h - (s if updated is None else updated), down, mask, dropout, dropout_before_down)
        corrected = torch.addmm(h, z, up, alpha=alpha)
        ctx.save_for_backward(s, updated, corrected, z, down, up, mask, transform_mask, *update_tensors)
        ctx.settings = alpha, dropout, dropout_before_down
        return updated, corrected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_updated: Tensor | None, grad: Tensor) -> Any:
        s, updated, corrected, z, down, up, mask, transform_mask, *update_tensors = ctx.saved_tensors
        alpha, dropout, dropout_before_down = ctx.settings
        with torch.autocast(grad.device.type, enabled=False):
            # recompute h and h - s' from what was saved
            h = torch.addmm(corrected, z, up, alpha=-alpha)
            difference = h - (s if updated is None else updated)
            # injection: h' = h + alpha * z @ U
            grad_up = alpha * (z.T @ grad)
            grad_z = alpha * (grad @ up.T)
            # z = drop(h - s') @ D, or drop((h - s') @ D)
            if dropout_before_down:
                grad_down = apply_mask(difference, mask, dropout).T @ grad_z
                grad_difference = apply_mask(grad_z @ down.T, mask, dropout)
            else:
                grad_z = apply_mask(grad_z, mask, dropout)
                grad_down = difference.T @ grad_z
                grad_difference = grad_z @ down.T
            grad_h = grad + grad_difference
            grad_s = -grad_difference if grad_updated is None else grad_updated - grad_difference
            # update: s' = s + g * (t - s); so far grad_s is the gradient of s'
            update_grads: tuple[Tensor | None, ...] = ()
            if update_tensors:
                tensors = _UpdateTensors(*update_tensors)
                through_update, grad_s, update_grads = _update_gradients(h, s, tensors, transform_mask, dropout, grad_s)
                grad_h = grad_h + through_update
        return None, None, None, grad_h, grad_s, grad_down, grad_up, None, None, *update_grads


def _update(h: Tensor, s: Tensor, u: _UpdateTensors, mask: Tensor | None, dropout: float) -> Tensor:
    """s' `[N, d]`."""
    a = thin_input(h, u.weights, u.norm)
    z_gate, z_transform = (F.gelu(a) if u.norm is None else F.silu(a)).chunk(2, dim=-1)
    return torch.lerp(s, *transform_and_gate(z_gate, apply_mask(z_transform, mask, dropout), u.weights))


def _update_gradients(
    h: Tensor, s: Tensor, u: _UpdateTensors, mask: Tensor | None, dropout: float, grad: Tensor
) -> tuple[Tensor, Tensor, _UpdateTensors]:
    """Gradients with respect to h, s and the tensors of an update whose s' has the gradient `grad`; all `[N, d]`."""
    # recompute the forward pass
    n, mean, rstd = h, h, h
    if u.norm is not None:
        n, mean, rstd = aten.native_layer_norm(h, h.shape[-1:], u.norm_weight, u.norm_bias, NORM_EPS)
    a = F.linear(n, u.down, u.down_bias)
    z_gate, z_transform = (F.gelu(a) if u.norm is None else F.silu(a)).chunk(2, dim=-1)
    z_transform = apply_mask(z_transform, mask, dropout)
    transform, gate = transform_and_gate(z_gate, z_transform, u.weights)

    # s' = s + g * (t - s); grad_gate is before the sigmoid, hence g (1 - g) (t - s)
    grad_transform = grad * gate
    grad_s = grad - grad_transform
    grad_gate = grad_s * gate * (transform - s)
    # through the up projections and the activation
    grad_z = torch.cat([grad_gate @ u.gate_up, apply_mask(grad_transform @ u.transform_up, mask, dropout)], dim=-1)
    grad_a = aten.gelu_backward(grad_z, a) if u.norm is None else aten.silu_backward(grad_z, a)
    # through the down projection and the LayerNorm
    grad_h, grad_norm_weight, grad_norm_bias = grad_a @ u.down, None, None
    if u.norm is not None:
        grad_h, grad_norm_weight, grad_norm_bias = aten.native_layer_norm_backward(
            grad_h, h, h.shape[-1:], mean, rstd, u.norm_weight, u.norm_bias, [True, True, True]
        )
    grads = _UpdateTensors(
        down=grad_a.T @ n,
        gate_up=grad_gate.T @ z_gate,
        transform_up=grad_transform.T @ z_transform,
        down_bias=_sum_over_tokens(grad_a, u.down_bias),
        gate_up_bias=_sum_over_tokens(grad_gate, u.gate_up_bias),
        transform_up_bias=_sum_over_tokens(grad_transform, u.transform_up_bias),
        norm_weight=grad_norm_weight,
        norm_bias=grad_norm_bias,
    )
    return grad_h, grad_s, grads


def _sum_over_tokens(grad: Tensor, bias: Tensor | None) -> Tensor | None:
    """The gradient of a bias, where the variant has it."""
    return None if bias is None else grad.sum(0)
