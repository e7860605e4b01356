"""Update: a gate moves the shadow state towards a transform of the base's new hidden state.

    n  = LayerNorm(h)                                    one LayerNorm for all layers   (variant "published"; "peft": n = h)
    t  = drop(act(n @ A_t)) @ B_t      g = sigmoid(act(n @ A_g) @ B_g)
    s' = s + g * (t - s)

    h, s      [B, T, d]  hidden state of the base after a layer; shadow state
    A_t, A_g  [d, k]     down projections: transform and gate read the same input, so both are one product
    B_t, B_g  [k, d]     up projections
    act                  SiLU without biases ("published") or GELU with biases ("peft"; it has no dropout here)

Nothing reads the state after the last layer, so the last layer's weights exist for the file alone: they are frozen and never
computed. The weights of all other layers are stacked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shadow_peft.layers.casts import cast
from shadow_peft.layers.dropout import apply_mask, sample_mask

NORM_EPS = 1e-5


@dataclass(frozen=True)
class UpdateWeights:
    """The weights of one layer: `down` `[2k, d]` (gate first), `gate_up` and `transform_up` `[d, k]`, biases or None."""

    down: Tensor
    gate_up: Tensor
    transform_up: Tensor
    down_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    transform_up_bias: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> UpdateWeights:
        """The same weights on a device and in a dtype."""
        tensors = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return UpdateWeights(**{name: tensor.to(device, dtype) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Norm:
    """Weight and bias `[d]` of the LayerNorm that all layers share."""

    weight: Tensor
    bias: Tensor


def update(h: Tensor, s: Tensor, weights: UpdateWeights, norm: Norm | None, dropout: float = 0.0) -> Tensor:
    """Move the shadow state on, after a layer.

    Args:
        h: hidden state of the base after the layer, `[B, T, d]`.
        s: shadow state, `[B, T, d]`.
        weights: the layer's weights.
        norm: the shared LayerNorm ("published", SiLU) or None ("peft", GELU).
        dropout: probability of dropping entries of the transform ("published"); 0 outside training.

    Returns:
        The next shadow state, `[B, T, d]`.
    """
    z = thin_input(h, weights, norm)
    z = F.gelu(z) if norm is None else F.silu(z)
    z_gate, z_transform = z.chunk(2, dim=-1)
    if norm is not None:
        z_transform = apply_mask(z_transform, sample_mask(tuple(z_transform.shape), h.device, dropout), dropout)
    return torch.lerp(s, *transform_and_gate(z_gate, z_transform, weights))


def thin_input(h: Tensor, weights: UpdateWeights, norm: Norm | None) -> Tensor:
    """Down products of gate and transform side by side, `[B, T, 2k]`, before their activation."""
    n = h if norm is None else F.layer_norm(h, h.shape[-1:], norm.weight, norm.bias, NORM_EPS)
    return F.linear(n, weights.down, weights.down_bias)


def transform_and_gate(z_gate: Tensor, z_transform: Tensor, weights: UpdateWeights) -> tuple[Tensor, Tensor]:
    """t and g `[B, T, d]` of activated down products `[B, T, k]`, the transform's after its dropout."""
    gate = torch.sigmoid(F.linear(z_gate, weights.gate_up, weights.gate_up_bias))
    return F.linear(z_transform, weights.transform_up, weights.transform_up_bias), gate


class StackedUpdateWeights(nn.Module):
    """The weights of M layers, stacked: `down` `[M, 2k, d]`, `gate_up` and `transform_up` `[M, d, k]`, biases on request."""

    def __init__(self, num_layers: int, hidden_size: int, gate_hidden_size: int, bias: bool) -> None:
        super().__init__()
        self.down = _uniform((num_layers, 2 * gate_hidden_size, hidden_size), fan_in=hidden_size)
        self.gate_up = _uniform((num_layers, hidden_size, gate_hidden_size), fan_in=gate_hidden_size)
        self.transform_up = _uniform((num_layers, hidden_size, gate_hidden_size), fan_in=gate_hidden_size)
        if bias:
            self.down_bias = _uniform((num_layers, 2 * gate_hidden_size), fan_in=hidden_size)
            self.gate_up_bias = _uniform((num_layers, hidden_size), fan_in=gate_hidden_size)
            self.transform_up_bias = _uniform((num_layers, hidden_size), fan_in=gate_hidden_size)

    def extra_repr(self) -> str:
        """The sizes that `print(model)` shows."""
        layers, width, gate_width = self.gate_up.shape
        return f"layers={layers}, d={width}, k={gate_width}, trained={self.down.requires_grad}"

    def weights(self, dtype: torch.dtype) -> list[UpdateWeights]:
        """The weights of every layer in the dtype of the computation, with one cast and one split for all layers."""
        return _rows({name: cast(stack, dtype) for name, stack in self.named_parameters()})

    def views(self) -> list[UpdateWeights]:
        """The weights of every layer as detached views of the parameters."""
        return _rows({name: stack.detach() for name, stack in self.named_parameters()})


class ShadowUpdateModel(nn.Module):
    """The update weights of N layers and their shared LayerNorm.

    Args:
        num_layers: N, the number of updated layers in the file; the last one's weights are frozen.
        hidden_size: d, the width of the base.
        gate_hidden_size: k.
        peft: the variant "peft": biases, no LayerNorm.
    """

    def __init__(self, num_layers: int, hidden_size: int, gate_hidden_size: int, peft: bool = False) -> None:
        super().__init__()
        self.hidden_norm = None if peft else nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.live = StackedUpdateWeights(num_layers - 1, hidden_size, gate_hidden_size, bias=peft)
        self.last = StackedUpdateWeights(1, hidden_size, gate_hidden_size, bias=peft)
        self.freeze_unread()

    def freeze_unread(self) -> None:
        """Freeze what no loss depends on: the last layer's weights, and the norm when no other layer uses it."""
        self.last.requires_grad_(False)
        if self.live.down.shape[0] == 0:
            self.requires_grad_(False)

    def all_weights(self) -> list[UpdateWeights]:
        """The weights of all N layers as detached views of the parameters."""
        return [*self.live.views(), *self.last.views()]

    def weights(self, dtype: torch.dtype) -> list[UpdateWeights]:
        """The weights of every layer that is computed, N - 1 of them."""
        return self.live.weights(dtype)

    def norm(self, dtype: torch.dtype) -> Norm | None:
        """The shared LayerNorm in the dtype of the computation; None in the variant "peft"."""
        if self.hidden_norm is None:
            return None
        return Norm(cast(self.hidden_norm.weight, dtype), cast(self.hidden_norm.bias, dtype))


def _rows(stacks: dict[str, Tensor]) -> list[UpdateWeights]:
    columns = {name: stack.unbind(0) for name, stack in stacks.items()}
    return [UpdateWeights(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """A parameter drawn as `nn.Linear` draws weight and bias."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
