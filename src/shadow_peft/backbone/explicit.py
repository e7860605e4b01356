"""An explicit shadow: a model that the user brings, whose backbone becomes the shadow's.

Its task head is stripped. It keeps its own embeddings unless they are removed; then it is fed the base's.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shadow_peft.backbone.projection import carried_projection, carry_projection
from shadow_peft.base.decoder import find_decoder
from shadow_peft.base.quantization import quantization_method
from shadow_peft.base.task_head import input_embeddings, path_of

logger = logging.getLogger(__name__)


def prepare_shadow_model(shadow_model: PreTrainedModel, *, remove_embed_tokens: bool = False) -> PreTrainedModel:
    """The backbone of a model that is to be an explicit shadow: its task head is stripped.

    Args:
        shadow_model: a causal LM, a bare decoder, or an `AutoModelForCausalLMWithHiddenProjection`, whose projection is
            kept with the backbone and reused.
        remove_embed_tokens: remove its embedding table, so that it is fed the base's input embeddings.

    Returns:
        The backbone itself, not a copy.

    Raises:
        TypeError: not a transformers model.
        ValueError: its decoder layers cannot be told, or it is quantized.
    """
    if not isinstance(shadow_model, PreTrainedModel):
        raise TypeError(f"shadow_model must be a transformers PreTrainedModel, got {type(shadow_model).__name__}.")
    method = quantization_method(shadow_model)
    if method is not None:
        raise ValueError(
            f"shadow_model is quantized with {method!r}, but a shadow is trained, in floats: load it without "
            "quantization_config. The base may be quantized."
        )
    projection = carried_projection(shadow_model)
    is_projected_lm = projection is not None and "shadow_model" in shadow_model._modules
    backbone: PreTrainedModel = shadow_model.shadow_model if is_projected_lm else _without_head(shadow_model)
    if projection is not None:
        carry_projection(backbone, projection)
    if trains_embeddings(shadow_model):
        vars(backbone)["train_embed_tokens"] = True
    if remove_embed_tokens:
        remove_embeddings(backbone)
    return backbone


def remove_embeddings(backbone: PreTrainedModel) -> str | None:
    """Remove a backbone's input embedding table; it must be fed `inputs_embeds` from then on.

    Returns:
        The name that the table's weight had, or None if there was none.
    """
    table = input_embeddings(backbone)
    if table is None:
        return None
    path = path_of(backbone, table)
    parent, _, name = path.rpartition(".")
    backbone.get_submodule(parent)._modules[name] = None
    backbone.main_input_name = "inputs_embeds"
    return f"{path}.weight"


def trains_embeddings(shadow_model: PreTrainedModel | None) -> bool:
    """Whether an explicit shadow was loaded with `freeze_embed_tokens=False`."""
    return bool(getattr(shadow_model, "train_embed_tokens", False))


def build_stored_shadow(provenance: dict[str, Any]) -> PreTrainedModel | None:
    """The explicit shadow that a checkpoint declares, with random weights; None where it declares none.

    Raises:
        ValueError: its `model_type` is not registered with transformers.
    """
    config = provenance.get("shadow_model_config")
    if config is None:
        return None
    has_embeddings = provenance.get("shadow_model_has_embeddings", True)
    return prepare_shadow_model(AutoModel.from_config(registered_config(config)), remove_embed_tokens=not has_embeddings)


def registered_config(data: dict[str, Any]) -> PreTrainedConfig:
    """A stored config as an object of the class that transformers has registered for its `model_type`.

    Raises:
        ValueError: the `model_type` is missing or not registered. What else the data names is never imported.
    """
    model_type = data.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"The stored shadow has model_type {model_type!r}, which transformers does not know.")
    config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(data)
    return config


def check_vocabularies(shadow: int, base: int) -> None:
    """Check that a shadow with its own table knows the base's tokens; tables are padded, so the last per cent may differ.

    Raises:
        ValueError: its table is smaller by more.
    """
    if shadow >= base:
        return
    if shadow < 0.99 * base:
        raise ValueError(f"The shadow's embedding table has {shadow} tokens, the base's {base}: they differ in vocabulary.")
    logger.warning("The shadow's embedding table has %d rows, the base's %d; tokens beyond would fail.", shadow, base)


def _without_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its task head; a bare decoder is taken as it is."""
    if model.get_output_embeddings() is None and model.base_model is model:
        return model
    return find_decoder(model, min_layers=1).backbone
