"""One run: a starting point is made, pretrained where it is, measured on text, fine-tuned, and measured on the task.

A run that was interrupted goes on from the checkpoint of its pretraining, or behind it; a fine-tuning starts again.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import AutoConfig, PreTrainedTokenizerBase

from benchmarks import devices
from benchmarks.starting_points.plan import Cell
from shadow_peft import ShadowConfig, ShadowForCausalLM
from shadow_peft.demo.embedded import BASE_PATH, SHADOW_PATH, load_base, load_tokenizer
from shadow_peft.demo.race import Contender, RaceSettings, race_shadow
from shadow_peft.demo.robot_commands import commands
from shadow_peft.demo.scoring import completion_loss
from shadow_peft.generation.drafting import DraftStatistics
from shadow_peft.pretraining.corpus import Corpus, blocks, open_corpus, split_blocks
from shadow_peft.pretraining.resume import newest_checkpoint
from shadow_peft.pretraining.shadows import ALONE, implicit_shadow
from shadow_peft.pretraining.student import Objective, Student
from shadow_peft.pretraining.trainer import PretrainingTrainer, Schedule, finished
from shadow_peft.storage.files import read_json, write_json

OBJECTIVES = {"next token": Objective(), "distilled": Objective(next_token=0.0, distillation=1.0)}
"""What the starting points that are pretrained learn."""

SCALES = (1.0, 0.3)
"""Rates of the shadow's backbone in fine-tuning, in units of the rate of what couples it to the base."""

BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison have in common.

    Attributes:
        corpus: files or folder of text, see `pretraining.corpus`.
        base: folder of the base and its tokenizer.
        shape: folder of a model whose layers, neurons and heads the shadow has.
        steps: of the pretraining.
        batch: blocks of a step.
        context: tokens of a block.
        held_out: blocks on which the shadow is measured.
        learning_rate: peak of the pretraining.
        tune_steps: of the fine-tuning, of eight commands each.
        commands: of the test split, and of the dev split.
        drafted: commands of the test split that are answered with drafts.
        draft_tokens: tokens of a draft.
    """

    corpus: Path
    base: Path = BASE_PATH
    shape: Path = SHADOW_PATH
    steps: int = 500
    batch: int = 8
    context: int = 256
    held_out: int = 64
    learning_rate: float = 4e-3
    tune_steps: int = 400
    commands: int = 300
    drafted: int = 60
    draft_tokens: int = 3


def base_hash(base: Path) -> str:
    """The first 12 digits of the SHA-256 over config, weights and tokenizer of a folder."""
    digest = hashlib.sha256()
    for name in BASE_FILES:
        digest.update((base / name).read_bytes())
    return digest.hexdigest()[:12]


def run(cell: Cell, settings: Settings, work: Path) -> dict[str, Any]:
    """All figures of a run.

    Args:
        cell: starting point and seed.
        settings: common to all runs.
        work: folder for checkpoints and models of this run alone.
    """
    torch.set_num_threads(1)
    started = time.process_time()
    shadow = pretrained(cell, settings, work)
    tuned = {f"{scale:g}": tune(cell.seed, settings, work, scale) for scale in SCALES}
    return {
        **asdict(cell), "base": base_hash(settings.base), "shadow": shadow, "tuned": tuned,
        "settings": {name: value for name, value in asdict(settings).items() if not isinstance(value, Path)},
        "cpu_seconds": round(time.process_time() - started, 1),
        "machine": devices.machine() | {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)},
    }  # fmt: skip


def pretrained(cell: Cell, settings: Settings, work: Path) -> dict[str, Any]:
    """Make the shadow in `work/start`, train it where that is its start, and measure it on text.

    Returns:
        `parameters` that are trained, `tokens` read, `held_out`: loss in nats per token, `cpu_seconds` of the process that
        finished it.
    """
    facts = work / "start.json"
    if facts.is_file():
        return read_json(facts)
    began = time.process_time()
    student, trainer = _trainer(cell, settings, work)
    steps = settings.steps if cell.start in OBJECTIVES else 0
    if steps:
        checkpoint = newest_checkpoint(work)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    result = {
        "parameters": sum(p.numel() for p in student.trained().values()),
        "tokens": steps * settings.batch * settings.context,
        "held_out": trainer.evaluate()["eval_loss"],
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    finished(student).save_pretrained(work / "start")
    write_json(result, facts)
    return result


def _trainer(cell: Cell, settings: Settings, work: Path) -> tuple[Student, PretrainingTrainer]:
    """The shadow as it is made, and what would train it."""
    base, tokenizer = load_base(settings.base), load_tokenizer(settings.base)
    stream, held_out = text(cell.seed, settings, tokenizer)
    config = replace(shape(settings.shape), shadow_init="random" if cell.start == "random" else "base")
    student = Student(implicit_shadow(base, config, cell.seed), OBJECTIVES.get(cell.start, Objective()))
    schedule = Schedule(
        max_steps=settings.steps, batch=settings.batch, learning_rate=settings.learning_rate,
        eval_steps=settings.steps, save_steps=max(1, settings.steps // 5), seed=cell.seed, use_cpu=True,
    )  # fmt: skip
    arguments = schedule.arguments(work, resumes=newest_checkpoint(work) is not None)
    arguments.disable_tqdm = True
    return student, PretrainingTrainer(student, arguments, stream, held_out)


def text(seed: int, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> tuple[IterableDataset, list[dict[str, Any]]]:
    """The blocks that a seed reads, which no other seed does, and those that are held out from all."""
    corpus = Corpus((str(settings.corpus),), settings.context, settings.held_out)
    stream, held_out = split_blocks(blocks(open_corpus(corpus), tokenizer, corpus.context), corpus.held_out)
    return stream.skip(seed * settings.steps * settings.batch), held_out


def shape(folder: Path) -> ShadowConfig:
    """An implicit shadow with the layers, neurons and heads of a stock model."""
    config: Any = AutoConfig.from_pretrained(folder)
    return ShadowConfig(
        num_shadow_layers=config.num_hidden_layers,
        shadow_init_layers="even",
        shadow_intermediate_size=config.intermediate_size,
        shadow_num_attention_heads=config.num_attention_heads,
        shadow_num_key_value_heads=config.num_key_value_heads,
        **ALONE,
    )


def tune(seed: int, settings: Settings, work: Path, scale: float) -> dict[str, Any]:
    """Fine-tune the shadow in `work/start` as the demo does, and measure it on the task.

    Returns:
        `attached` and `detached`: `loss` in nats per token and share of `exact` answers; `dev_loss` of the attached model;
        `drafts`, see `drafting`; `cpu_seconds`.
    """
    began = time.process_time()
    race = RaceSettings(
        base=settings.base, shadow_model=work / "start", steps=settings.tune_steps, test_commands=settings.commands,
        shadow_learning_rate_scale=scale, seed=seed,
    )  # fmt: skip
    output = work / f"tuned-{scale:g}"
    attached, detached = race_shadow(race, output, lambda line: None)
    model = ShadowForCausalLM.from_pretrained(load_base(settings.base), str(output / "adapter")).eval()
    tokenizer = load_tokenizer(settings.base)
    return {
        "attached": _scores(attached),
        "detached": _scores(detached),
        "dev_loss": completion_loss(model, tokenizer, commands("dev", settings.commands, seed)),
        "drafts": drafting(model, tokenizer, settings, seed),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def drafting(
    model: ShadowForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: Settings, seed: int
) -> dict[str, float | int]:
    """What becomes of drafts of a fixed length, answering commands one by one."""
    total = DraftStatistics()
    for command in commands("test", settings.drafted, seed):
        inputs = tokenizer(command.prompt, return_tensors="pt", return_token_type_ids=False)
        output: Any = model.generate(
            **inputs, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True,
            use_shadow_draft=True, num_assistant_tokens=settings.draft_tokens, num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )  # fmt: skip
        total.base_passes += output.draft_statistics.base_passes
        total.drafted += output.draft_statistics.drafted
        total.accepted += output.draft_statistics.accepted
    return {
        "base_passes": total.base_passes, "drafted": total.drafted, "accepted": total.accepted,
        "tokens_per_pass": total.tokens_per_base_pass, "acceptance": total.acceptance_rate,
    }  # fmt: skip


def _scores(contender: Contender) -> dict[str, float]:
    return {"loss": contender.scores.loss, "exact": contender.scores.exact_match}
