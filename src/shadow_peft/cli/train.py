"""`shadow-peft train`: fine-tunes a causal language model with a shadow, or with LoRA as a baseline."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from shadow_peft.cli.errors import UserError
from shadow_peft.cli.loading import load_base, load_shadow, load_tokenizer, quantization_flags
from shadow_peft.cli.options import DEFAULT_SHADOW, OPTIONS, TemplateOptions, TrainOptions
from shadow_peft.cli.parsing import make_parser, parse
from shadow_peft.cli.refusals import check_options, check_template, checkpoint_to_resume
from shadow_peft.config import ShadowConfig
from shadow_peft.model import get_shadow_model
from shadow_peft.tasks.causal_lm import ShadowForCausalLM
from shadow_peft.training.card import RunFacts, write_card
from shadow_peft.training.examples import BadDataError
from shadow_peft.training.sft import ShadowSFTTrainer
from shadow_peft.training.sources import load_examples
from shadow_peft.training.templates import PromptTemplate

DESCRIPTION = (
    "Fine-tunes a causal language model with a shadow. --data is a file (.jsonl, .json, .csv, .parquet), a folder or a "
    'dataset of the hub. Its rows are {"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...}; the '
    "templates --prompt and --completion make prompts and completions of other columns. Only completions (of messages: the "
    "last turn) are learned. Options are those of this verb, of ShadowConfig, and of TRL's SFTConfig and ModelConfig. "
    "--use_peft trains TRL's LoRA instead of a shadow. --config FILE.yaml sets any of them."
)
EXAMPLES = """examples:
  shadow-peft train --model Qwen/Qwen3-0.6B --data commands.jsonl --output out
  shadow-peft train --model Qwen/Qwen3-0.6B --data chat.jsonl --eval_data held-out.jsonl --output out --export
  shadow-peft train --model ./base --data d.jsonl --output out --num_shadow_layers 2 --learning_rate 5e-4 --max_steps 1000
  shadow-peft train --model Qwen/Qwen3-8B --shadow_model Qwen/Qwen3-0.6B --data d.jsonl --output out
  shadow-peft train --config recipes/gsm8k.yaml
  shadow-peft train --config recipes/gsm8k.yaml --use_peft --use_dora --output out/dora
  shadow-peft train --config recipes/gsm8k.yaml --eval_strategy steps --early_stopping_patience 3
  shadow-peft train --config recipes/gsm8k.yaml --resume_from_checkpoint last
  shadow-peft train --config recipes/gsm8k.yaml --load_in_4bit --use_bnb_nested_quant --output out/gsm8k-4bit
  accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m shadow_peft.cli train --config recipes/gsm8k.yaml
