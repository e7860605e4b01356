"""One training for every method: transformers' Trainer on the loss that the model returns, completions only.

Every method sees the same rows in the same order (the task's examples, shuffled by the seed), padded on the right, in
float32 on one thread; only the learning rate is the method's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from benchmarks.quality.tasks import Example

IGNORE = -100
Row: TypeAlias = dict[str, list[int]]


@dataclass(frozen=True)
class Settings:
    """What every method shares."""

    steps: int = 125
    batch: int = 16
    warmup: int = 6


@dataclass(frozen=True)
class Cost:
    """What a training took, in wall-clock and processor seconds."""

    seconds: float
    cpu_seconds: float


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Tokens of prompt, completion and end, and labels for all but the prompt."""
    prompt = tokenizer(example["prompt"])["input_ids"]
    completion = [*tokenizer(example["completion"])["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [IGNORE] * len(prompt) + completion}


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Rows as tensors `[B, T]`, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": IGNORE}
    batch = {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows]) for name, fill in fills.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {**batch, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def in_order(rows: list[Row], settings: Settings, seed: int) -> list[Row]:
    """The rows of a whole training, in the order in which they are read."""
    wanted, order = settings.steps * settings.batch, list(rows)
    Random(seed).shuffle(order)
    return (order * (wanted // len(order) + 1))[:wanted]


def train(
    model: nn.Module,
    rows: list[Any],
    settings: Settings,
    rate: float,
    seed: int,
    groups: list[Any],
    collator: Callable[[list[Any]], dict[str, Tensor]] = collate,
    device: str = "cpu",
) -> Cost:
    """Train the parameters of the optimizer groups, whose rates belong to `rate`."""
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    arguments = TrainingArguments(
        output_dir="/tmp/unused", save_strategy="no", report_to="none", use_cpu=device == "cpu", max_steps=settings.steps,
        per_device_train_batch_size=settings.batch, learning_rate=rate, lr_scheduler_type="cosine",
        warmup_steps=settings.warmup, max_grad_norm=1.0, logging_strategy="no", disable_tqdm=True, seed=seed,
        train_sampling_strategy="sequential", remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=in_order(rows, settings, seed), data_collator=collator, optimizers=(optimizer, None)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = False  # the published packages do not know num_items_in_batch; one step is one batch
    started, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    return Cost(time.perf_counter() - started, time.process_time() - cpu)
