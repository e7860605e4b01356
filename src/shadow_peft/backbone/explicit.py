"""The shadow backbone: embeddings in, initial shadow state out.

    s = P(backbone(x))      [B, T, d]; P is a linear map from the backbone's width S to d, the identity when they agree

An *implicit* backbone is a short twin of the base (see `twin`) and is fed the base's input embeddings. An *explicit* one is
a model that the user brings: its task head is stripped, it keeps its own embeddings unless they were removed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shadow_peft.backbone.implicit import remove_embeddings
from shadow_peft.base.architectures import find_decoder, read_size

PROJECTION = "shadow_hidden_projection"

CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems")
"""Names under which models take and return what they remember of earlier tokens."""

_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments that describe packed sequences; attention reads them from a forward's keyword arguments."""


def prepare_shadow_model(shadow_model: PreTrainedModel, *, remove_embed_tokens: bool = False) -> PreTrainedModel:
    """The backbone of a model that is to be an explicit shadow: its task head is stripped.

    Args:
        shadow_model: a causal LM, a bare decoder, or an `AutoModelForCausalLMWithHiddenProjection`, whose projection is
            kept with the backbone and reused.
        remove_embed_tokens: take its embedding table away, so that it is fed the base's input embeddings.

    Returns:
        The backbone itself, not a copy.

    Raises:
        TypeError: not a transformers model.
        ValueError: its decoder layers cannot be told.
    """
    if not isinstance(shadow_model, PreTrainedModel):
        raise TypeError(f"shadow_model must be a transformers PreTrainedModel, got {type(shadow_model).__name__}.")
    projection = carried_projection(shadow_model)
    backbone = shadow_model.shadow_model if projection is not None and _is_wrapped(shadow_model) else _bare(shadow_model)
    if projection is not None:
        object.__setattr__(backbone, PROJECTION, projection)  # beside the modules, so that no state dict shows it
    if remove_embed_tokens:
        remove_embeddings(backbone)
    return backbone


def rebuilt_shadow(provenance: dict[str, Any]) -> PreTrainedModel | None:
    """The explicit shadow that a checkpoint declares, with random weights; None where it declares none.

    Raises:
        ValueError: its `model_type` is not registered with transformers.
    """
    config = provenance.get("shadow_model_config")
    if config is None:
        return None
    shares = not provenance.get("shadow_model_has_embeddings", True)
    return prepare_shadow_model(AutoModel.from_config(registered_config(config)), remove_embed_tokens=shares)


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


def asked_to_train(shadow_model: PreTrainedModel | None) -> bool:
    """Whether an explicit shadow was loaded with `freeze_embed_tokens=False`."""
    return bool(getattr(shadow_model, "train_embed_tokens", False))


def carried_projection(model: PreTrainedModel) -> nn.Linear | None:
    """The projection that an explicit shadow brings along, or None."""
    projection = getattr(model, PROJECTION, None)
    return projection if isinstance(projection, nn.Linear) else None


def _is_wrapped(model: PreTrainedModel) -> bool:
    return "shadow_model" in model._modules


def _bare(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its task head; a decoder whose layers cannot be told is taken as it is."""
    if model.get_output_embeddings() is None and model.base_model is model:
        return model
    return find_decoder(model).backbone


def make_projection(backbone: PreTrainedModel, hidden_size: int) -> nn.Module:
    """P: the projection that the backbone carries, a new one for another width, or the identity.

    Raises:
        ValueError: the carried projection does not map the backbone's width to the base's.
    """
    width = backbone_width(backbone)
    carried = carried_projection(backbone)
    if carried is not None:
        if (carried.in_features, carried.out_features) != (width, hidden_size):
            raise ValueError(
                f"The shadow's projection maps {carried.in_features} to {carried.out_features}, but the shadow is "
                f"{width} wide and the base {hidden_size}."
            )
        return carried
    return nn.Identity() if width == hidden_size else nn.Linear(width, hidden_size, bias=False)


def backbone_width(backbone: PreTrainedModel) -> int:
    """Width S of the hidden states that a backbone returns."""
    return read_size(backbone.config.get_text_config(decoder=True), "hidden_size")


@dataclass(frozen=True)
class Signature:
    """What a model's forward takes: declared names, and whether it takes others too."""

    names: frozenset[str]
    open: bool

    @classmethod
    def of(cls, model: nn.Module) -> Signature:
        """The signature of a module's forward."""
        parameters = inspect.signature(type(model).forward).parameters.values()
        names = frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        return cls(names, any(p.kind is p.VAR_KEYWORD for p in parameters))

    @property
    def cache_name(self) -> str | None:
        """The argument that carries a transformers cache, or None."""
        return next((name for name in CACHE_NAMES if name in self.names), None)

    @property
    def is_recurrent(self) -> bool:
        """Whether the model remembers a state instead of tokens: its mask then covers the tokens at hand alone."""
        return self.cache_name == "cache_params"

    def accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments that have a value and that the forward declares, or reads from its keyword arguments."""
        return {
            name: value
            for name, value in arguments.items()
            if value is not None and (name in self.names or (self.open and name in _PACKING))
        }


def returned_cache(outputs: Any) -> Any:
    """What a model returned to remember its tokens by, whatever it calls it; None if nothing."""
    return next((outputs[name] for name in CACHE_NAMES if name in outputs), None)


def least_squares_map(source: Tensor, target: Tensor) -> Tensor:
    """M `[d, S]` that minimises |source @ M - target| for two embedding tables `[V, d]` and `[V, S]` of one vocabulary."""
    rows = min(source.shape[0], target.shape[0])
    solution = torch.linalg.lstsq(source[:rows].double(), target[:rows].double()).solution
    return solution.to(target.dtype)
