"""`shadow-peft train`: fine-tunes a causal language model with a shadow, or with LoRA as a baseline, on any data."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from shadow_peft.cli import summary
from shadow_peft.cli.errors import InterruptedRunError, UserError, one_line
from shadow_peft.cli.folders import check_output, checkpoint_to_resume, checkpoints, clear, what_is_missing
from shadow_peft.cli.loading import check_place, load_model, load_shadow, load_tokenizer, use_chat_template
from shadow_peft.cli.options import DEFAULT_SHADOW, OPTIONS, TemplateOptions, TrainOptions
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.progress import TrainingProgress
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.cli.refusals import check_options, check_template
from shadow_peft.cli.screen import Screen
from shadow_peft.config import ShadowConfig
from shadow_peft.model import get_shadow_model
from shadow_peft.tasks.causal_lm import ShadowForCausalLM
from shadow_peft.training.card import RunFacts, portable, write_card
from shadow_peft.training.examples import BadDataError
from shadow_peft.training.sft import ShadowSFTTrainer
from shadow_peft.training.sources import load_examples
from shadow_peft.training.templates import PromptTemplate

DESCRIPTION = """Fine-tunes a causal language model with a shadow, or with LoRA as a baseline.

--data is a file (.jsonl, .json, .csv, .parquet), a folder or a dataset of the hub. Its rows are
  {"prompt": ..., "completion": ...}    the completion is learned
  {"messages": [...]}                   the last turn is learned; also {"conversations": [...]} of ShareGPT
  {"text": ...}                         all of it is learned
or become prompts and completions by the templates --prompt and --completion over their columns."""
EXAMPLES = """examples:
  shadow-peft train --model Qwen/Qwen3-0.6B --data commands.jsonl --output out
  shadow-peft train --model Qwen/Qwen3-0.6B --data chat.jsonl --eval_data held-out.jsonl --output out/chat --export
  shadow-peft train --model ./base --data texts.jsonl --output out/texts --num_shadow_layers 2 --learning_rate 5e-4
  shadow-peft train --model Qwen/Qwen3-8B --shadow_model Qwen/Qwen3-0.6B --data commands.jsonl --output out/explicit
  shadow-peft train --config recipes/gsm8k.yaml
  shadow-peft train --config recipes/gsm8k.yaml --resume_from_checkpoint last
  shadow-peft train --config recipes/gsm8k.yaml --overwrite --early_stopping_patience 1
  shadow-peft train --config recipes/gsm8k.yaml --use_peft --use_dora --output out/dora
  accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m shadow_peft.cli train --config recipes/gsm8k.yaml
