"""The detached shadow: the backbone with its own copies of embeddings and head, in a stock architecture where there is one.

    implicit shadow of the base's width                 the base's own task class with fewer layers
    explicit shadow of the base's width                 the causal LM class of its own architecture
    shadow of another width or another vocabulary       AutoModelForCausalLMWithHiddenProjection

The exported model computes exactly the attached model's `shadow_logits` and shares no tensor with it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.dequantize import dequantized_view, float_copy
from shadow_peft.backbone.implicit import materialized, own_tensors
from shadow_peft.backbone.projected_lm import (
    AutoModelForCausalLMWithHiddenProjection,
    AutoModelForCausalLMWithHiddenProjectionConfig,
)
from shadow_peft.backbone.shared_embedding import SharedEmbedding
from shadow_peft.base.architectures import architecture_of, read_size
from shadow_peft.base.decoder import classifier_name
from shadow_peft.base.task_head import TaskHead, input_embeddings, path_of
from shadow_peft.storage.sharded import is_sharded


@torch.no_grad()
def build_standalone_model(model: ShadowAdapter) -> PreTrainedModel:
    """The shadow of an adapted model as a self-contained model, in eval mode, in the backbone's dtype.

    Raises:
        ValueError: parameters are sharded over processes, or the shadow has no form of its own that would compute what it
            computes when attached.
    """
    if is_sharded(model):
        raise ValueError("The model is sharded over processes; save the adapter and export it from one process.")
    _require_loadable(model.shadow_model.config)
    same_width = isinstance(model.shadow_hidden_projection, nn.Identity)
    if model.has_implicit_shadow and same_width and _is_text_model(model.base_model):
        exported = _stock(model, _task_class(model))
    else:
        exported = _explicit_causal_lm(model, same_width)
    exported.generation_config = copy.deepcopy(getattr(model.base_model, "generation_config", None))
    return exported.to(model.shadow_model.device, model.shadow_model.dtype).eval()


def _require_loadable(config: PreTrainedConfig) -> None:
    fewest, reason = architecture_of(config).min_exported_layers
    if fewest == 1:
        return
    layers = read_size(config, "num_hidden_layers")
    if layers < fewest:
        raise ValueError(
            f"A {config.model_type!r} shadow of {layers} layer could be saved but not loaded: {reason}. Train one with "
            f"num_shadow_layers={fewest} to export it."
        )


def _is_text_model(base: PreTrainedModel) -> bool:
    return base.config.get_text_config(decoder=True) is base.config


def _task_class(model: ShadowAdapter) -> type[PreTrainedModel]:
    """The class of the base; for a classifier on a base without a classification head, the classifier of its type."""
    base = model.base_model
    if "shadow_classifier_head" in model.task_heads and classifier_name(base) is None:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(base.config)]
    return type(base)


def _stock(model: ShadowAdapter, task_class: type[PreTrainedModel]) -> PreTrainedModel:
    config = copy.deepcopy(model.shadow_model.config)
    if "shadow_lm_head" in model.task_heads:
        config.tie_word_embeddings = False
    exported = task_class(config)
    heads = _trained_heads(model, exported)
    for path, module in exported.named_modules():
        if path in heads:
            source = heads[path]
        elif module is exported.get_input_embeddings():
            source = model.base_model.get_input_embeddings()
        else:
            source = _source(model, path)
        _copy_tensors(module, source)
    return exported


def _source(model: ShadowAdapter, path: str) -> nn.Module:
    """The module of the backbone, or of the base where the backbone has none there, that an exported one is copied from."""
    outside = "" if model.decoder.path == "" else f"{model.decoder.path}."
    known = dict(model.shadow_model.named_modules())
    if path.startswith(outside) and path[len(outside) :] in known:
        return known[path[len(outside) :]]
    return model.base_model.get_submodule(path)


def _trained_heads(model: ShadowAdapter, exported: PreTrainedModel) -> dict[str, nn.Module]:
    """Path of a head in the exported model -> the shadow's own trained head."""
    heads = {}
    if "shadow_lm_head" in model.task_heads:
        heads[path_of(exported, exported.get_output_embeddings())] = model.task_heads["shadow_lm_head"]
    name = classifier_name(exported)
    if "shadow_classifier_head" in model.task_heads and name is not None:
        heads[name] = model.task_heads["shadow_classifier_head"]
    return heads


