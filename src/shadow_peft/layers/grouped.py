"""The formulas of all variants where pieces of a batch have weights of their own: every thin map is one batched product.

    h, s   [P, M, d]            P pieces of a batch with M tokens each: hidden state of the base, shadow state
    D, U   [P, d, r] [P, r, d]  weights of the adapter that each piece belongs to, likewise all others

Adapters of smaller rank are padded with zeros, which add nothing to a product. The factor alpha is folded into U. Dropout
has a probability for each piece, `[P, 1, 1]`, or None. The formulas are those of `injection`, `update`, `output_correction`
and `readout`, and autograd differentiates them as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from shadow_peft.layers.output_correction import unit_rms
from shadow_peft.layers.readout import ReadoutWeights
from shadow_peft.layers.update import NORM_EPS, Norm, UpdateWeights


def stack_padded(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors of one number of dimensions stacked along a new one, the smaller ones padded with zeros."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    return torch.stack([_padded(tensor, shape) for tensor in tensors], dim)


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    missing = [size - have for size, have in zip(shape, tensor.shape, strict=True)]
    return F.pad(tensor, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else tensor


def drop(x: Tensor, probability: Tensor | None) -> Tensor:
    """`x` `[P, M, n]` without what dropout drops, scaled so that the mean stays."""
    if probability is None:
        return x
    return x * (torch.rand_like(x) >= probability) / (1 - probability)


def inject(h: Tensor, s: Tensor, down: Tensor, up: Tensor, dropout: Tensor | None, dropout_before_down: bool) -> Tensor:
    """h' of the variants "published" and "peft", see `injection`."""
    if dropout_before_down:
        return torch.baddbmm(h, torch.bmm(drop(h - s, dropout), down), up)
    return torch.baddbmm(h, drop(torch.bmm(h - s, down), dropout), up)


def update(h: Tensor, s: Tensor, weights: UpdateWeights, norm: Norm | None, dropout: Tensor | None) -> Tensor:
    """s' of the variants "published" and "peft", see `update`; biases are `[P, 1, n]`, `norm` holds `[P, 1, d]`."""
    n = h if norm is None else F.layer_norm(h, h.shape[-1:], eps=NORM_EPS) * norm.weight + norm.bias
    z = _linear(n, weights.down, weights.down_bias)
    z_gate, z_transform = (F.gelu(z) if norm is None else F.silu(z)).chunk(2, dim=-1)
    if norm is not None:
        z_transform = drop(z_transform, dropout)
    transform = _linear(z_transform, weights.transform_up, weights.transform_up_bias)
    gate = torch.sigmoid(_linear(z_gate, weights.gate_up, weights.gate_up_bias))
    return torch.lerp(s, transform, gate)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x `[P, M, n]` times a weight `[P, m, n]`, transposed."""
    weight = weight.transpose(1, 2)
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


def inject_transient(
    h: Tensor, s: Tensor, down: Tensor, up: Tensor, dropout: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    """h + delta and delta of the variant "readout", see `output_correction`."""
    difference = (unit_rms(h) if normalize else h) - s
    delta = torch.bmm(drop(torch.bmm(difference, down), dropout), up)
    corrected = h + delta
    return corrected, corrected - h if h.dtype.itemsize < 4 else delta


def correct_output(out: Tensor, delta: Tensor, h: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """h' of the variant "readout", see `output_correction`."""
    kept = out - delta
    return torch.baddbmm(kept, torch.bmm(kept - h, down), up)


def read_out(h: Tensor, s: Tensor, weights: ReadoutWeights) -> Tensor:
    """h' of the read-out, see `readout`; the gate's bias is `[P, 1, d]`."""
    gate = torch.baddbmm(weights.gate_bias, torch.bmm(h, weights.gate_down), weights.gate_up).tanh()
    return torch.baddbmm(torch.lerp(h, s, gate), torch.bmm(h - s, weights.down), weights.up)
