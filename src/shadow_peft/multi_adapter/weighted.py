"""One adapter whose corrections are a weighted sum of those of others.

    sum_i w_i alpha_i (h - s_i) D_i U_i  =  (h - s) [D_1 .. D_n] [w_1 alpha_1 U_1; ..; w_n alpha_n U_n]        where s_i = s

The ranks are concatenated, which is exact where all adapters have the same shadow state at every layer: the same shadow and,
in the variants "published" and "peft", the same update. The output correction and the low-rank term of the read-out are
linear too; the gate of the read-out is not, so it must be the same, with weights that sum to 1, or zero everywhere.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.placement import place

_GATE = ("gate_down", "gate_up", "gate_bias")


def weighted_adapter(adapters: Sequence[ShadowAdapter], weights: Sequence[float]) -> ShadowAdapter:
    """The weighted sum of adapters on one base.

    Args:
        adapters: at least one.
        weights: a finite factor for each.

    Returns:
        An adapter whose ranks are the sums of theirs, with alpha 1.

    Raises:
        ValueError: no sum of these adapters is an adapter, with the reason.
    """
    if not adapters or len(adapters) != len(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"Pass a finite weight for each of {len(adapters)} adapters, got {list(weights)!r}.")
    _check_sum(adapters, weights)
    first, configs = adapters[0], [adapter.shadow_config for adapter in adapters]
    ranks: dict[str, Any] = {"injection_hidden_size": sum(config.injection_hidden_size for config in configs)}
    if first.shadow_config.variant == "readout":
        for name in ("output_hidden_size", "readout_hidden_size"):
            ranks[name] = sum(getattr(config, name) for config in configs)
    shadow = None if first.has_implicit_shadow else copy.deepcopy(first.shadow_model)
    dtype = first.shadow_injection_model.injection_downs.dtype
    config = replace(configs[0], alpha=1.0, **ranks)
    summed = ShadowAdapter(first.base_model, config, shadow_model=shadow, init_from_base=False)
    for part in summed.parts().values():
        place(part, dtype)
    _fill(summed, adapters, [w * config.alpha for w, config in zip(weights, configs, strict=True)], weights)
    for name, head in first.task_heads.items():
        summed.task_heads[name] = copy.deepcopy(head)
    return summed


@torch.no_grad()
def _fill(
    summed: ShadowAdapter, adapters: Sequence[ShadowAdapter], factors: Sequence[float], weights: Sequence[float]
) -> None:
    """Copy what is the same and concatenate what is summed."""
    first = adapters[0]
    for name in ("shadow_model", "shadow_hidden_projection", "shadow_update_model"):
        if getattr(first, name) is not None:
            getattr(summed, name).load_state_dict(getattr(first, name).state_dict())
    injections = [adapter.shadow_injection_model for adapter in adapters]
    _concatenate(summed.shadow_injection_model, injections, "injection_downs", "injection_ups", factors)
    if summed.shadow_output_model is None or summed.shadow_readout_model is None:
        return
    outputs = [adapter.shadow_output_model for adapter in adapters if adapter.shadow_output_model is not None]
    _concatenate(summed.shadow_output_model, outputs, "output_downs", "output_ups", weights)
    readouts = [adapter.shadow_readout_model for adapter in adapters if adapter.shadow_readout_model is not None]
    _concatenate(summed.shadow_readout_model, readouts, "down", "up", weights)
    for name in _GATE:
        summed.shadow_readout_model.get_parameter(name).copy_(readouts[0].get_parameter(name))


def _concatenate(target: nn.Module, sources: Sequence[nn.Module], down: str, up: str, factors: Sequence[float]) -> None:
    """Down weights `[.., d, r]` and up weights `[.., r, d]` side by side along the rank, the latter with their factors."""
    target.get_parameter(down).copy_(torch.cat([source.get_parameter(down) for source in sources], -1))
    ups = [factor * source.get_parameter(up) for factor, source in zip(factors, sources, strict=True)]
    target.get_parameter(up).copy_(torch.cat(ups, -2))


def _check_sum(adapters: Sequence[ShadowAdapter], weights: Sequence[float]) -> None:
    """Refuse adapters whose corrections have no sum of the same form.

    Raises:
        ValueError: with the reason.
    """
    formulas = ("variant", "normalize_injection", "use_shadow_state", "first_injected_layer", "dropout")
    differing = [name for name in formulas if len({getattr(adapter.shadow_config, name) for adapter in adapters}) > 1]
    reason = f"they differ in {differing[0]}" if differing else None
    if reason is None and not _same([_tensors(adapter, "shadow_model", "shadow_hidden_projection") for adapter in adapters]):
        reason = "their shadows differ, and a sum has one shadow"
    if reason is None and not _same([_tensors(adapter, "shadow_update_model") for adapter in adapters]):
        reason = "their updates differ, so their states part after the first layer"
    if reason is None and not _same([_tensors(adapter, "task_heads") for adapter in adapters]):
        reason = "their trained heads differ"
    if reason is None and not _gates_add_up(adapters, weights):
        reason = "the gate of a read-out is not linear: gates must be the same, with weights that sum to 1, or all zero"
    if reason is not None:
        raise ValueError(f"No weighted sum of these adapters is an adapter: {reason}.")


def _gates_add_up(adapters: Sequence[ShadowAdapter], weights: Sequence[float]) -> bool:
    gates: list[dict[str, Tensor]] = [
        {name: readout.get_parameter(name) for name in _GATE}
        for readout in (adapter.shadow_readout_model for adapter in adapters)
        if readout is not None
    ]
    if all(not gate["gate_up"].any() and not gate["gate_bias"].any() for gate in gates):
        return True
    return _same(gates) and math.isclose(sum(weights), 1.0, abs_tol=1e-6)


def _tensors(adapter: ShadowAdapter, *parts: str) -> dict[str, Tensor]:
    modules = {part: getattr(adapter, part) for part in parts}
    return {
        f"{part}.{name}": tensor
        for part, module in modules.items()
        if module is not None
        for name, tensor in module.state_dict().items()
    }


def _same(states: Sequence[dict[str, Tensor]]) -> bool:
    first = states[0]
    return all(
        state.keys() == first.keys() and all(torch.equal(state[name], tensor) for name, tensor in first.items())
        for state in states[1:]
    )
