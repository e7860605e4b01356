"""The config of a twin: the base's config with fewer layers.

A config describes its layers one by one in lists, in lists of indices, in counts, in periods, or in overrides by index.
Generic rule: a list as long as the base is deep holds one value per layer. The tables declare what is written otherwise.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

from shadow_peft.base.architectures import DEPTH_NAMES, Decoder, write_size
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
"""Settings that a twin does without: keys shared between layers, and n-gram tables inside layers."""

_LAST_KINDS: dict[str, str] = {"gemma4_text": "full_attention", "gemma4_unified_text": "full_attention"}
"""`model_type` -> the kind of the last layer, which the config makes so when it is loaded."""

_SHARING_KINDS: dict[str, str] = {"zamba": "hybrid"}
"""`model_type` -> the kind of layer whose weights are shared among all layers of the kind."""


def selected_layers(decoder: Decoder, config: ShadowConfig) -> list[int]:
    """Base layers that the twin's layers follow.

    They are the first ones, or ones evenly spaced from the first to the last. The last chosen one gives way to the next base
    layer of the right kind: where none keeps keys but the base has layers that do (recurrent and attention layers mixed),
    and where the config wants its last layer to be of one kind.

    Raises:
        ValueError: more layers than the base has.
    """
    n, count = config.num_shadow_layers, len(decoder.layers)
    if n > count:
        raise ValueError(f"num_shadow_layers is {n}, but the base has only {count} decoder layers.")
    if config.shadow_init_layers == "first" or n == 1:
        chosen = list(range(n))
    else:
        chosen = [round(i * (count - 1) / (n - 1)) for i in range(n)]
    right = _right_last_layers(decoder.config)
    if right and not set(right) & set(chosen[-1:] if decoder.config.model_type in _LAST_KINDS else chosen):
        chosen[-1] = next((i for i in right if i > chosen[-1]), right[-1])
    return sorted(chosen)


def _right_last_layers(config: PreTrainedConfig) -> list[int]:
    """Base layers of the kind that one of the twin's layers, or its last one, must have."""
    last = _LAST_KINDS.get(config.model_type)
    return [i for i, kind in enumerate(_kinds(config)) if (kind == last if last else kind not in _WITHOUT_KEYS)]


def truncated_config(decoder: Decoder, config: ShadowConfig) -> PreTrainedConfig:
    """The base's config with the twin's layers and the sizes that `ShadowConfig` overrides."""
    chosen, stored = selected_layers(decoder, config), decoder.config.to_dict()
    short = copy.deepcopy(decoder.config)
    for name, value in _truncated(stored, chosen, len(decoder.layers)).items():
        setattr(short, name, value)
    if _kinds(short).count(_SHARING_KINDS.get(short.model_type, "")) == 1:
        short.tie_word_embeddings = False  # transformers refuses to tie a layer's weights to no other layer's
    for size, field in _SIZES.items():
        value = getattr(config, field)
        if value is not None:
            write_size(short, size, value)
    return short


def _kinds(config: PreTrainedConfig) -> list[str]:
    """The kind of every layer, where a config tells."""
    return list(getattr(config, "layer_types", None) or [])


def _truncated(stored: dict[str, Any], chosen: list[int], depth: int) -> dict[str, Any]:
    """The settings that change when only the `chosen` of `depth` layers stay; overrides by index come last."""
    changed: dict[str, Any] = {name: value for name, value in _RESET.items() if name in stored}
    changed |= {name: len(chosen) for name in (*DEPTH_NAMES, *_OTHER_DEPTHS) if stored.get(name) is not None}
    for name, value in stored.items():
        if name in changed:
            continue
        if name in _INDICES and value is not None:
            changed[name] = [new for new, old in enumerate(chosen) if old in value]
        elif name in _COUNTS and value is not None:
            changed[name] = sum(old < value for old in chosen)
        elif name in _CYCLES and value:
            changed[name] = [value[old % len(value)] for old in chosen]
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            changed[name] = [value[old] for old in chosen]
    for period, offset in _PERIODS:
        if period in stored:
            changed[period], changed[offset] = _period(stored[period], stored[offset], chosen)
    if stored.get("per_layer_config"):
        changed["per_layer_config"] = _by_index(stored["per_layer_config"], chosen)
    return changed


def _by_index(overrides: dict[Any, Any], chosen: list[int]) -> dict[int, Any]:
    known = {int(index): override for index, override in overrides.items()}
    return {new: known[old] for new, old in enumerate(chosen) if old in known}


def _period(period: int, offset: int, chosen: list[int]) -> tuple[int, int]:
    """A period and offset under which the twin's layers are of the kinds of the chosen ones; the base's if there is none."""
    wanted = [old % period == offset for old in chosen]
    candidates = [(p, o) for p in range(1, len(chosen) + 2) for o in range(p)]
    fitting = (c for c in candidates if [new % c[0] == c[1] for new in range(len(chosen))] == wanted)
    return next(fitting, (period, offset))