"""

#: Defaults of SFTConfig and ModelConfig that suit an adapter; everything else is TRL's. Every part of it gets a gradient in
#: every step, so DDP need not look for parameters without one.
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
    """Parses the options, checks all data, trains and saves."""
    options, templates, shadow, sft, peft, _ = parse(make_train_parser(), arguments)
    sft.resume_from_checkpoint, skipped = checkpoint_to_resume(sft.resume_from_checkpoint, options.output)
    check_options(options, shadow, sft, peft)
    _check_folder(options, sft)
    for place in filter(None, (options.model, options.shadow_model)):
        check_place(place)
    screen = Screen(silent=sft.process_index != 0)
    screen.line(method_line(shadow, peft))
    for line in skipped if sft.process_index == 0 else ():
        print(f"note: {line}", file=sys.stderr)
    with quiet_libraries():
        _train(options, _template(templates), shadow, sft, peft, arguments, screen)


def _train(
    options: TrainOptions,
    template: PromptTemplate,
    shadow: ShadowConfig,
    sft: SFTConfig,
    peft: ModelConfig,
    arguments: list[str],
    screen: Screen,
) -> None:
    """The run itself, once its options are checked."""
    sft.output_dir = options.output
    sft.dataloader_pin_memory = sft.dataloader_pin_memory and sft.device.type != "cpu"  # torch warns of it on a CPU
    with screen.working(f"reading {options.data}"):
        train_set, eval_set = _data(options, template, sft)
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
    trainer.facts = _facts(options, trainer, shadow, peft, arguments, chat=summary.example_prompt(train_set)[1])
    head = partial(summary.head, options, trainer, method(shadow, peft), _dropped(trainer, train_set, eval_set))
    progress = show_progress(trainer, screen, TrainingProgress(screen, head, bars=not sft.disable_tqdm))
    if options.overwrite and trainer.is_world_process_zero():
        clear(Path(options.output))
    started = time.perf_counter()
    evaluation = fit(trainer, sft.resume_from_checkpoint, progress, arguments)
    save(trainer, tokenizer, Path(options.output), options.export)
    seconds = time.perf_counter() - started
    screen.panel("done", summary.tail(trainer, Path(options.output), seconds, evaluation, options.export))
    screen.command("try it", summary.next_command(options.output, train_set, peft.use_peft))


def make_train_parser() -> VerbParser:
    """The parser: this verb's options, ShadowConfig's and TRL's with defaults that suit an adapter."""
    parser = VerbParser("train", [*OPTIONS["train"], SFTConfig, ModelConfig], DESCRIPTION, EXAMPLES)
    parser.set_defaults(**DEFAULTS, bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    return parser


def method(shadow: ShadowConfig, peft: ModelConfig) -> str:
    """What is trained, by which mathematics."""
    if peft.use_peft:
        return f"{'DoRA' if peft.use_dora else 'LoRA'} of rank {peft.lora_r}"
    return f"ShadowPEFT, variant {shadow.variant!r}"


def method_line(shadow: ShadowConfig, peft: ModelConfig) -> str:
    """The first line of output."""
    if peft.use_peft:
        return f"training {method(shadow, peft)}"
    other = {"readout": "published", "published": "readout", "peft": "published"}[shadow.variant]
    return f"training {method(shadow, peft)} (for the other mathematics: --variant {other})"


def build(options: TrainOptions, shadow: ShadowConfig, peft: ModelConfig, tokens: int) -> PreTrainedModel:
    """The base with a fresh shadow; with `--use_peft` the base alone, to which TRL's trainer adds LoRA."""
    kwargs: dict[str, Any] = {"revision": peft.model_revision, "dtype": peft.dtype}
    if peft.attn_implementation is not None:
        kwargs["attn_implementation"] = peft.attn_implementation
    try:
        quantization = get_quantization_config(peft)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot quantize the base: {one_line(error)}") from error
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    base: PreTrainedModel = load_model(options.model, **kwargs)
    if peft.use_peft:
        return base
    brought = None
    if options.shadow_model is not None:
        brought = load_shadow(options.shadow_model, base, tokens, options.share_embeddings, dtype=peft.dtype)
    try:
        weights = {name: getattr(options, name) for name in ShadowForCausalLM.loss_settings}
        return ShadowForCausalLM(get_shadow_model(base, shadow, shadow_model=brought), **weights)
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot give {options.model!r} such a shadow: {one_line(error)}") from error


class _WithCard:
    """A trainer whose model card is ours, wherever TRL writes one."""

    facts: RunFacts | None = None
    args: Any
    state: Any

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write the card with the figures so far; one process does."""
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
    """TRL's supervised fine-tuning: of the shadow with the model's own loss, or of LoRA with TRL's.

    Raises:
        UserError: options that the trainer refuses, such as a tracker that is not installed; no row with anything to learn.
    """
    arguments: dict[str, Any] = {
        "train_dataset": train_set,
        "eval_dataset": eval_set,
        "processing_class": tokenizer,
        "callbacks": _callbacks(options, sft),
    }
    try:
        if peft.use_peft:
            trainer: Any = _BaselineTrainer(model, sft, peft_config=get_peft_config(peft), **arguments)
        else:
            scale = options.shadow_learning_rate_scale
            trainer = _ShadowTrainer(model, sft, shadow_learning_rate_scale=scale, **arguments)
    except (ValueError, TypeError, RuntimeError, ImportError, LookupError, AttributeError, OSError) as error:
        raise UserError(f"cannot train with these options: {one_line(error)}") from error
    for purpose, rows in (("learn", trainer.train_dataset), ("evaluate on", trainer.eval_dataset)):
        if rows is not None and len(rows) == 0:
            raise UserError(
                f"no row is left to {purpose}: all prompts alone fill --max_length {sft.max_length} tokens; raise it"
            )
    return trainer


def show_progress(trainer: Any, screen: Screen, progress: TrainingProgress) -> TrainingProgress:
    """Our bar or lines in the place of transformers'."""
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    trainer.add_callback(progress)
    return progress


def fit(trainer: Any, checkpoint: str | None, progress: TrainingProgress, arguments: list[str]) -> dict[str, Any] | None:
    """Trains, evaluates once more at the end, and writes the metrics; gives those of the evaluation.

    Raises:
        UserError: options that show only when the first step is made, such as the optimizer's.
        InterruptedRunError: Ctrl-C.
    """
    evaluation = None
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_metrics("train", result.metrics)
        if trainer.eval_dataset is not None:
            evaluation = trainer.evaluate()
            trainer.save_metrics("eval", evaluation)
        trainer.save_state()
    except KeyboardInterrupt:
        raise InterruptedRunError(_how_to_go_on(trainer, progress, arguments)) from None
    except (ValueError, TypeError, RuntimeError, ImportError, LookupError, ArithmeticError) as error:
        if progress.moved:
            raise  # no option is to blame for what the first step could do
        raise UserError(f"the training does not start: {one_line(error)}") from error
    finally:
        progress.close()
    return evaluation


def _how_to_go_on(trainer: Any, progress: TrainingProgress, arguments: list[str]) -> str:
    """One line: where the run stopped, and the command that resumes it."""
    where = f"interrupted after step {progress.step} of {progress.steps}"
    if any(what_is_missing(folder) is None for folder in checkpoints(Path(trainer.args.output_dir))):
        resumed = shlex.join([*_without_resuming(arguments), "--resume_from_checkpoint", "last"])
        launched = "the same launcher and: " if trainer.args.world_size > 1 else ""
        return f"{where}; go on with: {launched}shadow-peft train {resumed}"
    return f"{where}, before the first checkpoint, so there is nothing to resume; --save_steps N saves one every N steps"


def save(trainer: Any, tokenizer: PreTrainedTokenizerBase, output: Path, export: bool) -> None:
    """Adapter, tokenizer and card into `output`; with `export`, the shadow as a model of its own into `output/shadow`."""
    if trainer.is_fsdp_enabled:  # checkpoints may be sharded, an adapter is one file
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output), _internal_call=True)
    if export and trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).export_shadow().save_pretrained(output / "shadow")
        tokenizer.save_pretrained(output / "shadow")
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _data(options: TrainOptions, template: PromptTemplate, sft: SFTConfig) -> tuple[Dataset, Dataset | None]:
    """The checked examples to learn and to evaluate on; whatever column plain text stood in, it is in `text` then."""
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
    """The templates; the two characters \\n stand for a line break, which a shell cannot give."""
    given: dict[str, Any] = {n: v.replace("\\n", "\n") if isinstance(v, str) else v for n, v in asdict(templates).items()}
    try:
        return PromptTemplate(**given)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_folder(options: TrainOptions, sft: SFTConfig) -> None:
    check_output(
        Path(options.output),
        {"--model": options.model, "--shadow_model": options.shadow_model, "--data": options.data},
        resumes=sft.resume_from_checkpoint,
        overwrite=options.overwrite,
        export=options.export,
    )


