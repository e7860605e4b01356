"""An adapter of this library for the Shadow tuner of `peft`, and one of peft's for this library, if both compute the same.

variant "peft"                    the same mathematics; what differs is how a shadow is rebuilt
variants "published", "readout"   other mathematics: no setting of peft's tuner computes them

peft rebuilds a shadow from the base's config with another depth, width, MLP width or number of heads (a mirror). Any other
shadow is written beside the adapter as a model of its own, in SHADOW_FOLDER, and the adapter names its place.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from shadow_peft.backbone.explicit import prepare_shadow_model
from shadow_peft.backbone.projected_lm import AutoModelForCausalLMWithHiddenProjectionConfig
from shadow_peft.backbone.truncated_config import truncated_config
from shadow_peft.checkpoint import peft, reading
from shadow_peft.config import ShadowConfig
from shadow_peft.model import ShadowPeftModel
from shadow_peft.storage.files import read_json, write_json

SHADOW_FOLDER = "shadow_model"

_OTHER_MATHEMATICS = {
    "published": "it leaves the first layer untouched and updates the state behind a LayerNorm with SiLU and no biases; "
    "peft's tuner adapts every layer with GELU and biases and no norm",
    "readout": "it takes the injected correction back behind each layer and reads the state out at the end; peft's tuner "
    "does neither",
}

_NOT_OF_THE_SHAPE = ("architectures", "dtype", "transformers_version", "_name_or_path", "use_cache", "tie_word_embeddings")


def to_peft(base: PreTrainedModel, adapter: str | Path, folder: Path) -> ShadowPeftModel:
    """Write an adapter of this library as one that `peft.PeftModel.from_pretrained` loads and that computes the same.

    Args:
        base: its base.
        adapter: folder or hub repository.
        folder: new or empty.

    Returns:
        The adapted base.

    Raises:
        ValueError: no adapter of peft's computes the same, saying why; or the adapter does not fit the base.
    """
    stored = reading.read(adapter)
    reason = _OTHER_MATHEMATICS.get(stored.config.variant)
    if reason is not None:
        raise ValueError(f"The variant {stored.config.variant!r} has no equal in peft: {reason}.")
    if stored.heads:
        raise ValueError(
            f"{adapter} holds trained heads ({', '.join(stored.head_names)}), each for one network; peft has one for both."
        )
    if stored.base_adapters:
        raise ValueError(f"{adapter} holds adapters of the base beside the shadow; peft's tuner carries none.")
    model = load(base, stored)
    rebuilt = _is_mirror(model)
    if not rebuilt:
        model.export_shadow().save_pretrained(folder / SHADOW_FOLDER)
    model.save_pretrained(folder, training=stored.training, overwrite=True)
    if not rebuilt:
        _name_shadow(folder)
    return model


def to_native(base: PreTrainedModel, adapter: str | Path, folder: Path) -> ShadowPeftModel:
    """Write an adapter of peft's as this library does: with its base's sizes, and the architecture of a shadow of its own.

    The files keep their names, since they hold the same mathematics; what they say beside is what this library needs to load
    them without the shadow's place. Arguments, result and errors are those of `to_peft`.
    """
    stored = reading.read(adapter)
    if stored.dialect != "peft" or stored.provenance:
        writer = "this library already" if stored.provenance else "shadow-peft 0.1.x, whose files are read as they are"
        raise ValueError(f"{adapter} was written by {writer}.")
    model = load(base, stored)
    model.save_pretrained(folder, training=stored.training)
    return model


def load(base: PreTrainedModel, stored: reading.Checkpoint) -> ShadowPeftModel:
    """Attach a stored adapter to its base, with the shadow that an adapter of peft's names by its place.

    Raises:
        ValueError: the shadow is not there, or the adapter does not fit the base.
    """
    shadow = None if stored.shadow_place is None else _shadow_at(stored.shadow_place)
    model: ShadowPeftModel = ShadowPeftModel.from_checkpoint(base, stored, shadow_model=shadow)
    return model


def _shadow_at(place: str) -> PreTrainedModel:
    """The backbone that peft takes from a model; a projected one brings its projection along."""
    try:
        projected = isinstance(AutoConfig.from_pretrained(place), AutoModelForCausalLMWithHiddenProjectionConfig)
        return prepare_shadow_model((AutoModelForCausalLM if projected else AutoModel).from_pretrained(place))
    except OSError as error:
        raise ValueError(f"The adapter's shadow cannot be loaded from {place!r}: {error}") from error


def _is_mirror(model: ShadowPeftModel) -> bool:
    """Whether peft rebuilds the shadow from the base's config and the sizes that it has names for."""
    config = model.shadow_config
    sizes = ("shadow_hidden_size", "shadow_intermediate_size", "shadow_num_attention_heads")
    known = ShadowConfig(num_shadow_layers=config.num_shadow_layers)
    known = replace(known, **{name: getattr(config, name) for name in sizes})
    if known.num_shadow_layers > len(model.decoder.layers) or type(model.shadow_model) is not type(model.decoder.backbone):
        return False
    return _shape(truncated_config(model.decoder, known)) == _shape(model.shadow_model.config)


def _shape(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_SHAPE}


def _name_shadow(folder: Path) -> None:
    """Let an adapter say where its shadow is; peft takes no sizes beside."""
    path = folder / peft.CONFIG_FILE
    sizes = ("shadow_num_hidden_layers", "shadow_hidden_size", "shadow_num_attention_heads", "shadow_intermediate_size")
    place = str((folder / SHADOW_FOLDER).resolve())
    write_json({**read_json(path), **dict.fromkeys(sizes), "shadow_model": place, "share_embeddings": False}, path)
