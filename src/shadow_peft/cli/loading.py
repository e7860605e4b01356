"""Models and tokenizers by name, for the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import shadow_peft  # noqa: F401  (makes an exported shadow of another width loadable by AutoModelForCausalLM)
from shadow_peft.backbone import prepare_shadow_model
from shadow_peft.causal_lm import ShadowForCausalLM
from shadow_peft.cli.parsing import UserError


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """A causal language model of a folder or of the hub; `kwargs` go to `from_pretrained`.

    Raises:
        UserError: if there is no such model, or it is no causal language model.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a causal language model from {name!r}: {error}") from error
    return model


def load_shadow(name: str, share_embeddings: bool, **kwargs: Any) -> PreTrainedModel:
    """The backbone of a model of a folder or of the hub; with `share_embeddings` without its embedding table.

    Raises:
        UserError: if there is no such model, or it is no causal language model.
    """
    return prepare_shadow_model(load_model(name, **kwargs), remove_embed_tokens=share_embeddings)


def load_tokenizer(*places: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of the first place that has one: a folder with its files, or the last place whatever it is.

    Raises:
        UserError: if none has one.
    """
    named = [place for place in places if place]
    for place in named[:-1]:
        if Path(place, "tokenizer_config.json").is_file():
            return _tokenizer(place)
    return _tokenizer(named[-1])


def load_adapted(base: PreTrainedModel, adapter: str) -> ShadowForCausalLM:
    """The base with a saved adapter attached, ready to answer.

    Raises:
        UserError: if the adapter does not fit the base or is no adapter.
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
