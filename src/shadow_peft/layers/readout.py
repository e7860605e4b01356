"""Read-out: behind the last layer the shadow's state is blended into the base's, and a low-rank map of their difference.

    h' = h + tanh(h @ A @ B + b) * (s - h) + (h - s) @ F @ G          variant "readout"

    h, s   [B, T, d]  final hidden state of the base, after its last norm; initial shadow state
    A, F   [d, k] [d, m]  down projections, drawn from N(0, 1 / d)
    B, b, G  [k, d] [d] [m, d]  up projections and bias, zero at the start: a fresh adapter changes nothing

Both states are inputs of a head, so what the shadow alone has learned need not pass through the base's layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shadow_peft.layers.casts import cast


class ReadoutWeights(NamedTuple):
    """A, B and b of the gate, F and G of the map."""

    gate_down: Tensor
    gate_up: Tensor
    gate_bias: Tensor
    down: Tensor
    up: Tensor


def read_out(h: Tensor, s: Tensor, weights: ReadoutWeights) -> Tensor:
    """h' `[B, T, d]` of h and s, `[B, T, d]`."""
    if torch.is_grad_enabled():
        result: Tensor = _ReadOut.apply(h, s, *weights)
        return result
    return _read_out(h, s, weights)[0]


def _read_out(h: Tensor, s: Tensor, weights: ReadoutWeights) -> tuple[Tensor, Tensor, Tensor]:
    """h', which is no view of anything, and both thin products, flat."""
    gate_z, z = h.flatten(0, -2) @ weights.gate_down, (h - s).flatten(0, -2) @ weights.down
    result = torch.lerp(h, s, _gate(gate_z, weights).view_as(h)).contiguous()
    result.flatten(0, -2).addmm_(z, weights.up)
    return result, gate_z, z


def _gate(z: Tensor, weights: ReadoutWeights) -> Tensor:
    return torch.addmm(weights.gate_bias, z, weights.gate_up).tanh_()


class _ReadOut(torch.autograd.Function):
    """`read_out`; saved are h, s and the down products. The gradients can't be differentiated again."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, *weights: Tensor) -> Tensor:
        result, gate_z, z = _read_out(h, s, ReadoutWeights(*weights))
        ctx.save_for_backward(h, s, gate_z, z, *weights)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, s, gate_z, z, *tensors = ctx.saved_tensors
        weights = ReadoutWeights(*tensors)
        with torch.autocast(grad.device.type, enabled=False):
            flat, gate, difference = grad.flatten(0, -2), _gate(gate_z, weights), (h - s).flatten(0, -2)
            grad_bias = -flat * difference * (1 - gate * gate)
            grad_gate_z, grad_z = grad_bias @ weights.gate_up.T, flat @ weights.up.T
            grad_difference = grad_z @ weights.down.T - flat * gate
            return (
                (flat + grad_difference + grad_gate_z @ weights.gate_down.T).view_as(grad),
                -grad_difference.view_as(grad),
                h.flatten(0, -2).T @ grad_gate_z,
                gate_z.T @ grad_bias,
                grad_bias.sum(0),
                difference.T @ grad_z,
                z.T @ flat,
            )


class ShadowReadoutModel(nn.Module):
    """The read-out's weights: `gate_down` `[d, k]`, `gate_up` `[k, d]`, `gate_bias` `[d]`, `down` `[d, m]`, `up` `[m, d]`.

    Args:
        hidden_size: d, the width of the base.
        gate_hidden_size: k.
        map_hidden_size: m.
    """

    def __init__(self, hidden_size: int, gate_hidden_size: int, map_hidden_size: int) -> None:
        super().__init__()
        self.gate_down = nn.Parameter(torch.empty(hidden_size, gate_hidden_size).normal_(std=hidden_size**-0.5))
        self.gate_up = nn.Parameter(torch.zeros(gate_hidden_size, hidden_size))
        self.gate_bias = nn.Parameter(torch.zeros(hidden_size))
        self.down = nn.Parameter(torch.empty(hidden_size, map_hidden_size).normal_(std=hidden_size**-0.5))
        self.up = nn.Parameter(torch.zeros(map_hidden_size, hidden_size))

    def extra_repr(self) -> str:
        """The sizes that `print(model)` shows."""
        (width, gate_width), map_width = self.gate_down.shape, self.down.shape[1]
        return f"d={width}, k={gate_width}, m={map_width}"

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """h' `[B, T, d]`, in dtype and on the device of `h`."""
        weights = (cast(getattr(self, name), h.dtype, h.device) for name in ReadoutWeights._fields)
        return read_out(h, s.to(h.device, h.dtype), ReadoutWeights(*weights))
