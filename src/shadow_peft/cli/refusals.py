"""Checks of `shadow-peft train` for options that contradict each other, before anything is loaded or overwritten."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import strtobool
from trl import ModelConfig, SFTConfig

from shadow_peft.checkpoint.folder import others_in
from shadow_peft.cli.errors import UserError
from shadow_peft.cli.loading import check_quantization
from shadow_peft.cli.options import DEFAULT_SHADOW, TrainOptions
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
    if Path(options.output).is_file():
        raise UserError(f"--output {options.output} is a file; give a folder")
    check_quantization(peft)
    there = None if peft.use_peft else others_in(Path(options.output))
    if there:
        raise UserError(f"--output {options.output} holds {there}; give another folder")
    _check_method(options, shadow, peft)
    _check_shadow(options, shadow)
    _check_evaluation(options, sft)
    _check_launch(options, peft)


def _check_method(options: TrainOptions, shadow: ShadowConfig, peft: ModelConfig) -> None:
    """Refuse options of the method that is not trained."""
    neutral = ("model_name_or_path", "use_peft", "dtype", "model_revision", "attn_implementation")
    lora = [f.name for f in fields(ModelConfig) if f.name.startswith(("lora_", "use_rslora", "use_dora"))]
    if not peft.use_peft:
        given = [name for name in lora if getattr(peft, name) != getattr(ModelConfig(), name) and name not in neutral]
        if given:
            raise UserError(f"--{given[0]} belongs to LoRA; add --use_peft to train LoRA instead of a shadow")
        return
    of_shadow = ("shadow_model", "export", "shadow_learning_rate_scale", *ShadowForCausalLM.loss_settings)
    given = [f.name for f in fields(shadow) if getattr(shadow, f.name) != getattr(DEFAULT_SHADOW, f.name)]
    given += [f.name for f in fields(options) if f.name in of_shadow and getattr(options, f.name) != f.default]
    if given:
        raise UserError(f"--{given[0]} belongs to a shadow, and --use_peft trains LoRA instead; drop one of them")


def _check_shadow(options: TrainOptions, shadow: ShadowConfig) -> None:
    """Refuse options for a shadow made from the base together with `--shadow_model`, and the other way round."""
    if options.shadow_model is None:
        if options.share_embeddings:
            raise UserError(
                "--share_embeddings belongs to --shadow_model; a shadow made from the base has no embeddings of its own"
            )
        return
    shape = [f.name for f in fields(shadow) if f.name.startswith(("num_shadow_", "shadow_"))]
    given = [name for name in shape if getattr(shadow, name) != getattr(DEFAULT_SHADOW, name)]
    if given:
        raise UserError(
            f"--{given[0]} is for a shadow made from the base, and --shadow_model passes another one; drop one of them"
        )


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


def checkpoint_to_resume(given: str | None, output: str) -> str | None:
    """The checkpoint to resume from; "last" is the newest in the output folder.

    Raises:
        UserError: there is none.
    """
    if given is None or given.lower() == "false":
        return None
    if given.lower() in ("last", "true"):
        last: str | None = get_last_checkpoint(output) if Path(output).is_dir() else None
        if last is None:
            raise UserError(f"there is no checkpoint in {output} to resume from; drop --resume_from_checkpoint")
        return last
    if not Path(given, "trainer_state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {given} is no checkpoint of a trainer: it has no trainer_state.json")
    return given


def check_template(tokenizer: PreTrainedTokenizerBase, examples: Dataset, path: str) -> None:
    """Refuse messages if the tokenizer has no chat template."""
    if "prompt" in examples.column_names and isinstance(examples[0]["prompt"], list) and tokenizer.chat_template is None:
        raise UserError(
            f"{path} contains messages, but the tokenizer has no chat template; "
            "use a model with one, or prompt/completion lines"
        )
