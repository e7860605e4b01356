"""The config of an implicit backbone: the base's config with fewer layers.

A config describes its layers one by one in lists, in lists of indices, in counts, in periods, or in overrides by index.
Generic rule: a list as long as the base is deep holds one value per layer. The tables declare what is written otherwise.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

from shadow_peft.base.architectures import DEPTH_NAMES, architecture_of, write_size
from shadow_peft.base.decoder import Decoder
from shadow_peft.config import ShadowConfig

_SIZES = {
    "hidden_size": "shadow_hidden_size",
    "intermediate_size": "shadow_intermediate_size",
    "num_attention_heads": "shadow_num_attention_heads",
    "num_key_value_heads": "shadow_num_key_value_heads",
    "head_dim": "shadow_head_dim",
}
"""A size of the backbone's config -> the field of ShadowConfig that overrides it."""

_WITHOUT_KEYS = frozenset({"linear_attention", "conv", "moe", "mlp"})
"""Kinds of layers that keep no key per token; transformers' cache counts its tokens in the other kinds."""

_OTHER_DEPTHS = ("encoder_layers", "num_blocks")
"""Settings that say the depth once more: a cache has as many entries as BART's encoder has layers."""

_INDICES = (
    *("attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "hybrid_layer_ids", "mlp_only_layers"),
    "moe_layers",
)
"""Settings that list the layers which are of one kind."""

_COUNTS = ("first_k_dense_replace", "num_dense_layers", "n_dense_layers")
"""Settings that say how many first layers are of one kind."""

_PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
"""Settings that say that every p-th layer, from an offset on, is of one kind."""

_CYCLES = ("block_types",)
"""Settings that list kinds of layers which are repeated up to the base's depth."""

_RESET: dict[str, Any] = {"num_kv_shared_layers": 0, "ple_layer_ids": []}
"""Settings that an implicit backbone does without: keys shared between layers, and n-gram tables inside layers."""


def selected_layers(decoder: Decoder, config: ShadowConfig) -> list[int]:
    """The base layers that the backbone's layers correspond to.

    They are the first ones, ones evenly spaced from the first to the last, or those that the config names. The last one is
    replaced by the next base layer of the right kind where no selected layer keeps keys but some base layer does (recurrent
    and attention layers mixed), and where the config wants its last layer to be of one kind.

    Raises:
        ValueError: more layers than the base has, or named layers of which none, or not the last, is of the right kind.
    """
    n, count = config.num_shadow_layers, len(decoder.layers)
    if n > count:
        raise ValueError(f"num_shadow_layers is {n}, but the base has only {count} decoder layers.")
    named = config.named_layers
    if named is not None:
        if named[-1] >= count:
            raise ValueError(f"shadow_init_layers names layer {named[-1]}, but the base's layers are 0 to {count - 1}.")
        selected = named
    elif config.shadow_init_layers == "first" or n == 1:
        selected = list(range(n))
    else:
        selected = [round(i * (count - 1) / (n - 1)) for i in range(n)]
    right = _right_last_layers(decoder.config)
    checked = selected[-1:] if architecture_of(decoder.config).last_layer_kind else selected
    if right and not set(right) & set(checked):
        if named is not None:
            raise ValueError(
                f"shadow_init_layers names {config.shadow_init_layers}; a {decoder.config.model_type} needs "
                f"{'as its last layer' if checked != selected else 'among them'} one of {', '.join(map(str, right))}."
            )
        selected[-1] = next((i for i in right if i > selected[-1]), right[-1])
    return sorted(selected)


def _right_last_layers(config: PreTrainedConfig) -> list[int]:
    """Base layers of the kind that one of the backbone's layers, or its last one, must have."""
    last = architecture_of(config).last_layer_kind
    return [i for i, kind in enumerate(_kinds(config)) if (kind == last if last else kind not in _WITHOUT_KEYS)]


def truncated_config(decoder: Decoder, config: ShadowConfig) -> PreTrainedConfig:
    """The base's config with the selected layers and the sizes that `ShadowConfig` overrides."""
    selected, stored = selected_layers(decoder, config), decoder.config.to_dict()
    short = copy.deepcopy(decoder.config)
    vars(short).pop("quantization_config", None)  # a backbone is made of floats, and so is the model that it is exported as
    for name, value in _truncated(stored, selected, len(decoder.layers)).items():
        setattr(short, name, value)
    if _kinds(short).count(architecture_of(short).shared_layer_kind or "") == 1:
        short.tie_word_embeddings = False  # transformers refuses to tie a layer's weights to no other layer's
    for size, field in _SIZES.items():
        value = getattr(config, field)
        if value is not None:
            write_size(short, size, value)
    return short


def _kinds(config: PreTrainedConfig) -> list[str]:
    """The kind of every layer, where a config tells."""
    return list(getattr(config, "layer_types", None) or [])


def _truncated(stored: dict[str, Any], selected: list[int], depth: int) -> dict[str, Any]:
    """The settings that change when only the `selected` of `depth` layers stay; overrides by index come last."""
    changed: dict[str, Any] = {name: value for name, value in _RESET.items() if name in stored}
    changed |= {name: len(selected) for name in (*DEPTH_NAMES, *_OTHER_DEPTHS) if stored.get(name) is not None}
    for name, value in stored.items():
        if name in changed:
            continue
        if name in _INDICES and value is not None:
            changed[name] = [new for new, old in enumerate(selected) if old in value]
        elif name in _COUNTS and value is not None:
            changed[name] = sum(old < value for old in selected)
        elif name in _CYCLES and value:
            changed[name] = [value[old % len(value)] for old in selected]
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            changed[name] = [value[old] for old in selected]
    for period, offset in _PERIODS:
        if period in stored:
            changed[period], changed[offset] = _period(stored[period], stored[offset], selected)
    if stored.get("per_layer_config"):
        changed["per_layer_config"] = _by_index(stored["per_layer_config"], selected)
    return changed


def _by_index(overrides: dict[Any, Any], selected: list[int]) -> dict[int, Any]:
    known = {int(index): override for index, override in overrides.items()}
    return {new: known[old] for new, old in enumerate(selected) if old in known}


def _period(period: int, offset: int, selected: list[int]) -> tuple[int, int]:
    """A period and offset that give the new layers the kinds of the selected ones; the base's if there is none."""
    wanted = [old % period == offset for old in selected]
    candidates = [(p, o) for p in range(1, len(selected) + 2) for o in range(p)]
    fitting = (c for c in candidates if [new % c[0] == c[1] for new in range(len(selected))] == wanted)
    return next(fitting, (period, offset))
