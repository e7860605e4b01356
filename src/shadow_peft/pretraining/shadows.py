"""A shadow to pretrain, beside the base that it is for: layers of the base, or a small model.

Embeddings and heads stay frozen. A shadow of another width than the base reaches the head through a projection: that of an
implicit shadow comes from the directions of the residual stream (`backbone.narrowing`), that of a small model is fitted by
least squares, so that it starts as the small model itself, as far as that can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadow_peft.backbone.explicit import prepare_shadow_model
from shadow_peft.backbone.narrowing import init_narrow, main_directions
from shadow_peft.backbone.projection import (
    Reconstruction,
    carried_projection,
    carry_projection,
    fit_projection,
    reconstruction,
)
from shadow_peft.backbone.shared_embedding import SharedEmbedding
from shadow_peft.base.decoder import find_decoder
from shadow_peft.base.task_head import TaskHead, input_embeddings
from shadow_peft.config import ShadowConfig
from shadow_peft.model import ShadowPeftModel, get_shadow_model

TRAINED = ("shadow_model", "shadow_hidden_projection")
"""The parts of an adapter that pretraining trains; what couples the shadow to the base has no part in it."""

ALONE: dict[str, Any] = {"injection_hidden_size": 1, "gate_hidden_size": 2}
"""The least sizes of what couples a shadow to its base."""


@dataclass(frozen=True)
class SmallShadow:
    """A base with a small model as its shadow.

    Attributes:
        model: the base with the shadow.
        own_head: the small model's own head, from its states; None where it came without one, under a projection.
        fit: how well the base's head and the fitted projection reproduce its own head; None where nothing was fitted.
    """

    model: ShadowPeftModel
    own_head: TaskHead | None
    fit: Reconstruction | None


def implicit_shadow(
    base: PreTrainedModel, config: ShadowConfig, seed: int = 0, text: Iterable[Tensor] = ()
) -> ShadowPeftModel:
    """A base with a shadow made of its own layers, of which the shadow alone is trained.

    Args:
        base: a causal language model.
        config: which layers, how many neurons and heads, how wide; see `backbone.implicit`. Where `shadow_init` is "base",
            the layers' weights are the base's, those of a narrower shadow projected.
        seed: of weights that are not copied.
        text: tokens `[B, T]`, on which the directions of a narrower shadow are found.

    Raises:
        ValueError: the base has no head, the sizes do not fit, or there is no text where it is needed.
    """
    _require_head(base)
    torch.manual_seed(seed)
    narrow = config.shadow_hidden_size not in (None, find_decoder(base).hidden_size)
    projected = narrow and config.shadow_init == "base"
    model = ShadowPeftModel(base, config, init_from_base=not projected)
    if projected:
        assert config.shadow_hidden_size is not None
        assert isinstance(model.shadow_hidden_projection, nn.Linear)
        basis = main_directions(_states(base, text), config.shadow_hidden_size)
        init_narrow(model.shadow_model, model.shadow_hidden_projection, model.decoder, config, basis.cpu())
        model.shadow_model.get_input_embeddings().requires_grad_(False)
    return _alone(model)


def small_shadow(
    base: PreTrainedModel, small: PreTrainedModel, tokens: int | None = None, share_embeddings: bool = False
) -> SmallShadow:
    """A base with a small model as its shadow, of which the shadow alone is trained.

    A projection that the small model carries is kept. One is fitted where there is none, but for a model whose head is the
    base's own.

    Args:
        base: a causal language model.
        small: a causal language model of the same vocabulary; the padding behind the tokens may differ.
        tokens: number of tokens of the tokenizer; None takes what both heads have.
        share_embeddings: feed it the base's embeddings, as a shadow that was saved without its own has to be. What stands in
            its own table and head is not used.

    Raises:
        ValueError: the base has no head, the vocabularies differ, or a table is shared between models of two widths.
    """
    _require_head(base)
    fit = own_head = None
    if not share_embeddings and carried_projection(small) is None:
        decoder = find_decoder(small, min_layers=1)
        own_head = TaskHead(small, decoder.head_input_path, width=decoder.hidden_size)
        fit = _fit(base, small, tokens)
    backbone = prepare_shadow_model(small, remove_embed_tokens=share_embeddings)
    model = get_shadow_model(base, ShadowConfig(**ALONE), shadow_model=backbone)
    return SmallShadow(_alone(model), own_head, fit)


def shares_embeddings(model: ShadowPeftModel) -> bool:
    """Whether the shadow reads the base's table of embeddings, and not one of its own."""
    own = input_embeddings(model.shadow_model)
    return own is None or isinstance(own, SharedEmbedding)


def _fit(base: PreTrainedModel, small: PreTrainedModel, tokens: int | None) -> Reconstruction | None:
    """Fit a projection that the small model then carries; None where its head is the base's."""
    large_head, own = (model.get_output_embeddings().weight for model in (base, small))
    rows = min(large_head.shape[0], own.shape[0], tokens or own.shape[0])
    if large_head.shape[1] == own.shape[1] and torch.equal(large_head[:rows], own[:rows].to(large_head)):
        return None
    weight = fit_projection(large_head, own, tokens).to(small.dtype)
    projection = nn.Linear(own.shape[1], large_head.shape[1], bias=False, dtype=small.dtype)
    projection.weight = nn.Parameter(weight.to(own.device))
    carry_projection(small, projection)
    return reconstruction(large_head, own, weight, tokens)


def _alone(model: ShadowPeftModel) -> ShadowPeftModel:
    """The model with nothing but its shadow trained."""
    model.recompute_backbone = False  # a shadow is small: memory is spent on logits
    for name, part in model.parts().items():
        if name not in TRAINED:
            part.requires_grad_(False)
    return model


@torch.no_grad()
def _states(base: PreTrainedModel, text: Iterable[Tensor]) -> Iterator[Tensor]:
    """The base's residual stream `[B, T, d]` before each layer; the last state, which the norm has changed, is left out."""
    was_training = base.training
    base.eval()
    for input_ids in text:
        outputs = base(input_ids=input_ids.to(base.device), output_hidden_states=True, use_cache=False)
        yield from outputs.hidden_states[:-1]
    base.train(was_training)


def _require_head(base: PreTrainedModel) -> None:
    if base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no output embedding: it is no causal language model.")
