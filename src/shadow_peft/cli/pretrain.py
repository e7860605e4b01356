"""`shadow-peft pretrain`: makes a shadow of a base and trains it on text, as a language model of its own."""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from shadow_peft.backbone.projection import Reconstruction
from shadow_peft.cli.errors import InterruptedRunError, UserError, one_line
from shadow_peft.cli.loading import load_complete, load_model, load_tokenizer
from shadow_peft.cli.options import OPTIONS
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.pretrain_options import PretrainOptions
from shadow_peft.cli.progress import TrainingProgress, in_words
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.cli.screen import Row, Screen
from shadow_peft.config import ShadowConfig
from shadow_peft.pretraining.corpus import Corpus, blocks, open_corpus, split_blocks
from shadow_peft.pretraining.report import PretrainingFacts, fit_in_words, next_command, write_report
from shadow_peft.pretraining.resume import changed_options, newest_checkpoint, store_options
from shadow_peft.pretraining.shadows import ALONE, implicit_shadow, shares_embeddings, small_shadow
from shadow_peft.pretraining.student import AlignedStudent, Objective, Student
from shadow_peft.pretraining.teacher_cache import TeacherCache, TeacherFacts, digest
from shadow_peft.pretraining.teacher_cache import fill as fill_cache
from shadow_peft.pretraining.trainer import PretrainingTrainer, Schedule, save_finished

DESCRIPTION = """Makes a shadow of a base and trains it on text, as a language model of its own.

The shadow is made of layers of the base, and of these the strongest neurons and heads. Or it is a small model (--small),
with a fitted projection to the base's head. Embeddings and head are frozen. It learns the text (--next_token_weight), the
base's next-token distribution (--distillation_weight), or both; with --align, the projection of a small model alone learns
what the small model's own head says. --data are files of lines {"text": ...} (.jsonl, .json, .csv, .parquet) or of plain
text (.txt), folders of them, or a dataset on the hub; they are streamed and need not fit into memory."""
EXAMPLES = """examples:
  shadow-peft pretrain --model ./base --data corpus --output shadow --max_steps 2000
  shadow-peft pretrain --model ./base --data corpus --output shadow --max_steps 2000 --resume
  shadow-peft pretrain --model ./base --data a.jsonl b.txt --output distilled \\
      --max_steps 2000 --distillation_weight 1
  shadow-peft pretrain --model Qwen/Qwen3-8B --small Qwen/Qwen3-0.6B --align \\
      --data corpus --output aligned --max_steps 500
  shadow-peft train --model ./base --shadow_model shadow --share_embeddings \\
      --data commands.jsonl --output out
"""

TEXT_OF_DIRECTIONS = 32
"""Blocks on which the directions of a narrower shadow are found."""


def run(arguments: list[str]) -> None:
    """Parse the options, make the shadow, train and save."""
    options, _ = parse(VerbParser("pretrain", OPTIONS["pretrain"], DESCRIPTION, EXAMPLES), arguments)
    checkpoint = _checkpoint(options)
    with quiet_libraries():
        _pretrain(options, checkpoint, arguments)


def _pretrain(options: PretrainOptions, checkpoint: Path | None, arguments: list[str]) -> None:
    screen, output = Screen(), Path(options.output)
    tokenizer = load_tokenizer(options.model)
    base = load_model(options.model, dtype=options.dtype)
    try:
        with screen.working(f"reading {' '.join(options.data)}"):
            corpus = _corpus(options)
            stream, held_out = split_blocks(blocks(open_corpus(corpus), tokenizer, corpus.context), corpus.held_out)
        student, fit = _student(options, base, len(tokenizer), stream)
        if not options.include_embeddings and not shares_embeddings(student.model):
            raise ValueError("--no_include_embeddings: the embeddings of this shadow are its own, and not the base's")
        trainer = _trainer(options, student, stream, held_out, resumes=checkpoint is not None)
        if options.teacher_cache is not None:
            student.cache = _teacher_cache(options, student, stream, trainer, screen)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(one_line(error)) from error
    progress = TrainingProgress(screen, partial(_head, options, trainer, fit), bars=True)
    trainer.add_callback(progress)
    is_main = trainer.is_world_process_zero()
    if is_main:
        store_options(output, asdict(options))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        raise InterruptedRunError(_how_to_go_on(options, progress, arguments)) from None
    finally:
        progress.close()
    seconds = trainer.seconds()
    evaluation = trainer.evaluate()
    if is_main:
        save_finished(student, tokenizer, output, options.include_embeddings)
        write_report(output, _facts(options, trainer, arguments, seconds, fit), trainer.state.log_history)
    trainer.accelerator.wait_for_everyone()
    screen.panel("done", _tail(output, seconds, evaluation))
    screen.command("use it", next_command(options.model, options.output, shares_embeddings(student.model)))


def _student(
    options: PretrainOptions, base: Any, tokens: int, stream: IterableDataset
) -> tuple[Student, Reconstruction | None]:
    """What is trained, and how well the projection of a small model was fitted."""
    if options.small is None:
        text = (torch.tensor([row["input_ids"]]) for row in stream.take(TEXT_OF_DIRECTIONS))
        model = implicit_shadow(base, _implicit_config(options), options.seed, text)
        student, fit = Student(model, _objective(options)), None
    else:
        small = load_complete(options.small, may_lack_embeddings=options.share_embeddings, dtype=options.dtype)
        known = small.get_input_embeddings().weight.shape[0]
        if known < tokens:
            raise ValueError(f"--small {options.small} knows {known} tokens, the base's tokenizer has {tokens}")
        made = small_shadow(base, small, tokens, options.share_embeddings)
        if not options.align:
            student = Student(made.model, _objective(options))
        elif made.own_head is None:
            raise ValueError(f"--align: {options.small} has no head of its own to learn from, but a projection already")
        else:
            student = AlignedStudent(made.model, _objective(options), made.own_head)
        fit = made.fit
    if options.compile:
        student.model.shadow_model.compile()
    return student, fit


