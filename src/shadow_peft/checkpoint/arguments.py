"""Arguments of `save_pretrained` that trainers pass out of habit: most mean nothing here, some ask for the impossible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WITHOUT_MEANING = frozenset({"save_function", "max_shard_size", "token", "save_original_format"})
"""Taken with any value: an adapter is one file, written here, in its own names; a token matters to `push_to_hub` alone."""

_POSSIBLE: dict[str, tuple[tuple[Any, ...], str]] = {
    "safe_serialization": ((True, None), "adapters are saved as safetensors only"),
    "push_to_hub": ((False, None), "call push_to_hub(repo_id) instead"),
    "variant": ((None,), "the files of an adapter have fixed names; its mathematics is ShadowConfig(variant=...)"),
    "distributed_checkpoint": ((False, None), "an adapter is one file; gather it and pass state_dict"),
    "save_peft_format": ((True, None), "the names of the tensors are those of the file format"),
    "save_embedding_layers": (("auto", False, None), "embeddings of the base are not part of an adapter"),
    "path_initial_model_for_weight_conversion": ((None,), "a shadow adapter cannot be converted to LoRA"),
}
"""Name -> values that change nothing, and why the others cannot be had."""


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse what `save_pretrained` does not know, and what it knows but cannot do.

    Args:
        given: arguments of transformers', peft's or accelerate's `save_pretrained`.

    Raises:
        TypeError: an unknown name.
        ValueError: a value that asks for the impossible.
    """
    unknown = sorted(given.keys() - _WITHOUT_MEANING - _POSSIBLE.keys())
    if unknown:
        raise TypeError(f"save_pretrained() got unexpected arguments: {', '.join(unknown)}.")
    for name, value in given.items():
        if name in _POSSIBLE:
            values, why = _POSSIBLE[name]
            if not any(type(value) is type(possible) and value == possible for possible in values):
                raise ValueError(f"save_pretrained({name}={value!r}) is not possible: {why}.")
