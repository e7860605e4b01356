"""A shadow to pretrain: layers cut out of the base, beside which they stay."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from shadow_peft.config import ShadowConfig
from shadow_peft.model import ShadowPeftModel, get_shadow_model

TRAINED = ("shadow_model", "shadow_hidden_projection")
"""The parts of an adapter that pretraining trains; what couples the shadow to the base has no part in it."""


def cut_shadow(base: PreTrainedModel, cut: ShadowConfig, seed: int = 0) -> ShadowPeftModel:
    """A base with a shadow cut from it, of which the shadow alone is trained.

    Embeddings and head are the base's own and stay frozen.

    Args:
        base: a causal language model.
        cut: which layers, how many neurons and heads; see `backbone.implicit`. Where `shadow_init` does not name a choice,
            the layers' weights are copied from the base.
        seed: of weights that are not copied.

    Raises:
        ValueError: the base has no head, or the sizes do not fit.
    """
    if base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no output embedding: it is no causal language model.")
    torch.manual_seed(seed)
    model = get_shadow_model(base, cut)
    model.recompute_backbone = False  # a shadow is small: memory is spent on logits
    for name, part in model.parts().items():
        if name not in TRAINED:
            part.requires_grad_(False)
    return model