"""

#: Defaults of SFTConfig and ModelConfig that suit an adapter; all others are TRL's. Every part of an adapter gets a gradient
#: in every step, so DDP need not look for unused parameters.
DEFAULTS = {
    "learning_rate": 1e-3,
    "report_to": "none",
    "activation_checkpointing": False,
    "logging_steps": 10,
    "ddp_find_unused_parameters": False,
    "dtype": "auto",
    "variant": DEFAULT_SHADOW.variant,
}


def run(arguments: list[str]) -> None:
    """Parse the options, check all data, train and save."""
    options, templates, shadow, sft, peft = parse(make_train_parser(), arguments)
    sft.resume_from_checkpoint = checkpoint_to_resume(sft.resume_from_checkpoint, options.output)
    check_options(options, shadow, sft, peft)
    print(method_line(shadow, peft), flush=True)
    sft.output_dir = options.output
    train_set, eval_set = _data(options, _template(templates), sft.seed)
    tokenizer = load_tokenizer(options.model)
    check_template(tokenizer, train_set, options.data)
    set_seed(sft.seed)
    model = build(options, shadow, peft, len(tokenizer))
    trainer = make_trainer(model, tokenizer, options, sft, peft, train_set, eval_set)
    trainer.facts = _facts(options, trainer, peft, arguments)
    fit(trainer, sft.resume_from_checkpoint)
    save(trainer, tokenizer, Path(options.output), options.export)


def make_train_parser() -> TrlParser:
    """The parser of this verb's options, ShadowConfig's and TRL's, with defaults that suit an adapter."""
    parser = make_parser("train", [*OPTIONS["train"], SFTConfig, ModelConfig], DESCRIPTION, EXAMPLES)
    for bits in (4, 8):  # TRL's help says that they work with LoRA only
        parser._option_string_actions[f"--load_in_{bits}bit"].help = f"Quantize the base to {bits} bits, by bitsandbytes."
    parser.set_defaults(**DEFAULTS, bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    return parser


def method_line(shadow: ShadowConfig, peft: ModelConfig) -> str:
    """The first line of output: the method and its variant."""
    if peft.use_peft:
        return f"training {'DoRA' if peft.use_dora else 'LoRA'} of rank {peft.lora_r}"
    other = {"readout": "published", "published": "readout", "peft": "published"}[shadow.variant]
    return f"training ShadowPEFT, variant {shadow.variant!r} (for the other mathematics: --variant {other})"


def build(options: TrainOptions, shadow: ShadowConfig, peft: ModelConfig, tokens: int) -> PreTrainedModel:
    """The base with a fresh shadow; with `--use_peft` the base alone, since TRL's trainer adds LoRA."""
    kwargs: dict[str, Any] = {"revision": peft.model_revision, "dtype": peft.dtype}
    if peft.attn_implementation is not None:
        kwargs["attn_implementation"] = peft.attn_implementation
    base = load_base(options.model, peft, **kwargs)
    if peft.use_peft:
        return base
    brought = None
    if options.shadow_model is not None:
        brought = load_shadow(options.shadow_model, base, tokens, options.share_embeddings, dtype=peft.dtype)
    try:
        weights = {name: getattr(options, name) for name in ShadowForCausalLM.loss_settings}
        return ShadowForCausalLM(get_shadow_model(base, shadow, shadow_model=brought), **weights)
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot attach this shadow to {options.model!r}: {error}") from error


class _WithCard:
    """A trainer that writes our model card wherever TRL writes one."""

    facts: RunFacts | None = None
    args: Any
    state: Any

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write the card with the figures so far, in one process."""
        if self.facts is not None and self.state.is_world_process_zero:
            write_card(Path(self.args.output_dir), self.facts, self.state.log_history)


class _ShadowTrainer(_WithCard, ShadowSFTTrainer):
    pass


class _BaselineTrainer(_WithCard, SFTTrainer):
    pass


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    sft: SFTConfig,
    peft: ModelConfig,
    train_set: Dataset,
    eval_set: Dataset | None,
) -> Any:
    """The trainer: ShadowSFTTrainer, or TRL's SFTTrainer for LoRA.

    Raises:
        UserError: the trainer refuses an option, such as a tracker that is not installed.
    """
    arguments: dict[str, Any] = {
        "train_dataset": train_set,
        "eval_dataset": eval_set,
        "processing_class": tokenizer,
        "callbacks": _callbacks(options, sft),
    }
    try:
        if peft.use_peft:
            return _BaselineTrainer(model, sft, peft_config=get_peft_config(peft), **arguments)
        scale = options.shadow_learning_rate_scale
        return _ShadowTrainer(model, sft, shadow_learning_rate_scale=scale, **arguments)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"cannot train with these options: {error}") from error


def fit(trainer: Any, checkpoint: str | None) -> None:
    """Train, evaluate at the end, and write the metrics."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()


def save(trainer: Any, tokenizer: PreTrainedTokenizerBase, output: Path, export: bool) -> None:
    """Save adapter, tokenizer and card into `output`; with `export`, also the exported shadow into `output/shadow`."""
    if trainer.is_fsdp_enabled:  # checkpoints may be sharded, an adapter is one file
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output), _internal_call=True)
    if export and trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).export_shadow().save_pretrained(output / "shadow")
        tokenizer.save_pretrained(output / "shadow")
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _data(options: TrainOptions, template: PromptTemplate, seed: int) -> tuple[Dataset, Dataset | None]:
    """The checked examples for training and for evaluation."""
    try:
        train_set = load_examples(options.data, template, name=options.data_name, split=options.data_split)
        if options.eval_fraction is not None:
            halves = train_set.train_test_split(options.eval_fraction, seed=seed)
            return halves["train"], halves["test"]
        if options.eval_data is None and options.eval_split is None:
            return train_set, None
        place, split = options.eval_data or options.data, options.eval_split or "train"
        name = options.data_name if options.eval_data is None else None
        return train_set, load_examples(place, template, name=name, split=split)
    except (BadDataError, ValueError) as error:
        raise UserError(str(error)) from error


def _template(templates: TemplateOptions) -> PromptTemplate:
    """The templates; the two characters \\n mean a line break, which is hard to type in a shell."""
    given: dict[str, Any] = {n: v.replace("\\n", "\n") if isinstance(v, str) else v for n, v in asdict(templates).items()}
    try:
        return PromptTemplate(**given)
    except ValueError as error:
        raise UserError(str(error)) from error


def _callbacks(options: TrainOptions, sft: SFTConfig) -> list[EarlyStoppingCallback]:
    """Early stopping, if asked for. It keeps the best checkpoint, so evaluation and saving must coincide."""
    if options.early_stopping_patience is None:
        return []
    sft.load_best_model_at_end = True
    sft.metric_for_best_model = sft.metric_for_best_model or "eval_loss"
    sft.greater_is_better = bool(sft.greater_is_better)
    return [EarlyStoppingCallback(options.early_stopping_patience, options.early_stopping_threshold)]


def _parts(options: TrainOptions) -> str:
    """The data for training and evaluation, in words."""
    learned = f"configuration {options.data_name}, " if options.data_name else ""
    if options.eval_fraction is not None:
        return f"{learned}split {options.data_split}, of which {options.eval_fraction:g} held out"
    place = f" of `{options.eval_data}`" if options.eval_data else ""
    evaluated = f"; evaluated on split {options.eval_split or 'train'}{place}" if place or options.eval_split else ""
    return f"{learned}split {options.data_split}{evaluated}"


def _facts(options: TrainOptions, trainer: Any, peft: ModelConfig, arguments: list[str]) -> RunFacts:
    examples = {"training": trainer.train_dataset, "evaluation": trainer.eval_dataset}
    return RunFacts(
        name=Path(options.output).name,
        method="ShadowPEFT" if not peft.use_peft else "DoRA" if peft.use_dora else "LoRA",
        base=options.model,
        data=options.data,
        parts=_parts(options),
        examples={purpose: len(rows) for purpose, rows in examples.items() if rows is not None},
        trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        seed=trainer.args.seed,
        command=f"shadow-peft train {shlex.join(arguments)}",
        processes=trainer.args.world_size,
        quantization=quantization_flags(peft),
    )