def _dropped(trainer: Any, train_set: Dataset, eval_set: Dataset | None) -> dict[str, int]:
    """What rows were for -> how many TRL dropped since truncation left nothing of them to learn."""
    if trainer.args.packing:
        return {}
    pairs = {"to learn": (train_set, trainer.train_dataset), "to evaluate on": (eval_set, trainer.eval_dataset)}
    lost = {purpose: len(given) - len(left) for purpose, (given, left) in pairs.items() if given is not None}
    return {purpose: count for purpose, count in lost.items() if count}


def _without_resuming(arguments: list[str]) -> list[str]:
    """The arguments without those that say where a run begins."""
    kept: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name = argument.partition("=")[0].replace("-", "_")
        if name == "__resume_from_checkpoint":
            waiting = waiting if "=" in argument else waiting[1:]
        elif name == "__overwrite":
            waiting = waiting[1:] if waiting and waiting[0].lower() in ("true", "false") else waiting
        else:
            kept.append(argument)
    return kept


def _callbacks(options: TrainOptions, sft: SFTConfig) -> list[EarlyStoppingCallback]:
    """Early stopping, if asked for; it keeps the best checkpoint, so both strategies must agree."""
    if options.early_stopping_patience is None:
        return []
    sft.load_best_model_at_end = True
    sft.metric_for_best_model = sft.metric_for_best_model or "eval_loss"
    sft.greater_is_better = bool(sft.greater_is_better)
    return [EarlyStoppingCallback(options.early_stopping_patience, options.early_stopping_threshold)]


def _parts(options: TrainOptions) -> str:
    """What was learned and evaluated on, in words."""
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
    )
