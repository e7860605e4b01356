"""`shadow-peft pretrain`: cuts a shadow out of a base and trains it on text, as a language model of its own."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from shadow_peft.cli.errors import InterruptedRunError, UserError, one_line
from shadow_peft.cli.loading import load_model, load_tokenizer
from shadow_peft.cli.options import OPTIONS, PretrainOptions
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.progress import TrainingProgress, in_words
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.cli.screen import Row, Screen
from shadow_peft.config import ShadowConfig
from shadow_peft.pretraining.corpus import Corpus, blocks, open_corpus, split_blocks
from shadow_peft.pretraining.cut import cut_shadow
from shadow_peft.pretraining.report import PretrainingFacts, write_report
from shadow_peft.pretraining.resume import changed_options, newest_checkpoint, store_options
from shadow_peft.pretraining.student import Objective, Student
from shadow_peft.pretraining.trainer import PretrainingTrainer, Schedule, save_finished

DESCRIPTION = """Cuts a shadow out of a base and trains it on text, as a language model of its own.

Its embeddings and head are the base's and stay frozen. It learns the text (--next_token_weight), the base's own next-token
distribution (--distillation_weight), or both. --data are files of lines {"text": ...} (.jsonl, .json, .csv, .parquet) or of
plain text (.txt), folders of them, or a dataset on the hub; they are streamed and need not fit into memory."""
EXAMPLES = """examples:
  shadow-peft pretrain --model ./base --data corpus --output shadow --max_steps 2000
  shadow-peft pretrain --model ./base --data corpus --output shadow --max_steps 2000 --resume
  shadow-peft pretrain --model ./base --data a.jsonl b.txt --output distilled \\
      --max_steps 2000 --distillation_weight 1
  shadow-peft train --model ./base --shadow_model shadow --share_embeddings \\
      --data commands.jsonl --output out
