"""Where an adapter comes from: written into its config, and read back with one clear error where it is malformed."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.base import peft_adapters
from shadow_peft.base.task_head import input_embeddings
from shadow_peft.losses.label_tokens import MOST_STORED, LabelTokens
from shadow_peft.storage.versions import versions_of


def provenance(
    model: ShadowAdapter, training: Mapping[str, float] | None = None, files: Collection[str] = ()
) -> dict[str, Any]:
    """Where an adapter comes from: versions, base, base sizes, seed, targets, factors of the loss, and what was saved of it.

    Args:
        model: the adapted model.
        training: factors of the loss, where they are known.
        files: names of the files that hold its tensors; all must be there when it is loaded.
    """
    base = model.base_model
    return {
        "versions": {
            **versions_of(("shadow-peft", "torch", "transformers", "safetensors")),
            "python": platform.python_version(),
        },
        "base_model_name_or_path": base.name_or_path or None,
        "base_model_type": base.config.model_type,
        "base_model_class": type(base).__name__,
        "base_sizes": base_sizes(model),
        "base_adapters": peft_adapters.stored_configs(base),
        "seed": torch.initial_seed(),
        "label_tokens": " ".join(map(str, model.label_tokens.most_frequent(MOST_STORED))) or None,
        "training": None if training is None else dict(training),
        "shadow_model_config": None if model.has_implicit_shadow else _plain(model.shadow_model.config.to_dict()),
        "shadow_model_has_embeddings": input_embeddings(model.shadow_model) is not None,
        "files": sorted(files),
        "heads": sorted(model.task_heads),
        "class_names": list(base.config.id2label.values()) if "classifier_head" in model.task_heads else None,
    }


def base_sizes(model: ShadowAdapter) -> dict[str, int]:
    """The sizes of a base that an adapter depends on."""
    table = model.base_model.get_input_embeddings()
    sizes = {"hidden_size": model.decoder.hidden_size, "num_hidden_layers": len(model.decoder.layers)}
    return sizes if table is None else {**sizes, "vocab_size": int(table.weight.shape[0])}


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(data, default=str))
    return plain


# -------------------------------------------------------------------- reading


def stored_provenance(stored: Mapping[str, Any], known_files: Collection[str]) -> dict[str, Any]:
    """The provenance of a stored config; empty where there is none, as in files of 0.1.x.

    Args:
        stored: the content of the config file.
        known_files: names that `files` may list.

    Raises:
        ValueError: it is malformed.
    """
    origin = stored.get("provenance")
    if origin is None:
        return {}
    if not isinstance(origin, dict):
        raise ValueError(f"provenance must be a JSON object, it is a {type(origin).__name__}.")
    for name, (is_right, wanted) in _FIELDS.items():
        if origin.get(name) is not None and not is_right(origin[name]):
            raise ValueError(f"provenance: {name} must be {wanted}, got {_shown(origin[name])}.")
    unknown = set(origin.get("files") or ()) - set(known_files)
    if unknown:
        raise ValueError(f"provenance: files lists {_shown(sorted(unknown))}, which no save writes.")
    return {name: value for name, value in origin.items() if value is not None}


def stored_label_tokens(origin: Mapping[str, Any]) -> LabelTokens:
    """The targets of the trainings that made an adapter; none where its provenance does not tell."""
    return LabelTokens([int(token) for token in origin.get("label_tokens", "").split()])


def _dict_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_factor(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}( [0-9]{1,9})*", value) is not None


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_sizes": (_dict_of(_is_size), "an object of positive integers"),
    "base_adapters": (_dict_of(_is_dict), "an object of PEFT configs"),
    "label_tokens": (_is_token_ids, "token ids with a space between"),
    "training": (_dict_of(_is_factor), "an object of numbers, none of them negative"),
    "shadow_model_config": (_is_dict, "a model's config"),
    "shadow_model_has_embeddings": (lambda value: isinstance(value, bool), "true or false"),
    "shadow_config": (_is_dict, "an object of fields of ShadowConfig"),
    "files": (_is_names, "a list of file names"),
    "heads": (_is_names, "a list of heads"),
    "class_names": (_is_names, "a list of names"),
}
"""Field -> whether a value is right, and what it must be; the fields that loading does not use may hold anything."""


def _shown(value: Any) -> str:
    return _shown_text(repr(value), 80)


def _shown_text(text: str, length: int = 400) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


@contextmanager
def malformed(what: str | Path) -> Iterator[None]:
    """Inside the context, whatever fails on the content of a file is one error that names it.

    Raises:
        ValueError: with the name and the reason.
    """
    try:
        yield
    except Exception as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{what}: {_shown_text(reason)}") from error
