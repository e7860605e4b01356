"""What `shadow-peft train` says before and after a run: what is trained on what, then figures, files, the next command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from shadow_peft.checkpoint.folder import FILES as ADAPTER_FILES
from shadow_peft.cli.folders import CARD, EXPORT, checkpoints
from shadow_peft.cli.options import TrainOptions
from shadow_peft.cli.progress import in_words, losses_in_words
from shadow_peft.cli.screen import Row
from shadow_peft.tasks.base import ShadowTaskModel
from shadow_peft.training.card import PICTURE

LONGEST_PROMPT = 100
"""Characters of an example's prompt that the next command repeats."""

LOOKED_AT = 100
"""Examples among which a short prompt is looked for."""


def head(options: TrainOptions, trainer: Any, method: str, dropped: Mapping[str, int], steps: int) -> list[Row]:
    """What a run is, once the trainer has counted its steps.

    Args:
        options: of the command.
        trainer: made ready, with its datasets prepared.
        method: what is trained, such as "ShadowPEFT, variant 'readout'".
        dropped: what rows are for -> how many had nothing left to learn within the longest length.
        steps: optimizer steps.
    """
    model, args = trainer.model, trainer.args
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapted = isinstance(model, ShadowTaskModel)
    base = model.peft_model.base_model if adapted else model
    size = base.num_parameters() - (0 if adapted else trained)
    rows = f"{len(trainer.train_dataset):,} rows for training"
    if trainer.eval_dataset is not None:
        rows += f", {len(trainer.eval_dataset):,} for evaluation"
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs = steps * batch / len(trainer.train_dataset)
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device)
    processes = f", {args.world_size} processes" if args.world_size > 1 else ""
    computed = ", computed in bfloat16" if args.bf16 else ", computed in float16" if args.fp16 else ""
    return [
        ("base", f"{options.model} ({base.config.model_type}, {size:,} parameters, frozen)"),
        ("method", method),
        ("trained", f"{trained:,} parameters, {trained / max(1, size):.2%} of the base's"),
        ("data", f"{options.data}: {rows}"),
        *(("", f"{count:,} {purpose} dropped: their prompts alone fill --max_length") for purpose, count in dropped.items()),
        ("steps", f"{steps:,} of {batch} rows, {epochs:.3g} epochs"),
        ("device", f"{device}{processes}; base in {str(base.dtype).removeprefix('torch.')}{computed}"),
    ]


def tail(trainer: Any, output: Path, seconds: float, evaluation: Mapping[str, Any] | None, exported: bool) -> list[Row]:
    """What a run came to: the figures of the validation rows, or else the last ones of the training, and its files."""
    if evaluation is not None:
        figures = ("validation", in_words(evaluation, "eval_"))
    else:
        said = [losses_in_words(row) for row in trainer.state.log_history if "loss" in row]
        figures = ("training", (said or ["nothing was logged"])[-1])
    weights = sorted(path.name for path in output.iterdir() if path.name in ADAPTER_FILES and path.suffix == ".safetensors")
    results = [str(output / name) for name in ("all_results.json", PICTURE) if (output / name).is_file()]
    rows = [
        figures,
        ("time", f"{seconds:.0f} s"),
        ("adapter", f"{output}: {', '.join(weights)}, with its tokenizer"),
        ("model card", str(output / CARD)),
        ("metrics", ", ".join(results)),
    ]
    saved = checkpoints(output)
    if saved:
        rows.append(("checkpoints", f"{len(saved)}, latest {saved[-1]}"))
    if exported:
        rows.append(("shadow", f"{output / EXPORT}, a standalone model"))
    return rows


def next_command(output: str, rows: Dataset, use_peft: bool, quantization: str = "") -> str:
    """The command by which the trained model answers the prompt of an example."""
    prompt, chat = example_prompt(rows)
    place = f"--{'model' if use_peft else 'adapter'} {shlex.quote(output)} {quantization}".rstrip()
    dashes = "-- " if prompt.startswith("-") else ""
    return f"shadow-peft generate {place} {'--chat ' * chat}{dashes}{shlex.quote(prompt)}"


def example_prompt(rows: Dataset) -> tuple[str, bool]:
    """A short prompt of the data, line breaks written as `generate` reads them, and whether it is a turn of a chat."""
    for row in islice(rows, LOOKED_AT):
        prompt: Any = row.get("prompt", "")
        chat = isinstance(prompt, list)
        text = next((turn["content"] for turn in prompt if turn["role"] == "user"), "") if chat else prompt
        text = text or " ".join(row.get("text", "").split()[:5])
        if text.strip() and len(text) <= LONGEST_PROMPT:
            return text.replace("\n", "\\n"), chat
    return "Hello", isinstance(rows[0].get("prompt"), list)
