"""The detached shadow: the backbone with copies of embeddings and head, in a stock architecture where one fits.

    implicit shadow of the base's width                 the base's own task class with fewer layers
    explicit shadow of the base's width                 the causal LM class of its own architecture
    classifier with any other shadow                    the classifier of the shadow's architecture
    shadow of another width or another vocabulary       AutoModelForCausalLMWithHiddenProjection, or folded:
                                                        the causal LM class of its architecture, see `export.folded`

The exported model computes exactly the attached model's `shadow_logits` and shares no tensor with it.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.dequantize import dequantized_view, float_copy
from shadow_peft.backbone.implicit import materialized, own_tensors
from shadow_peft.backbone.placement import place
from shadow_peft.backbone.projected_lm import (
    AutoModelForCausalLMWithHiddenProjection,
    AutoModelForCausalLMWithHiddenProjectionConfig,
)
from shadow_peft.backbone.shared_embedding import SharedEmbedding
from shadow_peft.base.architectures import architecture_of, read_size
from shadow_peft.base.decoder import classifier_name
from shadow_peft.base.task_head import TaskHead, input_embeddings, path_of
from shadow_peft.export.folded import fold, stock_causal_lm
from shadow_peft.export.head import CannotFold, measure_head
from shadow_peft.storage.sharded import is_sharded


@torch.no_grad()
def build_standalone_model(model: ShadowAdapter, folded: bool = False) -> PreTrainedModel:
    """The shadow of an adapted model as a self-contained model, in eval mode, in the backbone's dtype.

    Args:
        model: the adapted model.
        folded: a stock model in any case: the projection is multiplied into the head.

    Raises:
        CannotFold: no stock class computes what projection and head compute.
        ValueError: parameters are sharded over processes, or no exported form computes what the attached shadow computes.
    """
    if is_sharded(model):
        raise ValueError("The model is sharded over processes; save the adapter and export it from one process.")
    _require_loadable(model.shadow_model.config)
    same_width = isinstance(model.shadow_hidden_projection, nn.Identity)
    if model.has_implicit_shadow and same_width and _is_text_model(model.base_model):
        exported = _stock(model, _task_class(model))
    elif "shadow_classifier_head" in model.task_heads:
        exported = _explicit_classifier(model)
    else:
        exported = _explicit_causal_lm(model, same_width, folded)
    for module in (exported.get_input_embeddings(), exported.get_output_embeddings()):
        if module is not None:
            module.requires_grad_(False)
    exported.generation_config = copy.deepcopy(getattr(model.base_model, "generation_config", None))
    return place(exported, model.shadow_model.dtype, model.shadow_model.device).eval()


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
    same_class = type(exported) is type(model.base_model)
    backbone_path = model.decoder.path if same_class else exported.base_model_prefix
    for path, module in exported.named_modules():
        if path in heads:
            source = heads[path]
        elif module is exported.get_input_embeddings():
            source = model.base_model.get_input_embeddings()
        else:
            source = _source(model, path, backbone_path)
        _copy_tensors(module, source)
    return exported


def _source(model: ShadowAdapter, path: str, backbone_path: str) -> nn.Module:
    """The module to copy an exported module from: the backbone's, or the base's where the backbone has none."""
    known = dict(model.shadow_model.named_modules())
    if backbone_path == "" or path == backbone_path or path.startswith(f"{backbone_path}."):
        inside = path[len(backbone_path) :].removeprefix(".")
        if inside in known:
            return known[inside]
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


def _complete_backbone(model: ShadowAdapter) -> PreTrainedModel:
    """A copy of the backbone with embeddings of its own; all in its dtype, which is often wider than that of the base."""
    backbone = copy.deepcopy(model.shadow_model)
    for path, module in list(backbone.named_modules()):
        if isinstance(module, SharedEmbedding):
            backbone.set_submodule(path, module.materialize())
    if input_embeddings(backbone) is None:
        _restore_embeddings(backbone, model)
    return place(backbone, model.shadow_model.dtype)


def _explicit_classifier(model: ShadowAdapter) -> PreTrainedModel:
    """A classifier of the backbone's own architecture; the projection is multiplied into its head, `[C, d] @ [d, S]`.

    Raises:
        ValueError: transformers has no classifier of that architecture, or one whose head has no place for a bias.
    """
    backbone, head = _complete_backbone(model), model.task_heads["shadow_classifier_head"]
    stock = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(backbone.config), None)
    if stock is None:
        raise ValueError(f"transformers has no classifier of the architecture {backbone.config.model_type!r} to export to.")
    config, base_config = copy.deepcopy(backbone.config), model.base_model.config
    for name in ("id2label", "label2id", "problem_type", "pad_token_id"):
        setattr(config, name, copy.deepcopy(getattr(base_config, name)))
    exported = stock(config)
    exported.base_model.load_state_dict(backbone.state_dict())
    head_name = classifier_name(exported)
    weight, bias = head.get_parameter("weight").detach(), getattr(head, "bias", None)
    if not isinstance(model.shadow_hidden_projection, nn.Identity):
        weight = weight @ model.shadow_hidden_projection.get_parameter("weight").to(weight.dtype)
    own = None if head_name is None else exported.get_submodule(head_name)
    if not isinstance(own, nn.Linear) or own.weight.shape != weight.shape or (bias is not None and own.bias is None):
        raise ValueError(f"{stock.__name__} has no linear head that the shadow's classification head fits into.")
    own.weight.copy_(weight)
    if own.bias is not None:
        own.bias.copy_(torch.zeros_like(own.bias) if bias is None else bias)
    return exported


def _explicit_causal_lm(model: ShadowAdapter, same_width: bool, folded: bool) -> PreTrainedModel:
    """A causal LM around an explicit backbone, or around one of another width than the base.

    Raises:
        ValueError: the base is no causal LM, or the exported form cannot represent its head.
    """
    base = model.base_model
    if base.get_output_embeddings() is None:
        raise ValueError(f"This shadow can be exported from a causal LM only, not from {type(base).__name__}.")
    backbone = _complete_backbone(model)
    weight, bias, cap = _large_head(model)
    weight, bias = weight.to(backbone.dtype), None if bias is None else bias.to(backbone.dtype)
    fits = same_width and cap is None and backbone.get_input_embeddings().weight.shape[0] == weight.shape[0]
    if fits and not folded:
        with suppress(CannotFold):
            return stock_causal_lm(backbone, weight, bias, cap)
    if folded and same_width:
        return _with_ids_of(base, stock_causal_lm(backbone, weight, bias, cap))
    projected = _projected(backbone, weight, bias, cap, None if same_width else model.shadow_hidden_projection)
    return _with_ids_of(base, fold(projected)) if folded else projected


def _projected(
    backbone: PreTrainedModel, weight: Tensor, bias: Tensor | None, cap: float | None, projection: nn.Module | None
) -> PreTrainedModel:
    """The projected model around a backbone; no projection is the identity."""
    config = AutoModelForCausalLMWithHiddenProjectionConfig.around(backbone, weight.shape[1], weight.shape[0])
    config.final_logit_softcapping = cap
    config.lm_head_bias = bias is not None
    exported = AutoModelForCausalLMWithHiddenProjection(config, backbone)
    own: Any = exported.shadow_hidden_projection
    own.weight.copy_(torch.eye(weight.shape[1]) if projection is None else projection.get_parameter("weight"))
    exported.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        exported.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    exported.config.architectures = [type(exported).__name__]
    return exported


def _large_head(model: ShadowAdapter) -> tuple[Tensor, Tensor | None, float | None]:
    """Weight `[V, d]`, bias `[V]` and cap of the head that reads the shadow's state, with the factors of the base's class.

    Raises:
        CannotFold: the logits are not a scaled, possibly capped, linear function.
    """
    head: Any = model.task_heads["shadow_lm_head"] if "shadow_lm_head" in model.task_heads else None
    head = model.base_model.get_output_embeddings() if head is None else head
    form = measure_head(model.base_model, model.decoder)
    with materialized(head):
        plain: Any = float_copy(head)
        rows = _vocabulary(model, plain)
    weight, bias = plain.weight.detach()[:rows] * form.scale, plain.bias
    return weight, None if bias is None else bias.detach()[:rows] * form.bias_scale, form.cap


def _vocabulary(model: ShadowAdapter, head: nn.Linear) -> int:
    """Number of tokens that the base's class computes logits for; some classes leave out rows that pad the head."""
    task_head = TaskHead(model.base_model, model.decoder.head_input_path, head, width=model.decoder.hidden_size)
    return task_head(head.weight.new_zeros(1, 1, model.decoder.hidden_size)).shape[-1]