"""


def run(arguments: list[str]) -> None:
    """Parse the options, cut, train and save."""
    options, _ = parse(VerbParser("pretrain", OPTIONS["pretrain"], DESCRIPTION, EXAMPLES), arguments)
    checkpoint = _checkpoint(options)
    with quiet_libraries():
        _pretrain(options, checkpoint, arguments)


def _pretrain(options: PretrainOptions, checkpoint: Path | None, arguments: list[str]) -> None:
    screen, output = Screen(), Path(options.output)
    tokenizer = load_tokenizer(options.model)
    base = load_model(options.model, dtype=options.dtype)
    try:
        student = Student(cut_shadow(base, _cut(options), options.seed), _objective(options))
        with screen.working(f"reading {' '.join(options.data)}"):
            corpus = _corpus(options)
            stream, held_out = split_blocks(blocks(open_corpus(corpus), tokenizer, corpus.context), corpus.held_out)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(one_line(error)) from error
    if options.compile:
        student.model.shadow_model.compile()
    schedule = _schedule(options)
    trainer = PretrainingTrainer(student, schedule.arguments(output, resumes=checkpoint is not None), stream, held_out)
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    progress = TrainingProgress(screen, partial(_head, options, trainer), bars=True)
    trainer.add_callback(progress)
    store_options(output, asdict(options))
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        raise InterruptedRunError(_how_to_go_on(options, progress, arguments)) from None
    finally:
        progress.close()
    seconds = time.perf_counter() - started
    evaluation = trainer.evaluate()
    save_finished(student, tokenizer, output)
    write_report(output, _facts(options, trainer, arguments, seconds), trainer.state.log_history)
    screen.panel("done", _tail(output, seconds, evaluation))
    use = ["--model", options.model, "--shadow_model", options.output, "--share_embeddings", "--data", "data.jsonl"]
    screen.command("use it", f"shadow-peft train {shlex.join(use)} --output out")


def _checkpoint(options: PretrainOptions) -> Path | None:
    """The checkpoint to resume from.

    Raises:
        UserError: the output folder cannot be used, or belongs to a run with other options.
    """
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return None
    if not options.resume:
        raise UserError(f"--output {output} is not empty; give another folder, or --resume to go on with the run in it")
    try:
        changed = changed_options(output, asdict(options))
    except ValueError as error:
        raise UserError(f"--output {output} holds no run to resume: {one_line(error)}") from error
    if changed:
        named = ", ".join(f"--{name}" for name in changed)
        raise UserError(f"--output {output} holds a run with another {named}; resume with the options that it began with")
    return newest_checkpoint(output)


def _cut(options: PretrainOptions) -> ShadowConfig:
    return ShadowConfig(
        num_shadow_layers=options.num_shadow_layers,
        shadow_init=options.shadow_init,
        shadow_init_layers=options.shadow_init_layers,
        shadow_intermediate_size=options.shadow_intermediate_size,
        shadow_num_attention_heads=options.shadow_num_attention_heads,
        shadow_num_key_value_heads=options.shadow_num_key_value_heads,
        injection_hidden_size=1,  # what couples a shadow to its base has no part in its pretraining
        gate_hidden_size=2,
    )


def _objective(options: PretrainOptions) -> Objective:
    return Objective(options.next_token_weight, options.distillation_weight, options.top_k)


def _corpus(options: PretrainOptions) -> Corpus:
    return Corpus(
        places=tuple(options.data),
        context=options.context,
        held_out=options.held_out,
        seed=options.seed,
        buffer=options.shuffle_buffer,
        column=options.text_column,
        name=options.data_name,
        split=options.data_split,
    )


def _schedule(options: PretrainOptions) -> Schedule:
    return Schedule(
        max_steps=options.max_steps,
        batch=options.per_device_train_batch_size,
        accumulation=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        decay_fraction=options.decay_fraction,
        weight_decay=options.weight_decay,
        eval_steps=options.eval_steps,
        save_steps=options.save_steps,
        logging_steps=options.logging_steps,
        seed=options.seed,
        use_cpu=options.use_cpu,
    )


def _tokens_per_step(options: PretrainOptions, trainer: Any) -> int:
    blocks_per_step = options.per_device_train_batch_size * options.gradient_accumulation_steps * trainer.args.world_size
    return blocks_per_step * options.context


def _head(options: PretrainOptions, trainer: Any, steps: int) -> list[Row]:
    student = trainer.model
    base, trained = student.model.base_model, sum(p.numel() for p in student.trained().values())
    learns = [
        f"{name} ({weight:g})"
        for name, weight in (
            ("next token", options.next_token_weight),
            ("the base's distribution", options.distillation_weight),
        )
        if weight
    ]
    per_step = _tokens_per_step(options, trainer)
    device = torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else str(trainer.args.device)
    return [
        ("base", f"{options.model} ({base.config.model_type}, {base.num_parameters():,} parameters, frozen)"),
        (
            "shadow",
            f"{options.num_shadow_layers} layers, {trained:,} parameters, trained; embeddings and head are the base's",
        ),
        ("learns", ", ".join(learns)),
        ("text", f"{', '.join(options.data)}; {options.held_out} blocks held out"),
        ("steps", f"{steps:,} of {per_step:,} tokens, {steps * per_step:,} in all"),
        ("device", f"{device}; computed in {str(base.dtype).removeprefix('torch.')}"),
    ]


def _tail(output: Path, seconds: float, evaluation: dict[str, Any]) -> list[Row]:
    written = sorted(path.name for path in output.iterdir() if path.is_file())
    return [
        ("held out", in_words(evaluation, "eval_")),
        ("time", f"{seconds:.0f} s"),
        ("shadow", f"{output}: {', '.join(written)}"),
    ]


def _facts(options: PretrainOptions, trainer: Any, arguments: list[str], seconds: float) -> PretrainingFacts:
    return PretrainingFacts(
        base=options.model,
        data=options.data,
        options=asdict(options),
        arguments=arguments,
        trained=sum(p.numel() for p in trainer.model.trained().values()),
        tokens_per_step=_tokens_per_step(options, trainer),
        seconds=seconds,
    )


def _how_to_go_on(options: PretrainOptions, progress: TrainingProgress, arguments: list[str]) -> str:
    where = f"interrupted after step {progress.step} of {progress.steps}"
    if newest_checkpoint(Path(options.output)) is None:
        return f"{where}, before the first checkpoint; --save_steps N saves one every N steps"
    again = arguments if options.resume else [*arguments, "--resume"]
    return f"{where}; go on with: shadow-peft pretrain {shlex.join(again)}"
