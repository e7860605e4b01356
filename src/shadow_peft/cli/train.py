"""`shadow-peft train`: fine-tunes a causal language model with a shadow, or with LoRA as a baseline."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, SFTConfig

from shadow_peft.cli import classification, summary
from shadow_peft.cli.errors import UserError, one_line
from shadow_peft.cli.folders import check_output, checkpoint_to_resume, clear
from shadow_peft.cli.loading import (
    check_place,
    load_base,
    load_shadow,
    load_tokenizer,
    quantization_flags,
    use_chat_template,
)
from shadow_peft.cli.options import DEFAULT_SHADOW, OPTIONS, TemplateOptions, TrainOptions
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.progress import TrainingProgress
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.cli.refusals import check_options, check_template
from shadow_peft.cli.running import fit, make_trainer, save, show_progress
from shadow_peft.cli.screen import Screen
from shadow_peft.config import ShadowConfig
from shadow_peft.model import get_shadow_model
from shadow_peft.tasks.causal_lm import ShadowForCausalLM
from shadow_peft.training.card import RunFacts, portable
from shadow_peft.training.examples import BadDataError
from shadow_peft.training.sources import load_examples
from shadow_peft.training.templates import PromptTemplate

DESCRIPTION = """Fine-tunes a causal language model or a classifier with a shadow, or with LoRA
as a baseline.

--data is a file (.jsonl, .json, .csv, .parquet), a folder or a dataset of the
hub. Its rows are
  {"prompt": ..., "completion": ...}    trains on the completion
  {"messages": [...]}                   trains on the last turn
  {"conversations": [...]}              the same, in the format of ShareGPT
  {"text": ...}                         trains on all of it
or become prompts and completions by the templates --prompt and --completion
over their columns. With --task classification they are
  {"text": ..., "label": ...}           trains on the label; --prompt is a
                                        template of the text, --class_column
                                        the label"""
EXAMPLES = """examples:
  shadow-peft train --model Qwen/Qwen3-0.6B --data commands.jsonl --output out
  shadow-peft train --model Qwen/Qwen3-0.6B --data chat.jsonl \\
      --eval_data held-out.jsonl --output out/chat --export
  shadow-peft train --model ./base --data texts.jsonl --output out/texts \\
      --num_shadow_layers 2 --learning_rate 5e-4
  shadow-peft train --model Qwen/Qwen3-8B --shadow_model Qwen/Qwen3-0.6B \\
      --data commands.jsonl --output out/explicit
  shadow-peft train --task classification --model Qwen/Qwen3-0.6B \\
      --data mails.jsonl --eval_fraction 0.1 --output out/mails
  shadow-peft train --config recipes/gsm8k.yaml
  shadow-peft train --config recipes/gsm8k.yaml --resume_from_checkpoint last
  shadow-peft train --config recipes/gsm8k.yaml --overwrite \\
      --early_stopping_patience 1
  shadow-peft train --config recipes/gsm8k.yaml --use_peft --use_dora \\
      --output out/dora
  shadow-peft train --config recipes/gsm8k.yaml --load_in_4bit \\
      --use_bnb_nested_quant --output out/gsm8k-4bit
  accelerate launch --config_file recipes/accelerate/fsdp2.yaml \\
      -m shadow_peft.cli train --config recipes/gsm8k.yaml --output out/fsdp
