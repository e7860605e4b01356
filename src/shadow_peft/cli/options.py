"""The options of every verb as dataclasses, apart from the verbs so that torch and TRL need not be imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shadow_peft.config import ShadowConfig

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

DEFAULT_SHADOW = ShadowConfig(variant="readout")
"""The default config of the command line; in Python the default variant is "published"."""

LARGEST_SEED = 2**32 - 1


def require(name: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Refuse a number outside a range; None, which stands for what was not given, lies in every range.

    Raises:
        ValueError: naming the option, the range and the number.
    """
    if value is None or (least <= value <= most and value != math.inf):
        return
    limits = f"at least {least}" if most == math.inf else f"{least} to {most}"
    raise ValueError(f"--{name} must be {limits}, got {value}")


@dataclass
class DemoOptions:
    """Options of `shadow-peft demo`."""

    output: Path = field(default=Path("shadow-demo"), metadata={"help": "Folder for adapter, shadow, plot and results."})
    smoke: bool = field(default=False, metadata={"help": "A few steps and commands only; the figures mean nothing."})
    seed: int = field(default=0, metadata={"help": "Seed of commands, weights and order."})

    def __post_init__(self) -> None:
        require("seed", self.seed, 0, LARGEST_SEED)


@dataclass
class TrainOptions:
    """Options of `shadow-peft train` itself."""

    model: str = field(metadata={"help": "Folder or hub id of the base."})
    data: str = field(metadata={"help": "File, folder or hub id of the training data."})
    output: str = field(metadata={"help": "Folder for the adapter, the tokenizer, the model card and the checkpoints."})
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Train over an old run in OUTPUT: its adapter, checkpoints, results and export are removed first."
        },
    )
    data_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset, such as main."})
    data_split: str = field(default="train", metadata={"help": "Split to train on; slices such as train[:1000] work."})
    eval_data: str | None = field(default=None, metadata={"help": "File, folder or hub id of data to evaluate on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on, of --eval_data or else --data."})
    eval_fraction: float | None = field(
        default=None, metadata={"help": "Hold out this fraction of the data to evaluate on."}
    )
    shadow_model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of a small model to use as the shadow, instead of one made from the base."},
    )
    share_embeddings: bool = field(
        default=False, metadata={"help": "Feed --shadow_model the base's embeddings instead of its own."}
    )
    export: bool = field(default=False, metadata={"help": "Also save the shadow as a model of its own, OUTPUT/shadow."})
    shadow_loss_weight: float = field(default=0.05, metadata={"help": "Weight of the shadow's own loss."})
    shadow_learning_rate_scale: float = field(
        default=1.0,
        metadata={"help": "Learning rate of the backbone divided by --learning_rate; about 0.05 for a pretrained one."},
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the KL divergence of the shadow (student) from the adapted base (teacher)."},
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature of both distributions."})
    distillation_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Fraction of the training in which --distillation_weight rises from 0."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better loss, and keep the best checkpoint."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "A loss counts as better only if it is lower by more than this."}
    )

    def __post_init__(self) -> None:
        require("shadow_learning_rate_scale", self.shadow_learning_rate_scale, 0)
        require("early_stopping_patience", self.early_stopping_patience, 1)
        require("early_stopping_threshold", self.early_stopping_threshold, 0)


@dataclass
class TemplateOptions:
    """How rows become prompts and completions, see `training.templates`."""

    prompt: str | None = field(default=None, metadata={"help": 'Template, such as "Question: {question}\\nAnswer:".'})
    completion: str | None = field(default=None, metadata={"help": 'Template, such as " {answer}" or "{choices[0]}".'})
    completion_if_missing: str | None = field(
        default=None, metadata={"help": "Completion where the template asks for a null cell or an entry of an empty list."}
    )
    class_column: str | None = field(default=None, metadata={"help": "Column of class indices to replace by --class_names."})
    class_names: list[str] | None = field(default=None, metadata={"help": "Name of each class."})
    chat: bool = field(default=False, metadata={"help": "Make prompt and completion turns for the chat template."})


