"""What `shadow-peft train --task classification` does otherwise: labelled texts, a classification head, accuracy."""

from __future__ import annotations

import shlex
import warnings
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from trl import ModelConfig, SFTConfig, get_peft_config

from shadow_peft.cli.errors import UserError, one_line
from shadow_peft.cli.loading import load_base
from shadow_peft.cli.options import TemplateOptions, TrainOptions
from shadow_peft.cli.refusals import declared_defaults, given
from shadow_peft.cli.running import WithCard, callbacks
from shadow_peft.cli.summary import example_prompt
from shadow_peft.config import ShadowConfig
from shadow_peft.model import get_shadow_model
from shadow_peft.tasks.auto import class_settings
from shadow_peft.tasks.sequence_classification import ShadowForSequenceClassification
from shadow_peft.training.labelled import LabelledTexts, load_labelled
from shadow_peft.training.trainer import ShadowTrainer

OF_TEXT = ("completion", "completion_if_missing", "chat")
OF_TEXT_TRAINING = ("packing", "padding_free", "completion_only_loss", "assistant_only_loss", "chat_template_path")
OF_TEXT_SHADOW = (
    "distillation_weight", "distillation_temperature", "distillation_warmup_ratio", "shadow_model", "share_embeddings",
)  # fmt: skip
"""Options that only learning of texts has."""


def check(options: TrainOptions, templates: TemplateOptions, sft: SFTConfig) -> None:
    """Refuse options of learning texts.

    Raises:
        UserError: one of them is given.
    """
    for names, values in ((OF_TEXT, templates), (OF_TEXT_TRAINING, sft), (OF_TEXT_SHADOW, options)):
        wrong = given(values, names, declared_defaults(type(values)))
        if wrong:
            raise UserError(f"--{wrong[0]} belongs to the learning of texts, and --task classification learns classes")


def load_data(
    options: TrainOptions, templates: TemplateOptions, sft: SFTConfig
) -> tuple[Dataset, Dataset | None, list[str]]:
    """The labelled texts for training and for evaluation, and the names of the classes.

    Raises:
        UserError: they cannot be loaded, or rows are bad.
    """
    template = None if templates.prompt is None else templates.prompt.replace("\\n", "\n")
    columns = LabelledTexts(template, sft.dataset_text_field, templates.class_column or "label")
    load = partial(load_labelled, columns=columns)
    try:
        train_set, names = load(
            options.data, name=options.data_name, split=options.data_split, classes=templates.class_names
        )
        if len(names) < 2:
            raise UserError(f"{options.data} has one class, {names[0]}; there is nothing to tell apart")
        if options.eval_fraction is not None:
            halves = train_set.train_test_split(options.eval_fraction, seed=sft.seed)
            return halves["train"], halves["test"], names
        if options.eval_data is None and options.eval_split is None:
            return train_set, None, names
        place, split = options.eval_data or options.data, options.eval_split or "train"
        name = options.data_name if options.eval_data is None else None
        return train_set, load(place, name=name, split=split, classes=names)[0], names
    except ValueError as error:
        raise UserError(str(error)) from error


def build(
    options: TrainOptions, shadow: ShadowConfig, peft: ModelConfig, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> PreTrainedModel:
    """The base with a classification head, and a fresh shadow or LoRA.

    Raises:
        UserError: the base cannot be loaded or adapted.
    """
    kwargs: dict[str, Any] = {"revision": peft.model_revision, "dtype": peft.dtype, **class_settings(names)}
    if peft.attn_implementation is not None:
        kwargs["attn_implementation"] = peft.attn_implementation
    base = load_base(options.model, peft, AutoModelForSequenceClassification, **kwargs)
    base.config.get_text_config().pad_token_id = base.config.pad_token_id = tokenizer.pad_token_id
    try:
        if peft.use_peft:
            peft.lora_task_type = "SEQ_CLS"
            with warnings.catch_warnings():  # peft reads an attribute by its old name
                warnings.simplefilter("ignore", FutureWarning)
                baseline: PreTrainedModel = get_peft_model(base, get_peft_config(peft))
            return baseline
        adapted = get_shadow_model(base, shadow)
        return ShadowForSequenceClassification(adapted, shadow_loss_weight=options.shadow_loss_weight)
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot adapt {options.model!r}: {one_line(error)}") from error


class _ShadowClassifierTrainer(WithCard, ShadowTrainer):
    """Evaluates the adapted base and its shadow in one pass."""

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        return super().evaluate(eval_dataset, ignore_keys or ["past_key_values"], metric_key_prefix)


class _BaselineClassifierTrainer(WithCard, Trainer):
    pass


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    sft: SFTConfig,
    train_set: Dataset,
    eval_set: Dataset | None,
) -> Any:
    """The trainer of a classifier: ShadowTrainer, or transformers' own for LoRA.

    Raises:
        UserError: it refuses an option.
    """

    def encoded(rows: Dataset | None) -> Dataset | None:
        encode = partial(tokenizer, truncation=sft.max_length is not None, max_length=sft.max_length)
        return None if rows is None else rows.map(lambda row: encode(row["text"]), remove_columns=["text"])

    arguments: dict[str, Any] = {
        "train_dataset": encoded(train_set),
        "eval_dataset": encoded(eval_set),
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
        "compute_metrics": accuracies,
        "callbacks": callbacks(options, sft),
    }
    try:
        if isinstance(model, ShadowForSequenceClassification):
            scale = options.shadow_learning_rate_scale
            return _ShadowClassifierTrainer(model, sft, shadow_learning_rate_scale=scale, **arguments)
        return _BaselineClassifierTrainer(model, sft, **arguments)
    except (ValueError, TypeError, RuntimeError, ImportError, LookupError, AttributeError, OSError) as error:
        raise UserError(f"cannot train with these options: {one_line(error)}") from error


def accuracies(evaluated: EvalPrediction) -> dict[str, float]:
    """The share of right classes, of the adapted base and of its shadow where there is one."""
    logits = evaluated.predictions if isinstance(evaluated.predictions, tuple) else (evaluated.predictions,)
    labels = evaluated.label_ids
    names = ("accuracy", "shadow_accuracy")
    return {name: float(np.mean(given.argmax(-1) == labels)) for name, given in zip(names, logits, strict=False)}


def next_command(output: str, rows: Dataset, quantization: str = "") -> str:
    """The command by which the trained classifier answers the beginning of a text of the data.

    Args:
        output: folder of the run.
        rows: of the data.
        quantization: options that quantized the base; empty if none did.
    """
    text, _ = example_prompt(rows)
    dashes = "-- " if text.startswith("-") else ""
    options = " ".join(filter(None, (f"--adapter {shlex.quote(output)}", quantization)))
    return f"shadow-peft classify {options} {dashes}{shlex.quote(text)}"
