"""Dialect B: the files of the Shadow tuner in `peft` 0.21, for adapters of the variant "peft".

Its two files:

    adapter_config.json          peft_type "SHADOW" and the hyperparameters under peft's names
    adapter_model.safetensors    injection and update weights of each layer, then backbone and projection

Trained heads and adapters of the base are in files of their own beside them, as in dialect A; peft does not read these. What
peft's config has no name for is in its `provenance`, which peft ignores too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.shared_embedding import SharedEmbedding
from shadow_peft.base.task_head import input_embeddings
from shadow_peft.checkpoint.native import saved_tensors
from shadow_peft.config import ShadowConfig

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
PEFT_TYPE = "SHADOW"

_PREFIX = "base_model.model."
_ADAPTER = "default"
_BACKBONE = f"base_model.shadow_backbone.{_ADAPTER}"

_FIELDS = {
    "r": "injection_hidden_size",
    "shadow_alpha": "alpha",
    "shadow_dropout": "dropout",
    "shadow_hidden_size": "shadow_hidden_size",
    "shadow_num_attention_heads": "shadow_num_attention_heads",
    "shadow_intermediate_size": "shadow_intermediate_size",
}
"""Field of `adapter_config.json` -> field of ShadowConfig with the same meaning."""


def adapter_views(model: ShadowAdapter) -> dict[str, Tensor]:
    """Name in `adapter_model.safetensors` -> view of the parameter.

    Raises:
        ValueError: this dialect cannot hold the adapter's variant.
    """
    if model.shadow_config.variant != "peft":
        raise ValueError(
            f"An adapter of variant {model.shadow_config.variant!r} cannot be stored in peft's dialect, which holds the "
            'variant "peft" alone.'
        )
    views: dict[str, Tensor] = {}
    for i, block in enumerate(block_paths(model)):
        views |= {f"{_PREFIX}{block}.{name}": view for name, view in _block_views(model, i).items()}
    backbone = saved_tensors(model.shadow_model)
    views |= {f"{_BACKBONE}.{name}": tensor for name, tensor in backbone.items()}
    if isinstance(model.shadow_hidden_projection, nn.Linear):
        weight = model.shadow_hidden_projection.weight.detach()
        views[f"base_model.shadow_projection.{_ADAPTER}.weight"] = weight
    return views


def block_paths(model: ShadowAdapter) -> list[str]:
    """Paths of the base's decoder layers, as `target_modules` lists them."""
    stem = ".".join(filter(None, (model.decoder.path, model.decoder.layers_path)))
    return [f"{stem}.{i}" for i in range(len(model.decoder.layers))]


def _block_views(model: ShadowAdapter, i: int) -> dict[str, Tensor]:
    injection, k = model.shadow_injection_model, model.shadow_config.gate_hidden_size
    assert model.shadow_update_model is not None
    weights = model.shadow_update_model.all_weights()[i]
    assert weights.down_bias is not None
    assert weights.gate_up_bias is not None
    assert weights.transform_up_bias is not None
    gate, transform = f"shadow_update_gate.{_ADAPTER}", f"shadow_update_transform.{_ADAPTER}"
    return {
        f"shadow_down.{_ADAPTER}.weight": injection.injection_downs.detach()[i].T,
        f"shadow_up.{_ADAPTER}.weight": injection.injection_ups.detach()[i].T,
        f"{gate}.0.weight": weights.down[:k],
        f"{gate}.0.bias": weights.down_bias[:k],
        f"{gate}.2.weight": weights.gate_up,
        f"{gate}.2.bias": weights.gate_up_bias,
        f"{transform}.0.weight": weights.down[k:],
        f"{transform}.0.bias": weights.down_bias[k:],
        f"{transform}.2.weight": weights.transform_up,
        f"{transform}.2.bias": weights.transform_up_bias,
    }


def config_from_peft(data: dict[str, Any], ours: dict[str, Any]) -> ShadowConfig:
    """The ShadowConfig that an `adapter_config.json` describes.

    Args:
        data: its content.
        ours: the fields that we stored with it, for what peft has no name; empty in a file of peft's own.

    Raises:
        ValueError: a config of another tuner, or one with an option that this library does not support.
    """
    if data.get("peft_type") != PEFT_TYPE:
        raise ValueError(f"{CONFIG_FILE} has peft_type {data.get('peft_type')!r}; only {PEFT_TYPE!r} is a shadow adapter.")
    values = {name: data[theirs] for theirs, name in _FIELDS.items() if data.get(theirs) is not None}
    if is_mirror(data) or not ours:
        values["num_shadow_layers"] = data.get("shadow_num_hidden_layers") or 1
    values |= {
        "gate_hidden_size": data.get("update_hidden_size") or data["r"],
        "variant": "peft",
    }
    if is_mirror(data) and not data.get("share_embeddings", True) and not ours:
        values["train_shadow_embeddings"] = True
    return ShadowConfig.from_dict({"shadow_init": "random", **ours, **values})


def is_mirror(data: dict[str, Any]) -> bool:
    """Whether the backbone of an `adapter_config.json` is made from the base, and is no model of its own."""
    return data.get("shadow_model", "mirror") == "mirror"


def holds(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether the tensors of a checkpoint hold one that has a name in the backbone."""
    return f"{_BACKBONE}.{name}" in tensors


def peft_config(model: ShadowAdapter, base_name: str | None) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter."""
    config = model.shadow_config
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM" if model.base_model.get_output_embeddings() is not None else None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()},
        "shadow_model": "mirror",
        "shadow_num_hidden_layers": config.num_shadow_layers,
        "update_hidden_size": config.gate_hidden_size,
        "share_embeddings": not _reads_own_table(model),
        "target_modules": block_paths(model),
    }


def _reads_own_table(model: ShadowAdapter) -> bool:
    """Whether a shadow as wide as the base does without the base's embeddings; one of another width always does."""
    own = input_embeddings(model.shadow_model)
    same_width = model.shadow_hidden_size == model.base_hidden_size
    return same_width and own is not None and not isinstance(own, SharedEmbedding)