"""

#: Defaults of SFTConfig and ModelConfig that suit an adapter; all others are TRL's. Every part of an adapter gets a gradient
#: in every step, so DDP need not look for unused parameters.
DEFAULTS = {
    "learning_rate": 1e-3,
    "report_to": "none",
    "gradient_checkpointing": None,  # the old name of activation_checkpointing, which TRL switches on
    "logging_steps": 10,
    "ddp_find_unused_parameters": False,
    "dtype": "auto",
    "variant": DEFAULT_SHADOW.variant,
}


def run(arguments: list[str]) -> None:
    """Parse the options, check all data, train and save."""
    options, templates, shadow, sft, peft, _ = parse(make_train_parser(), arguments)
    sft.resume_from_checkpoint, skipped = checkpoint_to_resume(sft.resume_from_checkpoint, options.output)
    check_options(options, shadow, sft, peft)
    _check_folder(options, sft, peft)
    for place in filter(None, (options.model, options.shadow_model)):
        check_place(place)
    screen = Screen(silent=sft.process_index != 0)
    screen.line(method_line(shadow, peft))
    for line in skipped if sft.process_index == 0 else ():
        print(f"note: {line}", file=sys.stderr)
    with quiet_libraries():
        _train(options, templates, shadow, sft, peft, arguments, screen)


def _train(
    options: TrainOptions,
    templates: TemplateOptions,
    shadow: ShadowConfig,
    sft: SFTConfig,
    peft: ModelConfig,
    arguments: list[str],
    screen: Screen,
) -> None:
    """The run itself, once its options are checked."""
    sft.output_dir = options.output
    sft.dataloader_pin_memory = sft.dataloader_pin_memory and sft.device.type != "cpu"  # torch warns of it on a CPU
    tokenizer, train_set, eval_set, trainer = _prepared(options, templates, shadow, sft, peft, screen)
    trainer.facts = _facts(options, trainer, shadow, peft, arguments, chat=summary.example_prompt(train_set)[1])
    head = partial(summary.head, options, trainer, method(shadow, peft), _dropped(trainer, train_set, eval_set))
    progress = show_progress(trainer, TrainingProgress(screen, head, bars=not sft.disable_tqdm))
    if options.overwrite and trainer.is_world_process_zero():
        clear(Path(options.output))
    started = time.perf_counter()
    evaluation = fit(trainer, sft.resume_from_checkpoint, progress, arguments)
    save(trainer, tokenizer, Path(options.output), options.export)
    seconds = time.perf_counter() - started
    screen.panel("done", summary.tail(trainer, Path(options.output), seconds, evaluation, options.export))
    if options.task == "causal_lm":
        command = summary.next_command(options.output, train_set, peft.use_peft, quantization_flags(peft))
    elif not peft.use_peft:
        command = classification.next_command(options.output, train_set, quantization_flags(peft))
    else:
        return
    screen.command("try it", command)


def _prepared(
    options: TrainOptions,
    templates: TemplateOptions,
    shadow: ShadowConfig,
    sft: SFTConfig,
    peft: ModelConfig,
    screen: Screen,
) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset | None, Any]:
    """The tokenizer, the data as they were read, and the trainer."""
    if options.task == "classification":
        classification.check(options, templates, sft)
        with screen.working(f"reading {options.data}"):
            train_set, eval_set, names = classification.load_data(options, templates, sft)
        tokenizer = load_tokenizer(options.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        set_seed(sft.seed)
        classifier = classification.build(options, shadow, peft, tokenizer, names)
        trainer = classification.make_trainer(classifier, tokenizer, options, sft, train_set, eval_set)
        return tokenizer, train_set, eval_set, trainer
    with screen.working(f"reading {options.data}"):
        train_set, eval_set = _data(options, _template(templates), sft)
    tokenizer = load_tokenizer(options.model)
    if sft.chat_template_path is not None and not peft.use_peft:  # for LoRA, TRL can add tokens and train them
        use_chat_template(tokenizer, sft.chat_template_path)
        sft.chat_template_path = None
    if sft.chat_template_path is None:
        check_template(tokenizer, train_set, options.data)
    set_seed(sft.seed)
    model = build(options, shadow, peft, len(tokenizer))
    with screen.working(f"preparing {len(train_set):,} rows"):
        trainer = make_trainer(model, tokenizer, options, sft, peft, train_set, eval_set)
    return tokenizer, train_set, eval_set, trainer


def make_train_parser() -> VerbParser:
    """The parser of this verb's options, ShadowConfig's and TRL's, with defaults that suit an adapter."""
    parser = VerbParser("train", [*OPTIONS["train"], SFTConfig, ModelConfig], DESCRIPTION, EXAMPLES)
    parser.set_defaults(**DEFAULTS, bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    return parser


def method(shadow: ShadowConfig, peft: ModelConfig) -> str:
    """The method and its variant."""
    if peft.use_peft:
        return f"{'DoRA' if peft.use_dora else 'LoRA'} of rank {peft.lora_r}"
    return f"ShadowPEFT, variant {shadow.variant!r}"


def method_line(shadow: ShadowConfig, peft: ModelConfig) -> str:
    """The first line of output."""
    if peft.use_peft:
        return f"training {method(shadow, peft)}"
    other = {"readout": "published", "published": "readout", "peft": "published"}[shadow.variant]
    return f"training {method(shadow, peft)} (alternative: --variant {other})"


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
        raise UserError(f"cannot attach this shadow to {options.model!r}: {one_line(error)}") from error


def _data(options: TrainOptions, template: PromptTemplate, sft: SFTConfig) -> tuple[Dataset, Dataset | None]:
    """The checked examples for training and for evaluation; plain text of any column is in `text` then."""
    load = partial(load_examples, template=template, text_column=sft.dataset_text_field)
    sft.dataset_text_field = "text"
    try:
        train_set = load(options.data, name=options.data_name, split=options.data_split)
        if options.eval_fraction is not None:
            halves = train_set.train_test_split(options.eval_fraction, seed=sft.seed)
            return halves["train"], halves["test"]
        if options.eval_data is None and options.eval_split is None:
            return train_set, None
        place, split = options.eval_data or options.data, options.eval_split or "train"
        name = options.data_name if options.eval_data is None else None
        return train_set, load(place, name=name, split=split)
    except (BadDataError, ValueError) as error:
        raise UserError(str(error)) from error


def _template(templates: TemplateOptions) -> PromptTemplate:
    """The templates; the two characters \\n mean a line break, which is hard to type in a shell."""
    given: dict[str, Any] = {n: v.replace("\\n", "\n") if isinstance(v, str) else v for n, v in asdict(templates).items()}
    try:
        return PromptTemplate(**given)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_folder(options: TrainOptions, sft: SFTConfig, peft: ModelConfig) -> None:
    check_output(
        Path(options.output),
        {"--model": options.model, "--shadow_model": options.shadow_model, "--data": options.data},
        resumes=sft.resume_from_checkpoint,
        overwrite=options.overwrite,
        export=options.export,
        shadow=not peft.use_peft,
    )


def _dropped(trainer: Any, train_set: Dataset, eval_set: Dataset | None) -> dict[str, int]:
    """What rows were for -> how many TRL dropped since truncation left nothing of them to learn."""
    if trainer.args.packing:
        return {}
    pairs = {"for training": (train_set, trainer.train_dataset), "for evaluation": (eval_set, trainer.eval_dataset)}
    lost = {purpose: len(given) - len(left) for purpose, (given, left) in pairs.items() if given is not None}
    return {purpose: count for purpose, count in lost.items() if count}


def _parts(options: TrainOptions) -> str:
    """The data for training and evaluation, in words."""
    learned = f"configuration {options.data_name}, " if options.data_name else ""
    if options.eval_fraction is not None:
        return f"{learned}split {options.data_split}, of which {options.eval_fraction:g} held out"
    place = f" of `{options.eval_data}`" if options.eval_data else ""
    evaluated = f"; evaluated on split {options.eval_split or 'train'}{place}" if place or options.eval_split else ""
    return f"{learned}split {options.data_split}{evaluated}"


def _facts(
    options: TrainOptions, trainer: Any, shadow: ShadowConfig, peft: ModelConfig, arguments: list[str], chat: bool
) -> RunFacts:
    examples = {"training": trainer.train_dataset, "evaluation": trainer.eval_dataset}
    return RunFacts(
        name=trainer.args.hub_model_id or portable(options.output),
        method="ShadowPEFT" if not peft.use_peft else "DoRA" if peft.use_dora else "LoRA",
        variant=None if peft.use_peft else shadow.variant,
        base=options.model,
        data=options.data,
        parts=_parts(options),
        examples={purpose: len(rows) for purpose, rows in examples.items() if rows is not None},
        trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        seed=trainer.args.seed,
        arguments=tuple(arguments),
        processes=trainer.args.world_size,
        chat=chat,
        class_names=_class_names(options, trainer.model),
        quantization=quantization_flags(peft),
    )


def _class_names(options: TrainOptions, model: Any) -> tuple[str, ...]:
    return tuple(model.config.id2label.values()) if options.task == "classification" else ()
