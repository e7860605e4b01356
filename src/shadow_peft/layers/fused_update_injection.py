"""Between two layers, in training: update and injection as one step that keeps little for the backward pass.

    s' = update(h, s)        h' = inject(h, s')          see `update` and `injection` for the formulas

    h, s      [N, d]   output of a layer; shadow state before it
    h', s'    [N, d]   input of the next layer; shadow state beside it
    z         [N, r]   thin product of the injection, after its dropout

Kept are h', which the next layer keeps anyway as the input of its norm, s', which the next step reads, z and the choices of
dropout, which are thin (in the variant "paper" the injection's is a byte for each entry of h). The rest comes back:
h = h' - alpha * z @ U up to rounding, and everything thin is computed again. The gradients are written out, so that a
compiler can trace them; they can't be differentiated again.
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
        maps: maps of the update; None injects without an update before.
        norm: the shared LayerNorm of the update, or None (variant "paper").

    Returns:
        h' and s', both `[B, T, d]`.
    """
    flat, state = h.flatten(0, -2), s.flatten(0, -2)
    transform_mask = None
    if weights is not None:
        transform_mask = sample_mask((flat.shape[0], weights.gate_up.shape[1]), h.device, dropout)
    mask = sample_mask((flat.shape[0], mask_width(down, dropout_before_down)), h.device, dropout)
    updating = () if weights is None else _Updating.of(weights, norm)
    moved, corrected = _FusedUpdateInjection.apply(
        alpha, dropout, dropout_before_down, flat, state, down, up, mask, transform_mask, *updating
    )
    return corrected.view_as(h), s if weights is None else moved.view_as(h)


class _Updating(NamedTuple):
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
    def of(cls, weights: UpdateWeights, norm: Norm | None) -> _Updating:
        weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
        biases = (weights.down_bias, weights.gate_up_bias, weights.transform_up_bias)
        return cls(weights.down, weights.gate_up, weights.transform_up, *biases, weight, bias)

    @property
    def weights(self) -> UpdateWeights:
        return UpdateWeights(*self[:6])

    @property
    def norm(self) -> Norm | None:
        return None if self.norm_weight is None or self.norm_bias is None else Norm(self.norm_weight, self.norm_bias)


class _FusedUpdateInjection(torch.autograd.Function):
    """`between` on flat tensors, without chance; no maps of an update mean no update, and None in place of s'."""

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
        *updating: Any,
    ) -> tuple[Tensor | None, Tensor]:
        moved = _moved(h, s, _Updating(*updating), transform_mask, dropout) if updating else None
        z = thin_product(h - (s if moved is None else moved), down, mask, dropout, dropout_before_down)
        corrected = torch.addmm(h, z, up, alpha=alpha)
        ctx.save_for_backward(s, moved, corrected, z, down, up, mask, transform_mask, *updating)
        ctx.settings = alpha, dropout, dropout_before_down
        return moved, corrected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_moved: Tensor | None, grad: Tensor) -> Any:
        s, moved, corrected, z, down, up, mask, transform_mask, *updating = ctx.saved_tensors
        alpha, dropout, dropout_before_down = ctx.settings
        with torch.autocast(grad.device.type, enabled=False):
            h = torch.addmm(corrected, z, up, alpha=-alpha)
            difference = h - (s if moved is None else moved)
            grad_z = alpha * (grad @ up.T)
            if dropout_before_down:
                grad_down = apply_mask(difference, mask, dropout).T @ grad_z
                through = apply_mask(grad_z @ down.T, mask, dropout)
            else:
                grad_z = apply_mask(grad_z, mask, dropout)
                grad_down = difference.T @ grad_z
                through = grad_z @ down.T
            grad_h, grad_up = grad + through, alpha * (z.T @ grad)
            grad_s = -through if grad_moved is None else grad_moved - through
            grads: tuple[Tensor | None, ...] = ()
            if updating:
                onto_h, grad_s, grads = _gradients(h, s, _Updating(*updating), transform_mask, dropout, grad_s)
                grad_h = grad_h + onto_h
        return None, None, None, grad_h, grad_s, grad_down, grad_up, None, None, *grads


def _moved(h: Tensor, s: Tensor, u: _Updating, mask: Tensor | None, dropout: float) -> Tensor:
    """s' `[N, d]`."""
    a = thin_input(h, u.weights, u.norm)
    z_gate, z_transform = (F.gelu(a) if u.norm is None else F.silu(a)).chunk(2, dim=-1)
    return torch.lerp(s, *transform_and_gate(z_gate, apply_mask(z_transform, mask, dropout), u.weights))


def _gradients(
    h: Tensor, s: Tensor, u: _Updating, mask: Tensor | None, dropout: float, grad: Tensor
) -> tuple[Tensor, Tensor, _Updating]:
    """Gradients with respect to h, s and the tensors of an update whose s' has the gradient `grad`; all `[N, d]`."""
    n, mean, rstd = h, h, h
    if u.norm is not None:
        n, mean, rstd = aten.native_layer_norm(h, h.shape[-1:], u.norm_weight, u.norm_bias, NORM_EPS)
    a = F.linear(n, u.down, u.down_bias)
    z_gate, z_transform = (F.gelu(a) if u.norm is None else F.silu(a)).chunk(2, dim=-1)
    z_transform = apply_mask(z_transform, mask, dropout)
    transform, gate = transform_and_gate(z_gate, z_transform, u.weights)

    grad_transform = grad * gate
    grad_s = grad - grad_transform
    grad_gate = grad_s * gate * (transform - s)  # the gate before its sigmoid: g (1 - g) (t - s)
    grad_z = torch.cat([grad_gate @ u.gate_up, apply_mask(grad_transform @ u.transform_up, mask, dropout)], dim=-1)
    grad_a = aten.gelu_backward(grad_z, a) if u.norm is None else aten.silu_backward(grad_z, a)
    grad_h, grad_weight, grad_bias = grad_a @ u.down, None, None
    if u.norm is not None:
        grad_h, grad_weight, grad_bias = aten.native_layer_norm_backward(
            grad_h, h, h.shape[-1:], mean, rstd, u.norm_weight, u.norm_bias, [True, True, True]
        )
    onto_maps = grad_a.T @ n, grad_gate.T @ z_gate, grad_transform.T @ z_transform
    onto_down_bias, onto_gate_bias, onto_transform_bias = (
        None if bias is None else onto.sum(0) for bias, onto in zip(u[3:6], (grad_a, grad_gate, grad_transform), strict=True)
    )
    onto_biases = onto_down_bias, onto_gate_bias, onto_transform_bias
    return grad_h, grad_s, _Updating(*onto_maps, *onto_biases, grad_weight, grad_bias)