def _copy_tensors(module: nn.Module, source: nn.Module) -> None:
    source = source.materialize() if isinstance(source, SharedEmbedding) else source
    with materialized(source):
        values = own_tensors(dequantized_view(source))
        for name, target in own_tensors(module).items():
            target.copy_(values[name])


def _explicit_causal_lm(model: ShadowAdapter, same_width: bool) -> PreTrainedModel:
    """A causal LM around an explicit backbone, or one of another width than the base.

    Raises:
        ValueError: the base is no causal LM, or its head does more than the exported form can hold.
    """
    base, backbone = model.base_model, copy.deepcopy(model.shadow_model)
    if base.get_output_embeddings() is None:
        raise ValueError(f"This shadow can be exported from a causal LM only, not from {type(base).__name__}.")
    for path, module in list(backbone.named_modules()):
        if isinstance(module, SharedEmbedding):
            backbone.set_submodule(path, module.materialize())
    if input_embeddings(backbone) is None:
        _restore_embeddings(backbone, model)
    head: Any = model.task_heads["shadow_lm_head"] if "shadow_lm_head" in model.task_heads else base.get_output_embeddings()
    with materialized(head):
        weight, scale = float_copy(head).get_parameter("weight").detach(), _head_scale(model)
    stock = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(backbone.config), None)
    vocab_size = backbone.get_input_embeddings().weight.shape[0]
    if same_width and stock is not None and vocab_size == weight.shape[0] and softcap_of(base) is None:
        return _around(backbone, stock, weight * scale)
    config = AutoModelForCausalLMWithHiddenProjectionConfig.around(backbone, weight.shape[1], weight.shape[0])
    config.final_logit_softcapping = softcap_of(base)
    exported = AutoModelForCausalLMWithHiddenProjection(config, backbone)
    projection: Any = model.shadow_hidden_projection
    exported.shadow_hidden_projection.weight.copy_(torch.eye(weight.shape[1]) if same_width else projection.weight)
    exported.lm_head.weight = nn.Parameter(weight * scale, requires_grad=False)
    exported.config.architectures = [type(exported).__name__]
    return exported


def _restore_embeddings(backbone: PreTrainedModel, model: ShadowAdapter) -> None:
    """Give a backbone that was fed by the base a copy of the base's embedding table."""
    table = model.base_model.get_input_embeddings()
    with materialized(table):
        backbone.set_input_embeddings(copy.deepcopy(table).requires_grad_(True))
    backbone.config.get_text_config(decoder=True).vocab_size = table.weight.shape[0]


def _around(backbone: PreTrainedModel, stock: type[PreTrainedModel], head: Tensor) -> PreTrainedModel:
    """A causal LM of the backbone's own architecture with another head."""
    config = copy.deepcopy(backbone.config)
    config.tie_word_embeddings = False
    exported = stock(config)
    exported.base_model.load_state_dict(backbone.state_dict())
    exported.get_output_embeddings().weight = nn.Parameter(head)
    return exported


def softcap_of(base: PreTrainedModel) -> float | None:
    """c of logits = c * tanh(logits / c), where the base caps its logits."""
    cap: float | None = getattr(base.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    return cap


def _head_scale(model: ShadowAdapter) -> float:
    """The constant by which the base's class multiplies what its output embedding returns.

    Raises:
        ValueError: its head is no scaled, possibly capped, linear map.
    """
    head, cap = model.base_model.get_output_embeddings(), softcap_of(model.base_model)
    kind, width = head.weight.dtype, model.decoder.hidden_size
    dtype = kind if kind.is_floating_point else model.base_model.dtype  # integers: a quantized head
    x = torch.randn(1, 8, width, dtype=dtype, device=head.weight.device)
    task_head = TaskHead(model.base_model, model.decoder.head_input_path, width=model.decoder.hidden_size)
    plain, full = head(x).double(), task_head(x).double()
    if cap is not None:
        full = torch.atanh(full / cap) * cap
    scale = float((plain * full).sum() / plain.square().sum())
    if not torch.allclose(plain * scale, full, rtol=1e-2, atol=1e-2 * float(full.abs().max())):
        raise ValueError(
            f"{type(model.base_model).__name__} computes its logits by more than one linear map, which the exported form of "
            "this shadow cannot hold."
        )
    return 1.0 if abs(scale - 1.0) < 1e-3 else scale
