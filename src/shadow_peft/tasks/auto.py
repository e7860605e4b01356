"""Loads a task model from the path of an adapter alone: its provenance names the base.

One call loads base, adapter and heads:

    AutoShadowModelForCausalLM.from_pretrained("out")
    AutoShadowModelForSequenceClassification.from_pretrained("out")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from shadow_peft.checkpoint import reading
from shadow_peft.outputs import InferenceMode
from shadow_peft.tasks.base import ShadowTaskModel
from shadow_peft.tasks.causal_lm import ShadowForCausalLM
from shadow_peft.tasks.sequence_classification import ShadowForSequenceClassification


class _AutoShadowModel:
    """What both classes share; they have no instances."""

    task_class: ClassVar[type[ShadowTaskModel]]
    base_class: ClassVar[Any]

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(path).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_shadow_path: str | Path,
        *,
        base_model: str | Path | None = None,
        is_trainable: bool = False,
        inference_mode: InferenceMode = "base_shadow",
        shadow_model: PreTrainedModel | None = None,
        autocast_adapter_dtype: bool = True,
        **base_kwargs: Any,
    ) -> Any:
        """Load the base that an adapter was trained on, and attach the adapter with its heads.

        Args:
            pretrained_shadow_path: a directory, or on the hub `owner/name` or `owner/name/folder`; `@revision` may follow.
            base_model: folder or hub id of the base; None is the one that the adapter names.
            is_trainable: False freezes the adapter.
            inference_mode: "base_shadow" or "shadow_only".
            shadow_model: the explicit shadow of the adapter; adapters saved by this library rebuild theirs without it.
            autocast_adapter_dtype: keep the adapter in float32 whatever the base's dtype; False casts it to that dtype.
            **base_kwargs: arguments of the base's `from_pretrained`, such as `dtype`, `device_map`, `quantization_config`.

        Returns:
            A `ShadowForCausalLM`, or a `ShadowForSequenceClassification`.

        Raises:
            ValueError: there is no adapter, or it does not name its base.
            OSError: the base cannot be found.
        """
        stored = reading.read(pretrained_shadow_path)
        name = base_of(stored) if base_model is None else base_model
        base = cls.base_class.from_pretrained(name, **{**cls._base_settings(stored), **base_kwargs})
        return cls.task_class.from_pretrained(
            base,
            pretrained_shadow_path,
            is_trainable=is_trainable,
            inference_mode=inference_mode,
            shadow_model=shadow_model,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @classmethod
    def _base_settings(cls, stored: reading.Checkpoint) -> dict[str, Any]:
        """Arguments for loading the base so that the stored heads fit."""
        return {}


class AutoShadowModelForCausalLM(_AutoShadowModel):
    """Loads a `ShadowForCausalLM` from the path of an adapter alone."""

    task_class = ShadowForCausalLM
    base_class = AutoModelForCausalLM


class AutoShadowModelForSequenceClassification(_AutoShadowModel):
    """Loads a `ShadowForSequenceClassification` from the path of an adapter alone."""

    task_class = ShadowForSequenceClassification
    base_class = AutoModelForSequenceClassification

    @classmethod
    def _base_settings(cls, stored: reading.Checkpoint) -> dict[str, Any]:
        return classifier_settings(stored)


def classifier_settings(stored: reading.Checkpoint) -> dict[str, Any]:
    """The arguments of `from_pretrained` that give a base the classes of a stored adapter."""
    names = stored.provenance.get("class_names")
    if names:
        return class_settings(names)
    weight = stored.heads.get("classifier_head.weight")
    return {} if weight is None else {"num_labels": int(weight.shape[0])}


def class_settings(names: Sequence[str]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that name the classes of a classifier."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def base_of(stored: reading.Checkpoint) -> str:
    """Name or path of the base of a stored adapter.

    Raises:
        ValueError: the adapter does not name it.
    """
    name = stored.provenance.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ValueError(
            f"{stored.directory} does not say where its base is found. Load the base yourself and pass it: "
            "ShadowForCausalLM.from_pretrained(base, path)."
        )
    return name