def _with_ids_of(base: PreTrainedModel, exported: PreTrainedModel) -> PreTrainedModel:
    """The exported model with the special tokens of the base, whose tokenizer it is used with."""
    config: Any = base.config.get_text_config(decoder=True)
    counts_from_padding = architecture_of(exported.config).counts_from_padding
    for name in ("bos_token_id", "eos_token_id", *(() if counts_from_padding else ("pad_token_id",))):
        setattr(exported.config, name, getattr(config, name, None))
    return exported


def _restore_embeddings(backbone: PreTrainedModel, model: ShadowAdapter) -> None:
    """Give a backbone that was fed by the base a table of its own class that looks up what the base's table does.

    The classes of some types multiply what they look up.

    Raises:
        ValueError: the backbone's class computes embeddings in another way.
    """
    table = model.base_model.get_input_embeddings()
    with materialized(table):
        rows, width = table.weight.shape
        states = table(torch.arange(rows, device=table.weight.device))
    backbone.config.get_text_config(decoder=True).vocab_size = rows
    own = type(backbone)(backbone.config).get_input_embeddings().to(states)
    own.weight.fill_(1.0)
    factor = own(torch.zeros(1, dtype=torch.long, device=states.device))
    if own.weight.shape != (rows, width) or not (factor == factor[0, 0]).all():
        raise ValueError(
            f"The embeddings of {type(backbone).__name__} cannot be a copy of the base's, so it is not exported."
        )
    own.weight.copy_(states / factor[0, 0])
    backbone.set_input_embeddings(own.requires_grad_(True))