@dataclass
class GenerateOptions:
    """Options of `shadow-peft generate`."""

    model: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the model; by default the base that the adapter names."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of a shadow adapter."})
    shadow_only: bool = field(default=False, metadata={"help": "The shadow alone answers; no layer of the base runs."})
    draft: bool = field(
        default=False, metadata={"help": "The shadow drafts and the base verifies; the answer stays the same."}
    )
    chat: bool = field(default=False, metadata={"help": "Format each text as a user's message with the chat template."})
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the base; auto is that of its file."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})

    def __post_init__(self) -> None:
        if self.model is None and self.adapter is None:
            raise ValueError("give --model, or an --adapter that names its base, or both")
        if (self.shadow_only or self.draft) and self.adapter is None:
            raise ValueError("--shadow_only and --draft need --adapter: a bare model has no shadow")
        if self.shadow_only and self.draft:
            raise ValueError("--draft needs the base, and --shadow_only switches it off")
        require("seed", self.seed, 0, LARGEST_SEED)


@dataclass
class QuantizationOptions:
    """How `generate` and `eval` quantize a base; names and defaults as in TRL's `ModelConfig`, which `train` takes."""

    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the base to 4 bits, by bitsandbytes."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the base to 8 bits, by bitsandbytes."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "The 4 bit numbers: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the scales of the 4 bit weights, too."})


