"""A projected model as a stock one: projection and large head are one matrix.

    lm_head(P h) = (W P) h        W [V, d] the large head, P [d, S] the projection, h [S] a state of the backbone

The stock causal LM of the backbone's architecture gets W P as its own head, tied to the embedding table where both are
equal. What its class multiplies, adds or caps beside that is measured (see `export.head`) and divided out, switched off or
used; where it cannot, folding is refused.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from shadow_peft.backbone.placement import place
from shadow_peft.backbone.projected_lm import AutoModelForCausalLMWithHiddenProjection
from shadow_peft.base.decoder import find_decoder
from shadow_peft.base.task_head import path_of
from shadow_peft.export.head import CannotFold, HeadForm, measure_head, softcap_name

_CHUNK = 8192
"""Rows of a head that are multiplied at a time, in float64."""

_TOKENS = 8
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_OF_HALF_PRECISION = 5e-2

_LONGEST = 200
"""Characters of an error of torch that are shown."""


@torch.no_grad()
def fold(projected: AutoModelForCausalLMWithHiddenProjection) -> PreTrainedModel:
    """The stock causal LM that computes what a projected model computes, on its device, in its dtype, in eval mode.

    Raises:
        CannotFold: the architecture has no causal LM, or one whose logits have another form.
    """
    weight = _product(projected.lm_head.weight, projected.shadow_hidden_projection.weight)
    folded = stock_causal_lm(
        projected.shadow_model, weight, projected.lm_head.bias, projected.config.final_logit_softcapping
    )
    folded.generation_config = copy.deepcopy(projected.generation_config)
    return folded


@torch.no_grad()
def stock_causal_lm(backbone: PreTrainedModel, weight: Tensor, bias: Tensor | None, cap: float | None) -> PreTrainedModel:
    """The stock causal LM around a copy of a backbone, with logits = cap(weight @ h + bias).

    Args:
        backbone: with embeddings of its own; rows of its table that the head has none for are left out.
        weight: `[V, S]`.
        bias: `[V]`, or None.
        cap: c of logits = c * tanh(logits / c), or None.

    Raises:
        CannotFold: no class of transformers computes this.
    """
    stock = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(backbone.config), None)
    if stock is None:
        raise CannotFold(f"transformers has no causal language model of the architecture {backbone.config.model_type!r}")
    weight, bias = weight.to(backbone.device), None if bias is None else bias.to(backbone.device)
    exported = _with_weights(stock, backbone, rows=weight.shape[0], cap=cap)
    form = measure_head(exported, find_decoder(exported, min_layers=1))
    if form.cap != cap:
        raise CannotFold(f"{stock.__name__} caps its logits at {form.cap}, which are to be capped at {cap}")
    _set_head(exported, weight / form.scale, bias, form)
    place(exported, backbone.dtype, backbone.device).eval()
    _tie_if_equal(exported)
    _require_logits(exported, backbone, weight, bias, cap)
    return exported


def _product(head: Tensor, projection: Tensor) -> Tensor:
    """head @ projection `[V, S]` like the projection, computed in float64 in chunks of the vocabulary."""
    device = torch.device("cpu") if head.device.type == "mps" else head.device
    small = projection.to(device, torch.float64)
    return torch.cat([(part.to(device, torch.float64) @ small).to(projection) for part in head.split(_CHUNK)])


def _with_weights(stock: Any, backbone: PreTrainedModel, rows: int, cap: float | None) -> PreTrainedModel:
    """A model of a stock class with the backbone's weights, a vocabulary of `rows` tokens, and a head that is random."""
    config, name = copy.deepcopy(backbone.config), softcap_name(backbone.config)
    config.tie_word_embeddings = False
    if name is None and cap is not None:
        raise CannotFold(f"the logits are capped at {cap}, and {stock.__name__} caps none")
    try:
        if name is not None:
            setattr(config, name, cap)
    except StrictDataclassError as error:
        raise CannotFold(f"{stock.__name__} always caps its logits, and they are not to be capped") from error
    try:
        config.vocab_size = rows
        exported: PreTrainedModel = stock(config)
        state = _cut_to(exported.get_input_embeddings().weight.shape[0], backbone)
        find_decoder(exported, min_layers=1).backbone.load_state_dict(state)
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:_LONGEST]
        raise CannotFold(f"{stock.__name__} cannot be built around this shadow: {reason}") from error
    return exported


def _cut_to(rows: int, backbone: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of a backbone with the first rows of its embedding table."""
    table = backbone.get_input_embeddings()
    return {**backbone.state_dict(), f"{path_of(backbone, table)}.weight": table.weight[:rows]}


def _set_head(exported: PreTrainedModel, weight: Tensor, bias: Tensor | None, form: HeadForm) -> None:
    head = exported.get_output_embeddings()
    if head.weight.shape != weight.shape:
        raise CannotFold(f"the head of {type(exported).__name__} is {tuple(head.weight.shape)}, not {tuple(weight.shape)}")
    has_bias = bias is not None and bool(bias.any())
    if has_bias and (head.bias is None or form.bias_scale == 0):
        raise CannotFold(f"the head has a bias, and that of {type(exported).__name__} has none")
    head.weight = nn.Parameter(weight.clone())
    if head.bias is not None:
        head.bias.copy_(torch.zeros_like(head.bias) if bias is None or not has_bias else bias / form.bias_scale)


def _tie_if_equal(exported: PreTrainedModel) -> None:
    """Hold one table instead of two equal ones, where the class can tie them."""
    table, head = exported.get_input_embeddings(), exported.get_output_embeddings()
    if not torch.equal(table.weight, head.weight):
        return
    exported.config.tie_word_embeddings = True
    exported.tie_weights()
    exported.config.tie_word_embeddings = head.weight is table.weight


def _require_logits(
    exported: PreTrainedModel, backbone: PreTrainedModel, weight: Tensor, bias: Tensor | None, cap: float | None
) -> None:
    """Compare with backbone and head one after the other on a few random tokens."""
    ids = torch.randint(weight.shape[0], (1, _TOKENS), generator=torch.Generator().manual_seed(0)).to(backbone.device)
    was_training = backbone.training
    state = backbone.eval()(input_ids=ids, use_cache=False, return_dict=True)[0]
    backbone.train(was_training)
    expected = nn.functional.linear(state.to(weight), weight, bias)
    expected = expected if cap is None else torch.tanh(expected / cap) * cap
    seen = exported(input_ids=ids, use_cache=False).logits
    tolerance = _TOLERANCES.get(backbone.dtype, _OF_HALF_PRECISION) * float(expected.abs().max())
    if seen.shape != expected.shape or not torch.allclose(seen.to(expected), expected, rtol=0, atol=tolerance):
        raise CannotFold(f"{type(exported).__name__} computes other logits with the shadow's weights")
