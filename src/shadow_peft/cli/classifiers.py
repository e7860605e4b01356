"""Loads classifiers by name, for the verbs."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from shadow_peft.checkpoint import reading
from shadow_peft.cli.errors import UserError, one_line
from shadow_peft.cli.loading import check_place, load_base, named_base
from shadow_peft.cli.options import QuantizationOptions
from shadow_peft.tasks.auto import classifier_settings
from shadow_peft.tasks.sequence_classification import ShadowForSequenceClassification


def adapts_classifier(adapter: str) -> bool:
    """Whether an adapter was trained on classes.

    Raises:
        UserError: it is no shadow adapter.
    """
    return any("classifier" in name for name in _stored(adapter).head_names)


def is_classifier(model: str) -> bool:
    """Whether a folder or hub id is a model that tells classes apart; of what cannot be read, False."""
    try:
        check_place(model)
        names = AutoConfig.from_pretrained(model).architectures or []
    except Exception:  # loading it says what is wrong
        return False
    return any(name.endswith("ForSequenceClassification") for name in names)


def load_classifier(model: str, quantization: QuantizationOptions | None = None, **kwargs: Any) -> PreTrainedModel:
    """A classifier, in eval mode.

    Args:
        model: folder or hub id.
        quantization: options that `check_quantization` has let pass; None quantizes nothing.
        kwargs: go to `from_pretrained`.

    Raises:
        UserError: it cannot be loaded.
    """
    return load_base(model, quantization or QuantizationOptions(), AutoModelForSequenceClassification, **kwargs).eval()


def load_adapted_classifier(
    adapter: str, model: str | None = None, quantization: QuantizationOptions | None = None, **kwargs: Any
) -> ShadowForSequenceClassification:
    """A base with the adapter of a classifier attached, in eval mode.

    Args:
        adapter: folder or hub id.
        model: folder or hub id of the base; None means the one that the adapter names.
        quantization: options that `check_quantization` has let pass; None quantizes nothing.
        kwargs: go to `from_pretrained` of the base.

    Raises:
        UserError: one of them cannot be loaded, or they do not fit.
    """
    name = named_base(adapter) if model is None else model
    settings = classifier_settings(_stored(adapter)) | kwargs
    base = load_base(name, quantization or QuantizationOptions(), AutoModelForSequenceClassification, **settings)
    try:
        return ShadowForSequenceClassification.from_pretrained(base, adapter).eval()
    except Exception as error:  # of a damaged folder it may be of any type
        raise UserError(f"cannot attach the adapter {adapter!r} to {name!r}: {one_line(error)}") from error


def _stored(adapter: str) -> reading.Checkpoint:
    try:
        return reading.read(adapter)
    except (OSError, ValueError) as error:
        raise UserError(f"{adapter!r} is no shadow adapter: {one_line(error)}") from error
