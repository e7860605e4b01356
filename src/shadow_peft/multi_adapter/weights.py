"""The weights of several adapters with the same formulas, stacked for the pieces of a batch.

The rows of a batch that several adapters answer are sorted by adapter and cut into pieces of equal size, the greatest that
leaves no remainder: 4 + 4 rows are 2 pieces of 4, 6 + 2 rows are 4 pieces of 2, of which 3 have the same weights. So no row
is padded and no product is wasted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Self

import torch
from torch import Tensor

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.config import ShadowConfig
from shadow_peft.layers.grouped import stack_padded
from shadow_peft.layers.readout import ReadoutWeights, ShadowReadoutModel
from shadow_peft.layers.update import Norm, ShadowUpdateModel, UpdateWeights

Pairs = list[tuple[Tensor, Tensor]]
"""Down and up weights `[P, d, r]`, `[P, r, d]` of every adapted layer."""

Formulas = tuple[str, bool, bool, int]
"""What adapters of one group share: variant, whether the injection normalizes, whether s is used, first injected layer."""


def formulas_of(config: ShadowConfig) -> Formulas:
    """What a config computes."""
    return config.variant, config.normalize_injection, config.use_shadow_state, config.first_injected_layer


@dataclass(frozen=True)
class StackedWeights:
    """The weights of P pieces, in the dtype of the computation.

    Attributes:
        injection: D and alpha * U of every adapted layer.
        update: the update weights of every adapted layer but the last; empty in the variant "readout".
        norm: LayerNorms of the update, `[P, 1, d]`, or None.
        output: E and V of every adapted layer; empty in the other variants.
        readout: the weights of the read-out, or None.
        versions: which parameters these are copies of, and how often those had been changed.
    """

    injection: Pairs
    update: list[UpdateWeights]
    norm: Norm | None
    output: Pairs
    readout: ReadoutWeights | None
    versions: list[tuple[int, int]]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # never changed, so copies of a cache share it


def pieces_of(counts: Sequence[int]) -> list[int]:
    """For each piece the index of its adapter, of which piece sizes are the greatest that divide all `counts` of rows."""
    size = gcd(*counts)
    return [index for index, count in enumerate(counts) for _ in range(count // size)]


def stack_weights(adapters: Sequence[ShadowAdapter], pieces: Sequence[int], dtype: torch.dtype) -> StackedWeights:
    """The weights of adapters with the same formulas.

    Args:
        adapters: the adapters.
        pieces: for each piece the index of its adapter.
        dtype: dtype of the computation.
    """
    injections = [adapter.shadow_injection_model for adapter in adapters]
    ups = [model.injection_ups * a.shadow_config.alpha for model, a in zip(injections, adapters, strict=True)]
    injection = _pairs([model.injection_downs for model in injections], ups, pieces, dtype)
    updates = [a.shadow_update_model for a in adapters if a.shadow_update_model is not None]
    outputs = [a.shadow_output_model for a in adapters if a.shadow_output_model is not None]
    readouts = [a.shadow_readout_model for a in adapters if a.shadow_readout_model is not None]
    return StackedWeights(
        injection,
        _update_weights(updates, pieces, dtype) if updates else [],
        _norm(updates, pieces, dtype) if updates else None,
        _pairs([m.output_downs for m in outputs], [m.output_ups for m in outputs], pieces, dtype) if outputs else [],
        _readout(readouts, pieces, dtype) if readouts else None,
        versions_of(adapters),
    )


def versions_of(adapters: Sequence[ShadowAdapter]) -> list[tuple[int, int]]:
    """Memory and number of changes of every parameter that `stack_weights` copies."""
    return [
        (parameter.data_ptr(), parameter._version)
        for adapter in adapters
        for name, part in adapter.parts().items()
        if name not in ("shadow_model", "shadow_hidden_projection")
        for parameter in part.parameters()
    ]


def _stacked(tensors: Sequence[Tensor], pieces: Sequence[int], dtype: torch.dtype, dim: int) -> Tensor:
    cast = [tensor.to(dtype) for tensor in tensors]
    return stack_padded([cast[index] for index in pieces], dim)


def _pairs(downs: Sequence[Tensor], ups: Sequence[Tensor], pieces: Sequence[int], dtype: torch.dtype) -> Pairs:
    """Down weights `[N, d, r]` and up weights `[N, r, d]` of all adapters, as pairs for every layer."""
    down, up = (_stacked(tensors, pieces, dtype, dim=1) for tensors in (downs, ups))
    return list(zip(down.unbind(0), up.unbind(0), strict=True))


def _update_weights(models: Sequence[ShadowUpdateModel], pieces: Sequence[int], dtype: torch.dtype) -> list[UpdateWeights]:
    columns = {}
    for name, _ in models[0].live.named_parameters():
        tensors = [model.live.get_parameter(name) for model in models]
        if name in ("down", "down_bias"):  # gate and transform lie side by side: each is padded for itself
            tensors = [tensor.unflatten(1, (2, -1)) for tensor in tensors]
        stacked = _stacked(tensors, pieces, dtype, dim=1)
        stacked = stacked.flatten(2, 3) if name in ("down", "down_bias") else stacked
        columns[name] = (stacked.unsqueeze(2) if name.endswith("bias") else stacked).unbind(0)
    return [UpdateWeights(**dict(zip(columns, layer, strict=True))) for layer in zip(*columns.values(), strict=True)]


def _norm(models: Sequence[ShadowUpdateModel], pieces: Sequence[int], dtype: torch.dtype) -> Norm | None:
    norms = [model.hidden_norm for model in models if model.hidden_norm is not None]
    if not norms:
        return None
    weight, bias = (_stacked([n.get_parameter(name) for n in norms], pieces, dtype, 0) for name in ("weight", "bias"))
    return Norm(weight.unsqueeze(1), bias.unsqueeze(1))


def _readout(models: Sequence[ShadowReadoutModel], pieces: Sequence[int], dtype: torch.dtype) -> ReadoutWeights:
    stacked = {
        name: _stacked([model.get_parameter(name) for model in models], pieces, dtype, 0) for name in ReadoutWeights._fields
    }
    return ReadoutWeights(**{**stacked, "gate_bias": stacked["gate_bias"].unsqueeze(1)})
