"""Dialect A: the tensors of `shadow-peft` 0.1.x under their names in `shadow_adapter.safetensors`.

Each name belongs to a view of one of the model's parameters. The layout of the parameters is chosen for speed: gate and
transform share one down projection, and the weights of all layers are stacked. Copying from a view saves, copying into it
loads.
"""

from __future__ import annotations

from torch import Tensor, nn

from shadow_peft.adapter import ShadowAdapter

ADAPTER_FILE = "shadow_adapter.safetensors"
READOUT_FILE = "shadow_adapter_readout.safetensors"
"""Has another name, so that `shadow-peft` 0.1.x does not find an adapter that it cannot compute."""
LEGACY_ADAPTER_FILE = "shadow_adapter.pt"
HEADS_FILE = "shadow_modules.safetensors"
BASE_ADAPTER_FILE = "base_adapter.safetensors"


def adapter_file(variant: str) -> str:
    """Name of the file that holds an adapter's tensors."""
    return READOUT_FILE if variant == "readout" else ADAPTER_FILE


def adapter_views(model: ShadowAdapter) -> dict[str, Tensor]:
    """Name in the file -> view of the parameter, for every tensor of the adapter; task heads are apart.

    Raises:
        ValueError: this dialect cannot hold the adapter's variant.
    """
    if model.shadow_config.variant == "peft":
        raise ValueError(
            f"An adapter of variant {model.shadow_config.variant!r} cannot be stored in the dialect of shadow-peft 0.1.x; "
            'save it with dialect="peft".'
        )
    views = {f"shadow_model.{name}": tensor for name, tensor in saved_tensors(model.shadow_model).items()}
    if isinstance(model.shadow_hidden_projection, nn.Linear):
        views["shadow_hidden_projection.weight"] = model.shadow_hidden_projection.weight.detach()
    injection = model.shadow_injection_model
    views["shadow_injection_model.injection_downs"] = injection.injection_downs.detach()
    views["shadow_injection_model.injection_ups"] = injection.injection_ups.detach()
    if model.shadow_config.variant == "readout":
        parts = ("shadow_output_model", "shadow_readout_model")
        return views | {f"{part}.{n}": t for part in parts for n, t in saved_tensors(getattr(model, part)).items()}
    return views | {f"shadow_update_model.{name}": view for name, view in _update_views(model).items()}


def head_views(model: ShadowAdapter) -> dict[str, Tensor]:
    """Name in `shadow_modules.safetensors` -> tensor of a trained head."""
    return {
        f"{head}.{name}": tensor
        for head, module in model.task_heads.items()
        for name, tensor in saved_tensors(module).items()
    }


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's state dict, detached, sharing memory with it."""
    return {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}


def _update_views(model: ShadowAdapter) -> dict[str, Tensor]:
    """Gate of layer i: `update_gates.i` (indices 0, 2); its transform: `update_transforms.i` (0, 3, since 2 is dropout)."""
    updating, k = model.shadow_update_model, model.shadow_config.gate_hidden_size
    assert updating is not None
    assert updating.hidden_norm is not None
    views = {f"hidden_norm.{name}": p.detach() for name, p in updating.hidden_norm.named_parameters()}
    for i, weights in enumerate(updating.all_weights()):
        views[f"update_gates.{i}.0.weight"] = weights.down[:k]
        views[f"update_gates.{i}.2.weight"] = weights.gate_up
        views[f"update_transforms.{i}.0.weight"] = weights.down[k:]
        views[f"update_transforms.{i}.3.weight"] = weights.transform_up
    return views
