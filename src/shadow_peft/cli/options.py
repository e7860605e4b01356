"""The options of every verb as dataclasses, apart from the verbs so that torch and TRL need not be imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shadow_peft.cli.cascade_options import CascadeOptions
from shadow_peft.cli.export_options import ExportOptions
from shadow_peft.cli.playground_options import PlaygroundOptions
from shadow_peft.cli.pretrain_options import PretrainOptions
from shadow_peft.cli.ranges import LARGEST_SEED, Dtype, require
from shadow_peft.cli.serve_options import ServeOptions
from shadow_peft.config import ShadowConfig

DEFAULT_SHADOW = ShadowConfig(variant="readout")
"""The default config of the command line; in Python the default variant is "published"."""


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
    task: Literal["causal_lm", "classification"] = field(
        default="causal_lm", metadata={"help": "What is learned: to write texts, or to tell the class of a text."}
    )
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
        metadata={"help": "Backbone's learning rate as a multiple of --learning_rate; for a pretrained one try 1 and 0.3."},
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
class ClassifyOptions:
    """Options of `shadow-peft classify`."""

    model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of a classifier, such as an exported one; with --adapter, of its base."},
    )
    adapter: str | None = field(
        default=None, metadata={"help": "Folder or hub id of a shadow adapter; it names its base, --model overrides it."}
    )
    shadow_only: bool = field(default=False, metadata={"help": "The shadow alone answers; no layer of the base runs."})
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the base; auto is that of its file."})

    def __post_init__(self) -> None:
        if self.model is None and self.adapter is None:
            raise ValueError("give --model, --adapter, or both")
        if self.shadow_only and self.adapter is None:
            raise ValueError("--shadow_only needs --adapter: a bare model has no shadow")


@dataclass
class QuantizationOptions:
    """How the verbs that answer quantize a base; names and defaults as in TRL's `ModelConfig`, which `train` takes."""

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
class ConvertOptions:
    """Options of `shadow-peft convert`."""

    to: Literal["peft", "native"] = field(metadata={"help": "Whose files to write: those of peft, or this library's."})
    output: str = field(metadata={"help": "Folder to write into, new or empty."})
    model: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the base; by default the one that the adapter names."}
    )


#: Verb -> the dataclasses of this package whose fields are its options.
OPTIONS: dict[str, list[type]] = {
    "demo": [DemoOptions],
    "train": [TrainOptions, TemplateOptions, ShadowConfig],
    "pretrain": [PretrainOptions],
    "generate": [GenerateOptions, SamplingOptions, QuantizationOptions],
    "classify": [ClassifyOptions, QuantizationOptions],
    "eval": [EvalOptions, QuantizationOptions],
    "cascade": [CascadeOptions, SamplingOptions, QuantizationOptions],
    "serve": [ServeOptions, QuantizationOptions],
    "export": [ExportOptions],
    "convert": [ConvertOptions],
    "playground": [PlaygroundOptions, QuantizationOptions],
}

#: Verb -> the dataclasses of TRL whose fields are its options too.
TRL_OPTIONS: dict[str, list[str]] = {"train": ["SFTConfig", "ModelConfig"]}
