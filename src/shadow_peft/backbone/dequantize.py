"""The weights of a base as plain floats, for a backbone that is initialised from them: not quantized, without adapters."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


class CannotInitFromBase(ValueError):
    """The backbone's sizes, or the form of the base's weights, do not let it start from the base's layers."""


def dequantized_view(module: nn.Module) -> nn.Module:
    """A view of a module without PEFT adapters, its quantized weights floats of their logical shape; the rest is shared.

    bitsandbytes (4 and 8 bit) and torchao are known; other weights are returned unchanged.

    Raises:
        CannotInitFromBase: bitsandbytes has repacked 4 bit weights for inference on a CPU, which cannot be undone.
    """
    view = copy.copy(module)
    parts = {name: getattr(child, "base_layer", child) for name, child in module._modules.items()}  # below peft's adapters
    view._modules = {name: None if part is None else dequantized_view(part) for name, part in parts.items()}
    view._parameters = {name: None if p is None else _dequantized(module, p) for name, p in module._parameters.items()}
    return view


def _dequantized(module: Any, weight: Any) -> nn.Parameter:
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        state: Any = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):  # set by the first inference, absent before
            raise CannotInitFromBase(
                "bitsandbytes has repacked the 4 bit weights for inference; attach the shadow before that"
            )
        return _frozen(dequantize_4bit(weight.data, state))
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = module.state.SCB  # bitsandbytes moves them there in the first forward
        return _frozen(int8_vectorwise_dequant(weight.data, weight.SCB if scales is None else scales))
    if type(weight.data).__module__.startswith("torchao."):
        return _frozen(weight.data.dequantize())
    return weight


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