def _trainer(
    options: PretrainOptions, student: Student, stream: IterableDataset, held_out: list[dict[str, Any]], resumes: bool
) -> PretrainingTrainer:
    arguments = _schedule(options).arguments(Path(options.output), resumes=resumes)
    trainer = PretrainingTrainer(student, arguments, stream, held_out)
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    return trainer


def _teacher_cache(
    options: PretrainOptions, student: Student, stream: IterableDataset, trainer: PretrainingTrainer, screen: Screen
) -> TeacherCache:
    """The cache of what the base teaches, with all blocks that the training reads.

    Raises:
        ValueError: it was made from something else, or several processes would write it.
    """
    folder, device = Path(options.teacher_cache or ""), trainer.args.device
    facts = TeacherFacts(digest(student.model.base_model), options.context, options.top_k)
    if trainer.args.world_size > 1:
        raise ValueError("--teacher_cache is for one process")
    needed = options.max_steps * _tokens_per_step(options, trainer) // options.context
    student.eval()
    fill_cache(
        folder,
        facts,
        stream,
        needed,
        lambda ids: student.teacher(ids.to(device)),
        options.per_device_train_batch_size,
        lambda done: screen.line(f"teacher: {done:,} blocks of {needed:,} at most are in {folder}"),
    )
    return TeacherCache(folder, facts)


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
        changed = changed_options(output, asdict(options), {field.name: field.default for field in fields(options)})
    except ValueError as error:
        raise UserError(f"--output {output} holds no run to resume: {one_line(error)}") from error
    if changed:
        named = ", ".join(f"--{name}" for name in changed)
        raise UserError(f"--output {output} holds a run with another {named}; resume with the options that it began with")
    return newest_checkpoint(output)


def _implicit_config(options: PretrainOptions) -> ShadowConfig:
    return ShadowConfig(
        num_shadow_layers=options.num_shadow_layers,
        shadow_init=options.shadow_init,
        shadow_init_layers=options.shadow_init_layers,
        shadow_hidden_size=options.shadow_hidden_size,
        shadow_intermediate_size=options.shadow_intermediate_size,
        shadow_num_attention_heads=options.shadow_num_attention_heads,
        shadow_num_key_value_heads=options.shadow_num_key_value_heads,
        **ALONE,
    )


def _objective(options: PretrainOptions) -> Objective:
    return Objective(*options.weights, options.top_k)


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


def _head(options: PretrainOptions, trainer: Any, fit: Reconstruction | None, steps: int) -> list[Row]:
    student = trainer.model
    base, trained = student.model.base_model, sum(p.numel() for p in student.trained().values())
    teacher = "its own head's distribution" if options.align else "the base's distribution"
    learns = [
        f"{name} ({weight:g})" for name, weight in zip(("next token", teacher), options.weights, strict=True) if weight
    ]
    per_step = _tokens_per_step(options, trainer)
    device = torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else str(trainer.args.device)
    layers = options.small or f"{options.num_shadow_layers} layers of the base"
    rows = [
        ("base", f"{options.model} ({base.config.model_type}, {base.num_parameters():,} parameters, frozen)"),
        ("shadow", f"{layers}; {trained:,} parameters are trained, no embeddings and no head"),
        *([("projection", fit_in_words(fit))] if fit is not None else []),
        ("learns", ", ".join(learns)),
        ("text", f"{', '.join(options.data)}; {options.held_out} blocks held out"),
        ("steps", f"{steps:,} of {per_step:,} tokens, {steps * per_step:,} in all"),
        ("device", f"{device}; computed in {str(base.dtype).removeprefix('torch.')}"),
    ]
    return rows


def _tail(output: Path, seconds: float, evaluation: dict[str, Any]) -> list[Row]:
    written = sorted(path.name for path in output.iterdir() if path.is_file())
    return [
        ("held out", in_words(evaluation, "eval_")),
        ("time", f"{seconds:.0f} s"),
        ("shadow", f"{output}: {', '.join(written)}"),
    ]


def _facts(
    options: PretrainOptions, trainer: Any, arguments: list[str], seconds: float, fit: Reconstruction | None
) -> PretrainingFacts:
    return PretrainingFacts(
        base=options.model,
        small=options.small,
        data=options.data,
        licence=options.data_licence,
        options=asdict(options),
        arguments=arguments,
        trained=sum(p.numel() for p in trainer.model.trained().values()),
        tokens_per_step=_tokens_per_step(options, trainer),
        seconds=seconds,
        fit=fit,
        shares_embeddings=shares_embeddings(trainer.model.model),
    )


def _how_to_go_on(options: PretrainOptions, progress: TrainingProgress, arguments: list[str]) -> str:
    where = f"interrupted after step {progress.step} of {progress.steps}"
    if newest_checkpoint(Path(options.output)) is None:
        return f"{where}, before the first checkpoint; --save_steps N saves one every N steps"
    again = arguments if options.resume else [*arguments, "--resume"]
    return f"{where}; go on with: shadow-peft pretrain {shlex.join(again)}"