@dataclass
class SamplingOptions:
    """Fields of transformers' `GenerationConfig`; those not given keep the values of the model's own file."""

    max_new_tokens: int = field(default=128, metadata={"help": "Maximum number of tokens to add."})
    do_sample: bool | None = field(default=None, metadata={"help": "Sample tokens instead of taking the most likely one."})
    temperature: float | None = field(default=None, metadata={"help": "Sampling temperature; divides the logits."})
    top_p: float | None = field(
        default=None, metadata={"help": "Sample from the most likely tokens of this total probability."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Sample from this many of the most likely tokens."})
    num_beams: int | None = field(default=None, metadata={"help": "Number of beams of a beam search."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "Above 1 it discourages repetition."})

    def __post_init__(self) -> None:
        require("max_new_tokens", self.max_new_tokens, 1)
        for name, value in (("temperature", self.temperature), ("repetition_penalty", self.repetition_penalty)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} must be above 0, got {value}")
        require("top_p", self.top_p, 0, 1)
        require("top_k", self.top_k, 0)
        require("num_beams", self.num_beams, 1)

    def given(self) -> dict[str, Any]:
        """What was asked for, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class EvalOptions:
    """Options of `shadow-peft eval`; options of the harness keep their names."""

    tasks: list[str] = field(metadata={"help": "Names of tasks, groups or tags of the harness, or of --include_path."})
    model: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the model; by default the base that the adapter names."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of a shadow adapter."})
    inference_mode: Literal["base_shadow", "shadow_only", "both"] = field(
        default="base_shadow", metadata={"help": "Which network answers; both scores one after the other."}
    )
    include_path: str | None = field(default=None, metadata={"help": "Folder with YAML files of further tasks."})
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Number of examples in the prompt; by default the task decides."}
    )
    limit: float | None = field(
        default=None, metadata={"help": "Use only this many examples of a task; below 1, this fraction."}
    )
    batch_size: str = field(default="1", metadata={"help": "A number, or auto."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Format prompts with the chat template."})
    output: str | None = field(default=None, metadata={"help": "File for all results as JSON."})
    log_samples: bool = field(default=False, metadata={"help": "Write every example and answer into that file too."})
    device: str | None = field(default=None, metadata={"help": "Device to compute on; by default a GPU if there is one."})
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the model; auto is that of its file."})
    seed: int = field(default=0, metadata={"help": "Seed of the harness."})

    def __post_init__(self) -> None:
        if self.model is None and self.adapter is None:
            raise ValueError("give --model, or an --adapter that names its base, or both")
        if self.adapter is None and self.inference_mode != "base_shadow":
            raise ValueError(f"--inference_mode {self.inference_mode} needs --adapter: a bare model has no shadow")
        if not (self.batch_size.startswith("auto") or (self.batch_size.isdecimal() and int(self.batch_size) > 0)):
            raise ValueError(f"--batch_size is a number or auto, got {self.batch_size!r}")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(f"--limit must be above 0, got {self.limit}")
        require("num_fewshot", self.num_fewshot, 0)
        require("seed", self.seed, 0, LARGEST_SEED)


@dataclass
class CascadeOptions:
    """Options of `shadow-peft cascade`."""

    model: str | None = field(
        default=None, metadata={"help": "Base of the adapter, by default the one it names; or an exported shadow."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of a shadow adapter."})
    remote_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint that takes over, such as http://server:8000/v1."}
    )
    remote_model: str | None = field(
        default=None,
        metadata={"help": "Name of the model there; the variable SHADOW_PEFT_API_KEY holds its key."},
    )
    timeout: float = field(default=30.0, metadata={"help": "Most seconds that the endpoint may take for an answer."})
    threshold: float | None = field(
        default=None, metadata={"help": "Confidence below which the other model takes over; by default cascade.json has it."}
    )
    takeover: Literal["answer", "token"] | None = field(
        default=None,
        metadata={"help": "Answer anew, or go on at the first unsure token; by default as calibrated, or answer."},
    )
    calibrate: str | None = field(default=None, metadata={"help": "Data with right answers to find the threshold on."})
    promise: Literal["quality", "regret", "escalations"] = field(
        default="quality",
        metadata={"help": "What is promised: the mean quality, what it loses to always asking, or how often it asks."},
    )
    target: float | None = field(
        default=None, metadata={"help": "The least quality, or the most regret or escalations, that is promised."}
    )
    confidence: float = field(
        default=0.95, metadata={"help": "How surely the promise is kept; 0 promises the expectation (not of a quality)."}
    )
    quality: Literal["exact_match", "word_overlap", "json_fields"] = field(
        default="exact_match",
        metadata={"help": "What an answer is worth: all or nothing, the F1 of its words, or its share of right fields."},
    )
    data: str | None = field(default=None, metadata={"help": "Data with right answers to score the cascade on."})
    output: str | None = field(
        default=None, metadata={"help": "Folder for cascade.json and the curve; by default that of adapter or model."}
    )
    batch_size: int = field(default=16, metadata={"help": "Rows of data that are answered together."})
    chat: bool = field(default=False, metadata={"help": "Send each text as a user's message with the chat template."})
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the model; auto is that of its file."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling, and of the division of the data."})

    def __post_init__(self) -> None:
        if self.adapter is None and (self.model is None or self.remote_url is None):
            raise ValueError("give --adapter; or an exported shadow as --model, and who it asks as --remote_url")
        if (self.remote_url is None) != (self.remote_model is None):
            raise ValueError("--remote_url and --remote_model go together: where the endpoint is, and its model's name")
        if (self.calibrate is None) != (self.target is None):
            raise ValueError("--calibrate and --target go together: the data, and what they are to promise")
        if self.calibrate is not None and self.threshold is not None:
            raise ValueError("--calibrate finds the threshold; drop --threshold")
        if self.output is not None and self.calibrate is None:
            raise ValueError("--output is where --calibrate writes; drop it, or add --calibrate")
        if self.target is not None and not 0 < self.target < 1:
            raise ValueError(f"--target must lie between 0 and 1, got {self.target}")
        if not 0 <= self.confidence < 1:
            raise ValueError(f"--confidence must be 0, or lie between 0 and 1, got {self.confidence}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("--threshold is not a number")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"--timeout must be above 0, got {self.timeout}")
        require("batch_size", self.batch_size, 1)
        require("seed", self.seed, 0, LARGEST_SEED)


#: Verb -> the dataclasses of this package whose fields are its options.
OPTIONS: dict[str, list[type]] = {
    "demo": [DemoOptions],
    "train": [TrainOptions, TemplateOptions, ShadowConfig],
    "generate": [GenerateOptions, SamplingOptions, QuantizationOptions],
    "eval": [EvalOptions, QuantizationOptions],
    "cascade": [CascadeOptions, SamplingOptions, QuantizationOptions],
}

#: Verb -> the dataclasses of TRL whose fields are its options too.
TRL_OPTIONS: dict[str, list[str]] = {"train": ["SFTConfig", "ModelConfig"]}
