"""Checks of `shadow-peft train` for options that contradict each other, before anything is loaded or overwritten."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import strtobool
from trl import ModelConfig, SFTConfig

from shadow_peft.cli.errors import UserError
from shadow_peft.cli.loading import check_quantization
from shadow_peft.cli.options import DEFAULT_SHADOW, TrainOptions
from shadow_peft.cli.ranges import LARGEST_SEED, require
from shadow_peft.config import ShadowConfig
from shadow_peft.tasks.causal_lm import ShadowForCausalLM


def check_options(options: TrainOptions, shadow: ShadowConfig, sft: SFTConfig, peft: ModelConfig) -> None:
    """Refuse options that contradict each other.

    Raises:
        UserError: says which, and what to do.
    """
    if sft.output_dir not in ("trainer_output", options.output):
        raise UserError("give the folder as --output, not as --output_dir")
    if peft.model_name_or_path is not None:
        raise UserError("give the base as --model, not as --model_name_or_path")
    check_quantization(peft)
    _check_numbers(sft, peft)
    _check_method(options, shadow, peft)
    _check_shadow(options, shadow)
    _check_evaluation(options, sft)
    _check_launch(options, peft)


#: Option of TRL's configurations -> the least and the most that make sense.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, LARGEST_SEED),
    "data_seed": (0, LARGEST_SEED),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "max_length": (1, math.inf),
    "save_total_limit": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "lora_r": (1, math.inf),
    "lora_alpha": (0, math.inf),
    "lora_dropout": (0, 1),
}


def _check_numbers(sft: SFTConfig, peft: ModelConfig) -> None:
    """Numbers that TRL takes and that mean nothing: they would stop a run late, or change it without a word."""
    numbers = vars(peft) | vars(sft)
    try:
        for name, (least, most) in RANGES.items():
            require(name, numbers[name], least, most)
        if sft.max_steps <= 0 and not 0 < sft.num_train_epochs < math.inf:
            raise ValueError(f"--num_train_epochs must be above 0, got {sft.num_train_epochs}")
        for name in ("logging_steps", "save_steps", "eval_steps"):
            if numbers[name] is not None and not 0 < numbers[name] < math.inf:
                raise ValueError(f"--{name} must be above 0, got {numbers[name]}")
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_method(options: TrainOptions, shadow: ShadowConfig, peft: ModelConfig) -> None:
    """Refuse options of the method that is not trained."""
    if not peft.use_peft:
        wrong = given(peft, _options_named(ModelConfig, "lora_", "use_rslora", "use_dora"), vars(ModelConfig()))
        if wrong:
            raise UserError(f"--{wrong[0]} belongs to LoRA; add --use_peft to train LoRA instead of a shadow")
        return
    of_shadow = ("shadow_model", "export", "shadow_learning_rate_scale", *ShadowForCausalLM.loss_settings)
    wrong = given(shadow, _options_named(ShadowConfig, ""), vars(DEFAULT_SHADOW))
    wrong += given(options, of_shadow, declared_defaults(TrainOptions))
    if wrong:
        raise UserError(f"--{wrong[0]} belongs to a shadow, and --use_peft trains LoRA instead; drop one of them")


def _check_shadow(options: TrainOptions, shadow: ShadowConfig) -> None:
    """Refuse options for a shadow made from the base together with `--shadow_model`, and the other way round."""
    if options.shadow_model is None:
        if options.share_embeddings:
            raise UserError(
                "--share_embeddings belongs to --shadow_model; a shadow made from the base has no embeddings of its own"
            )
        return
    wrong = given(shadow, _options_named(ShadowConfig, "num_shadow_", "shadow_"), vars(DEFAULT_SHADOW))
    if wrong:
        raise UserError(
            f"--{wrong[0]} is for a shadow made from the base, and --shadow_model passes another one; drop one of them"
        )


def given(options: object, names: Iterable[str], defaults: Mapping[str, Any]) -> list[str]:
    """Those of the named options whose values are not the defaults."""
    return [name for name in names if vars(options)[name] != defaults[name]]


def declared_defaults(kind: type) -> dict[str, Any]:
    """Name -> default, of the fields of a dataclass of options."""
    return {f.name: f.default for f in fields(kind)}


def _options_named(kind: type, *prefixes: str) -> list[str]:
    """The fields of a dataclass of options whose names begin with one of the prefixes."""
    return [f.name for f in fields(kind) if f.name.startswith(prefixes)]


def _check_evaluation(options: TrainOptions, sft: SFTConfig) -> None:
    if options.eval_fraction is not None and (options.eval_data or options.eval_split):
        raise UserError("--eval_fraction holds out a part of --data; drop it, or drop --eval_data and --eval_split")
    if options.eval_fraction is not None and not 0 < options.eval_fraction < 1:
        raise UserError(f"--eval_fraction must lie between 0 and 1, got {options.eval_fraction}")
    has_data = options.eval_fraction or options.eval_data or options.eval_split
    if sft.eval_strategy != "no" and not has_data:
        raise UserError("--eval_strategy needs --eval_data, --eval_split or --eval_fraction")
    if options.early_stopping_patience is None:
        return
    if sft.eval_strategy == "no" or sft.eval_strategy != sft.save_strategy:
        raise UserError(
            "--early_stopping_patience keeps the best checkpoint: give --eval_strategy and --save_strategy, both steps or "
            f"both epoch; got {sft.eval_strategy.value} and {sft.save_strategy.value}"
        )
    if sft.eval_strategy == "steps" and sft.save_steps % (sft.eval_steps or sft.logging_steps):
        raise UserError(f"--save_steps {sft.save_steps} must be a multiple of --eval_steps, to keep the best checkpoint")


def _check_launch(options: TrainOptions, peft: ModelConfig) -> None:
    """Refuse what DeepSpeed and FSDP cannot do for an adapter."""
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise UserError(
            "ZeRO-3 does not gather the parameters of an adapter, which the model reads between layers; use FSDP2 for a "
            "sharded base (recipes/accelerate/fsdp2.yaml), or ZeRO-2"
        )
    if not strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return
    if strtobool(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")):
        raise UserError(
            "FSDP's cpu_ram_efficient_loading rebuilds a model from its state dict, which is the adapter alone here; set "
            "fsdp_cpu_ram_efficient_loading: false, as recipes/accelerate/fsdp2.yaml does"
        )
    if peft.load_in_8bit:
        raise UserError("FSDP cannot shard 8 bit weights of bitsandbytes; take --load_in_4bit, or DDP")
    if options.export:
        raise UserError("--export needs the base in one process; train first, and export from the saved adapter")


def check_template(tokenizer: PreTrainedTokenizerBase, examples: Dataset, path: str) -> None:
    """Refuse messages if the tokenizer has no chat template."""
    if "prompt" in examples.column_names and isinstance(examples[0]["prompt"], list) and tokenizer.chat_template is None:
        raise UserError(
            f"{path} contains messages, but the tokenizer has no chat template; "
            "use a model with one, --chat_template_path, or prompt/completion lines"
        )
