"""The options of every verb, as dataclasses; apart from the verbs, so that they are known without torch and TRL."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from shadow_peft.config import ShadowConfig

DEFAULT_SHADOW = ShadowConfig(variant="readout")
"""The shadow that the command line trains unless it is told otherwise; in Python the default is "published"."""


@dataclass
class DemoOptions:
    """Options of `shadow-peft demo`."""

    output: Path = field(default=Path("shadow-demo"), metadata={"help": "Folder of adapter, shadow, picture, results."})
    smoke: bool = field(default=False, metadata={"help": "A few steps and commands only; the figures mean nothing."})
    seed: int = field(default=0, metadata={"help": "Seed of commands, weights and order."})


@dataclass
class TrainOptions:
    """Options of `shadow-peft train` itself."""

    model: str = field(metadata={"help": "Folder or hub id of the base."})
    data: str = field(metadata={"help": "File, folder or hub id of the data to learn."})
    output: str = field(metadata={"help": "Folder of the adapter, the tokenizer, the model card and the checkpoints."})
    data_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset, such as main."})
    data_split: str = field(default="train", metadata={"help": "Split to learn; slices such as train[:1000] work."})
    eval_data: str | None = field(default=None, metadata={"help": "File, folder or hub id of data to evaluate on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on, of --eval_data or else --data."})
    eval_fraction: float | None = field(default=None, metadata={"help": "Hold out this part of the data to evaluate on."})
    shadow_model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of a small model to be the shadow, instead of one made from the base."},
    )
    share_embeddings: bool = field(default=False, metadata={"help": "Feed it the base's embeddings instead of its own."})
    export: bool = field(default=False, metadata={"help": "Also save the shadow as a model of its own, OUTPUT/shadow."})
    shadow_loss_weight: float = field(default=0.05, metadata={"help": "Weight of the shadow's own loss."})
    shadow_learning_rate_scale: float = field(
        default=1.0, metadata={"help": "Rate of the backbone, in units of --learning_rate; about 0.05 for a pretrained one."}
    )
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Weight of the shadow's distance from the adapted base, which teaches it."}
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "Softens both distributions for that."})
    distillation_warmup_ratio: float = field(
        default=0.0, metadata={"help": "First part of the training in which that weight rises from 0."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better loss, and keep the best."}
    )
    early_stopping_threshold: float = field(default=0.0, metadata={"help": "A loss is better if it falls by more."})


@dataclass
class TemplateOptions:
    """How rows become prompts and completions, see `training.templates`."""

    prompt: str | None = field(default=None, metadata={"help": 'Template, such as "Question: {question}\\nAnswer:".'})
    completion: str | None = field(default=None, metadata={"help": 'Template, such as " {answer}" or "{choices[0]}".'})
    completion_if_missing: str | None = field(default=None, metadata={"help": "Completion where a list is empty."})
    class_column: str | None = field(default=None, metadata={"help": "Column of class indices to show by name."})
    class_names: list[str] | None = field(default=None, metadata={"help": "Name of each class."})
    chat: bool = field(default=False, metadata={"help": "Prompt and completion are turns, for the chat template."})


@dataclass
class GenerateOptions:
    """Options of `shadow-peft generate`."""

    model: str = field(metadata={"help": "Folder or hub id of the model."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of a shadow adapter for the model."})
    shadow_only: bool = field(default=False, metadata={"help": "The shadow answers; the base's layers do not run."})
    draft: bool = field(default=False, metadata={"help": "The shadow drafts, the base verifies: the same answer."})
    chat: bool = field(default=False, metadata={"help": "Wrap each text as a user's message in the chat template."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the base: auto, float32, bfloat16, float16."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})


@dataclass
class QuantizationOptions:
    """How `generate` and `eval` quantize a base; names and defaults as in TRL's `ModelConfig`, which `train` takes."""

    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the base to 4 bits, by bitsandbytes."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the base to 8 bits, by bitsandbytes."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "The 4 bit numbers: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the scales of the 4 bit weights, too."})


@dataclass
class SamplingOptions:
    """Fields of transformers' `GenerationConfig`; what is not given stays as the model's own file has it."""

    max_new_tokens: int = field(default=128, metadata={"help": "The most tokens to add."})
    do_sample: bool | None = field(default=None, metadata={"help": "Draw tokens instead of taking the likeliest."})
    temperature: float | None = field(default=None, metadata={"help": "Divides the logits before drawing."})
    top_p: float | None = field(default=None, metadata={"help": "Draw from the likeliest tokens of this total mass."})
    top_k: int | None = field(default=None, metadata={"help": "Draw from this many of the likeliest tokens."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams of a beam search."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "Above 1, discourages repetition."})


@dataclass
class EvalOptions:
    """Options of `shadow-peft eval`; those of the harness have its names."""

    model: str = field(metadata={"help": "Folder or hub id of the model."})
    tasks: list[str] = field(metadata={"help": "Names of tasks, groups or tags of the harness, or of --include_path."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of a shadow adapter for the model."})
    inference_mode: str = field(default="base_shadow", metadata={"help": "base_shadow, shadow_only, or both in turn."})
    include_path: str | None = field(default=None, metadata={"help": "Folder with YAML files of further tasks."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples in the prompt; the task says by default."})
    limit: float | None = field(default=None, metadata={"help": "Only so many examples of a task; below 1, that part."})
    batch_size: str = field(default="1", metadata={"help": "A number, or auto."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Prompts are turns of the chat template."})
    output: str | None = field(default=None, metadata={"help": "File for all results as JSON."})
    log_samples: bool = field(default=False, metadata={"help": "Every example and answer in that file, too."})
    device: str | None = field(default=None, metadata={"help": "Where to compute; a GPU where there is one."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the model: auto, float32, bfloat16, float16."})
    seed: int = field(default=0, metadata={"help": "Seed of what the harness draws."})


#: Verb -> the dataclasses of this package whose fields are its options.
OPTIONS: dict[str, list[type]] = {
    "demo": [DemoOptions],
    "train": [TrainOptions, TemplateOptions, ShadowConfig],
    "generate": [GenerateOptions, SamplingOptions, QuantizationOptions],
    "eval": [EvalOptions, QuantizationOptions],
}

#: Verb -> the dataclasses of TRL whose fields are its options, too.
TRL_OPTIONS: dict[str, list[str]] = {"train": ["SFTConfig", "ModelConfig"]}
