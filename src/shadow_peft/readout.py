"""Read-out: token by token, a gate blends the shadow's state into the base's final state.

    h' = h + tanh(h @ A @ B + b) * (s - h)               variant "transient"

    h, s   [B, T, d]  final hidden state of the base, after its last norm; initial shadow state
    A      [d, k]     down map of the gate, drawn from N(0, 1 / d)
    B, b   [k, d] [d] up map and bias, zero at the start: a fresh adapter changes nothing

Both states are what a head reads, so what the shadow alone has learned need not find its way through the base's layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def read_out(h: Tensor, s: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """Blend the shadow's state into the base's final one; A, B and b are `down`, `up` and `bias`; result `[B, T, d]`."""
    flat = h.flatten(0, -2)
    gate = torch.tanh(torch.addmm(bias, flat @ down, up))
    return torch.lerp(flat, s.flatten(0, -2), gate).view_as(h)


class ShadowReadoutModel(nn.Module):
    """The gate of the read-out: `down` `[d, k]`, `up` `[k, d]`, `bias` `[d]`.

    Args:
        hidden_size: d, the width of the base.
        gate_hidden_size: k.
    """

    def __init__(self, hidden_size: int, gate_hidden_size: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(hidden_size, gate_hidden_size).normal_(std=hidden_size**-0.5))
        self.up = nn.Parameter(torch.zeros(gate_hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """h' `[B, T, d]`, in dtype and on the device of `h`."""
        maps = (tensor.to(h.device, h.dtype) for tensor in (self.down, self.up, self.bias))
        return read_out(h, s.to(h.device, h.dtype), *maps)
