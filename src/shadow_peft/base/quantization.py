"""Quantized bases: whether an adapter on one can be trained, how many weights it has, and a kernel that passes no gradient.

A quantized base stays as it was loaded: frozen, and never requantized. Gradients go through its layers to what lies before
them. What is trained are the adapter's parameters, which are floats. transformers' `Trainer` refuses a quantized model
unless its private flag `_hf_peft_config_loaded` says that parameters of an adapter are trained beside the quantized ones;
`trains_beside_quantized` is the honest value of that flag.

On CPUs with AVX512-BF16, bitsandbytes repacks the weights of a 4 bit layer in its first inference, for a kernel that rounds
to bfloat16 and through which autograd sends nothing: a training that follows an evaluation would lose the gradient of every
linear map of the base without a word. `GradientKernels` keeps the layers from it while an adapter is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_PASSES_GRADIENTS = ("torchao",)
"""Methods whose layers pass gradients to their inputs, as the tests check, although transformers calls some untrainable."""

_MAY_PACK = "support_avx512bf16_for_cpu"
"""What a 4 bit layer of bitsandbytes asks before it repacks its weights."""


def quantization_method(base: nn.Module) -> str | None:
    """The name of the method that a base is quantized with, as transformers calls it; None where it is not quantized."""
    quantizer = getattr(base, "hf_quantizer", None)
    return None if quantizer is None else _method_of(quantizer)


def _method_of(quantizer: Any) -> str:
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def passes_gradients(base: nn.Module) -> bool:
    """Whether the layers of a base pass gradients to their inputs, so that an adapter before them can be trained."""
    quantizer = getattr(base, "hf_quantizer", None)
    return quantizer is None or bool(quantizer.is_trainable) or _method_of(quantizer) in _PASSES_GRADIENTS


def trains_beside_quantized(base: nn.Module) -> bool:
    """Whether an adapter's float parameters are what is trained, beside quantized ones that pass gradients."""
    return quantization_method(base) is not None and passes_gradients(base)


def num_weights(parameters: Iterable[nn.Parameter]) -> int:
    """Number of weights that parameters stand for: a byte of a 4 bit parameter holds two."""
    return sum(_logical_size(parameter) for parameter in parameters)


def _logical_size(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else torch.Size(state.shape).numel())


def is_packed(weight: Any) -> bool:
    """Whether bitsandbytes has repacked a 4 bit weight for inference on a CPU."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def unpacked(weight: Any) -> tuple[Tensor, Any]:
    """Data and state of a repacked 4 bit weight in bitsandbytes' general format; the weight itself stays as it is.

    The 4 bit codes are those before it was repacked. The scales are what the packed kernel multiplies by, in float32:
    repacking has rounded them to bfloat16.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(weight.quant_state)
    scales = state.absmax.T.reshape(-1).float()  # packed `[K / blocksize, N]`, general `[N * K / blocksize]`
    state.original_nested = False  # else the inverse would quantize the scales anew
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = scales
    return data, state


class GradientKernels:
    """Keeps the 4 bit layers of a base on kernels that pass gradients, from `hold` to `release`.

    Layers that were repacked before are unpacked for that time. Several adapters may hold one base; the last release
    gives every layer back as the first hold found it.

    Args:
        base: any base; most have no such layer.
    """

    _holders: ClassVar[WeakKeyDictionary[nn.Module, int]] = WeakKeyDictionary()
    _nested: ClassVar[WeakKeyDictionary[nn.Module, bool]] = WeakKeyDictionary()
    """Layers that were packed when they were first held, and whether their scales had been quantized before that."""

    def __init__(self, base: nn.Module) -> None:
        self._layers = [m for m in base.modules() if m.__dict__.get(_MAY_PACK, False) or self._holders.get(m)]
        self._held = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for layer in self._layers if self._held else []:  # a copy, of its layers too, holds what it was copied from holds
            self._holders[layer] = self._holders.get(layer, 0) + 1

    def hold(self) -> None:
        """Take the gradient kernels."""
        layers = [] if self._held else self._layers
        self._held = True
        for layer in layers:
            holders = self._holders.get(layer, 0)
            self._holders[layer] = holders + 1
            if holders == 0:
                layer.__dict__[_MAY_PACK] = False
                self._unpack(layer)

    def release(self) -> None:
        """Leave the choice of kernels to bitsandbytes again."""
        layers = self._layers if self._held else []
        self._held = False
        for layer in layers:
            self._holders[layer] -= 1
            if self._holders[layer] == 0:
                layer.__dict__[_MAY_PACK] = True
                self._pack_again(layer)

    def _unpack(self, layer: Any) -> None:
        weight = layer.weight
        if not is_packed(weight):
            return
        self._nested[layer] = weight.quant_state.original_nested
        data, state = unpacked(weight)
        weight.data = data
        vars(weight.quant_state).update(vars(state))  # the layer holds the same state object

    def _pack_again(self, layer: Any) -> None:
        if layer not in self._nested:
            return
        from bitsandbytes.functional import _convert_weight_packed_for_cpu

        weight = layer.weight
        weight.data, state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        state.original_nested = self._nested.pop(layer)
