"""Where a base keeps its decoder layers.

A generic rule finds them in almost every architecture: the one list of modules, inside a model of the decoder's own type,
whose length is the number of decoder layers that the config declares. `architectures` says where it does not hold.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shadow_peft.base.architectures import CLASSIFIERS, ResidualStream, architecture_of, read_size

MIN_LAYERS = 2


@dataclass(frozen=True)
class Decoder:
    """A base's decoder.

    Attributes:
        backbone: the model without its task head that runs the layers.
        path: where the backbone is in the base; empty when the base is the backbone.
        head_input_path: where the model is whose output the base's task class gives to its head.
        layers_path: where the layers are in the backbone.
        layers: the decoder layers, in order.
        config: the config of the decoder.
    """

    backbone: PreTrainedModel
    path: str
    head_input_path: str
    layers_path: str
    layers: tuple[nn.Module, ...]
    config: PreTrainedConfig

    @property
    def output_module(self) -> nn.Module:
        """The model whose output is the final hidden state, whether the base runs with its task head or without."""
        inner = architecture_of(self.config).head_input_path or ""
        return self.backbone.get_submodule(inner[len(self.path) + 1 :]) if inner else self.backbone

    @property
    def layer_input_name(self) -> str:
        """Keyword of the hidden state in a call of a decoder layer."""
        return architecture_of(self.config).layer_input_name

    @property
    def residual_stream(self) -> ResidualStream:
        """Layout of the residual stream between layers."""
        return architecture_of(self.config).residual_stream

    @property
    def first_position(self) -> int:
        """Position of a sequence's first token."""
        return self.config.pad_token_id + 1 if architecture_of(self.config).counts_from_padding else 0

    @property
    def hidden_size(self) -> int:
        """Width d of the hidden states between layers."""
        return read_size(self.config, "hidden_size")


def find_decoder(model: PreTrainedModel, min_layers: int = MIN_LAYERS) -> Decoder:
    """Find a model's decoder.

    Args:
        model: any transformers model with a decoder.
        min_layers: the fewest layers that will do; a base needs two, an explicit shadow one.

    Returns:
        The decoder and its place in the model.

    Raises:
        ValueError: its type is unsupported, its layers cannot be told, or there are fewer than `min_layers`.
    """
    config = model.config.get_text_config(decoder=True)
    reason = architecture_of(config).unsupported or architecture_of(model.config).unsupported
    if reason is not None:
        raise ValueError(f"ShadowPEFT does not support {config.model_type!r} ({type(model).__name__}): {reason}")
    _require_decoder(model, config)
    path, layers = _find_layers(model, config)
    if len(layers) < min_layers:
        raise ValueError(
            f"ShadowPEFT needs a base of at least {min_layers} decoder layers, {type(model).__name__} has {len(layers)}."
        )
    backbone_path, outermost = _model_paths(model, path)
    head_input_path = architecture_of(config).head_input_path or outermost
    backbone = model.get_submodule(backbone_path)
    assert isinstance(backbone, PreTrainedModel)
    inner = path[len(backbone_path) + 1 :] if backbone_path else path
    return Decoder(backbone, backbone_path, head_input_path, inner, tuple(layers), config)


def _require_decoder(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Refuse encoders; a type that transformers does not know is left to the rules for layers.

    Raises:
        ValueError: the model is no decoder.
    """
    if config.model_type in CONFIG_MAPPING and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        family = config.model_type.removesuffix("_model").removesuffix("_text")  # the text part of a multimodal type
        known = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if not known and model.config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(f"{type(model).__name__} ({config.model_type!r}) is no decoder-only language model.")
    if getattr(config, "is_decoder", True) is False:
        raise ValueError(
            f"{type(model).__name__} is built as an encoder; load it with is_decoder=True in its config to adapt it."
        )


def classifier_name(model: PreTrainedModel) -> str | None:
    """Where a model keeps its linear classification head, or None."""
    return next((name for name in CLASSIFIERS if isinstance(model._modules.get(name), nn.Linear)), None)


def _find_layers(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[str, nn.ModuleList]:
    declared = architecture_of(config).layers_path
    count = read_size(config, "num_hidden_layers")
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _may_be_layers(path, module, count, declared)
    ]
    own = [(p, m) for p, m in found if _owners(model, p)[-1][1].config.model_type == config.model_type]
    outermost = [(p, m) for p, m in own if not any(p.startswith(f"{q}.") for q, _ in own)]
    if len(outermost) != 1:
        where = ", ".join(path for path, _ in outermost) or "none"
        raise ValueError(
            f"Cannot tell which modules are the {count} decoder layers of {type(model).__name__} "
            f"(model_type {config.model_type!r}); candidates: {where}. Declare its layers_path in "
            "shadow_peft.base.architectures.ARCHITECTURES."
        )
    return outermost[0]


def _may_be_layers(path: str, module: nn.ModuleList, count: int, declared: str | None) -> bool:
    if declared is not None:
        return path == declared or path.endswith(f".{declared}")
    return len(module) == count


def _model_paths(model: PreTrainedModel, layers_path: str) -> tuple[str, str]:
    """Where the backbone is, and the outermost model inside that is no task model and takes embeddings.

    They are the same, but for a model with other modalities: there the backbone is the innermost model around the layers.
    """
    owners = _owners(model, layers_path)
    innermost = owners[-1][0]
    is_task_model = model.get_output_embeddings() is not None or model.base_model is not model
    inside = owners[1:] if is_task_model and len(owners) > 1 else owners
    outermost = next((path for path, owner in inside if _takes_embeddings(owner)), innermost)
    has_other_modalities = model.config.get_text_config(decoder=True) is not model.config
    return (innermost if has_other_modalities else outermost), outermost


def _takes_embeddings(model: PreTrainedModel) -> bool:
    return "inputs_embeds" in inspect.signature(type(model).forward).parameters


def _owners(model: PreTrainedModel, path: str) -> list[tuple[str, PreTrainedModel]]:
    """The models around a module, outermost first, with their paths."""
    parts = path.split(".")[:-1]
    prefixes = ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
    found = [(prefix, model.get_submodule(prefix)) for prefix in prefixes]
    return [(prefix, owner) for prefix, owner in found if isinstance(owner, PreTrainedModel)]
