"""Loads models and tokenizers by name, for the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.backbone.explicit import prepare_shadow_model
from shadow_peft.backbone.projected_lm import AutoModelForCausalLMWithHiddenProjection
from shadow_peft.backbone.projection import carried_projection
from shadow_peft.cli.errors import UserError
from shadow_peft.tasks.causal_lm import ShadowForCausalLM


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model from a folder or the hub; `kwargs` are passed to `from_pretrained`.

    Raises:
        UserError: there is no such model, or it is no causal language model.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a causal language model from {name!r}: {error}") from error
    return model


def load_shadow(name: str, base: PreTrainedModel, tokens: int, share_embeddings: bool, **kwargs: Any) -> PreTrainedModel:
    """Load a model from a folder or the hub as the shadow of a base; with the base's head it starts as the model itself.

    Args:
        name: folder or hub id.
        base: the base; a shadow of another width gets a projection that fits the two heads by least squares.
        tokens: number of tokens of the base's tokenizer.
        share_embeddings: remove its embedding table, so that it is fed the base's embeddings.
        kwargs: passed to `from_pretrained`.

    Raises:
        UserError: there is no such model, it is no causal language model, or its vocabulary is smaller.
    """
    shadow = load_model(name, **kwargs)
    known = shadow.get_input_embeddings().weight.shape[0]
    if known < tokens:
        raise UserError(
            f"cannot use {name!r} as the shadow: its vocabulary has {known} tokens, the base's tokenizer has {tokens}"
        )
    if share_embeddings or carried_projection(shadow) is not None:
        return prepare_shadow_model(shadow, remove_embed_tokens=share_embeddings)
    own, head = shadow.get_output_embeddings(), base.get_output_embeddings()
    if own.weight.shape[1] == head.weight.shape[1]:
        return prepare_shadow_model(shadow)
    projection = nn.Linear(own.weight.shape[1], head.weight.shape[1], bias=False)
    return AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=shadow, shadow_hidden_projection=projection, lm_head=head, reference_lm_head=own
    )


def load_tokenizer(*places: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the first folder that has one, else that of the last place.

    Raises:
        UserError: none has one.
    """
    named = [place for place in places if place]
    for place in named[:-1]:
        if Path(place, "tokenizer_config.json").is_file():
            return _tokenizer(place)
    return _tokenizer(named[-1])


def load_adapted(base: PreTrainedModel, adapter: str) -> ShadowForCausalLM:
    """The base with a saved adapter attached, in eval mode.

    Raises:
        UserError: the adapter does not fit the base or is no adapter.
    """
    try:
        model: ShadowForCausalLM = ShadowForCausalLM.from_pretrained(base, adapter)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot attach the adapter {adapter!r}: {error}") from error
    return model


def _tokenizer(place: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a tokenizer from {place!r}: {error}") from error
    return tokenizer
