"""The weights of a base as plain floats, for what is initialised or exported from them: not quantized, without adapters."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shadow_peft.base.quantization import is_packed, unpacked


class CannotInitFromBase(ValueError):
    """The backbone's sizes, or the form of the base's weights, do not let it start from the base's layers."""


def dequantized_view(module: nn.Module) -> nn.Module:
    """A view of a module without PEFT adapters, its quantized weights floats of their logical shape; the rest is shared.

    bitsandbytes (4 and 8 bit) and torchao are known; other weights are returned unchanged.
    """
    view = copy.copy(module)
    parts = {name: getattr(child, "base_layer", child) for name, child in module._modules.items()}  # below peft's adapters
    view._modules = {name: None if part is None else dequantized_view(part) for name, part in parts.items()}
    view._parameters = {name: None if p is None else _dequantized(module, p) for name, p in module._parameters.items()}
    return view


def float_copy(linear: nn.Module) -> nn.Module:
    """A copy of a linear map, in floats where it is quantized."""
    view: Any = dequantized_view(linear)
    if view.weight is linear.get_parameter("weight"):
        return copy.deepcopy(linear)
    rows, columns = view.weight.shape
    plain = nn.Linear(columns, rows, view.bias is not None, view.weight.device, view.weight.dtype)
    plain.weight = view.weight
    if view.bias is not None:
        plain.bias = _frozen(view.bias.detach().to(view.weight.dtype, copy=True))
    return plain


def _dequantized(module: Any, weight: Any) -> nn.Parameter:
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        data, state = unpacked(weight) if is_packed(weight) else (weight.data, weight.quant_state)
        return _frozen(_as_stored(module, dequantize_4bit(data, state)))
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = module.state.SCB  # bitsandbytes moves them there in the first forward
        return _frozen(_as_stored(module, int8_vectorwise_dequant(weight.data, weight.SCB if scales is None else scales)))
    if type(weight.data).__module__.startswith("torchao."):
        return _frozen(weight.data.dequantize())
    return weight


def _as_stored(module: Any, value: Tensor) -> Tensor:
    """The weight `[out, in]` of a linear map in the layout of the class that was quantized: `[in, out]` for GPT-2's."""
    return value.T.contiguous() if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D) else value


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
