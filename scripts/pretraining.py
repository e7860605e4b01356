"""What the two pretraining scripts share: blocks of tokens, a training with a late decay, a curve beside the weights."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT_BLOCKS = 128
LICENCE_NOTE = (
    "Weights and tokenizer: Apache-2.0, made by this project's scripts/{script}. Training text: what "
    "scripts/registry_text.py lists (help and docstrings of Python and of installed packages, WordNet 3.0, "
    "chitchat-dataset, passages of Wikipedia and OpenWebText), each under its own licence, and text that "
    "scripts/invented_text.py writes. No text of others is stored here."
)


@dataclass
class Schedule:
    """Where the result goes and how long it is trained."""

    output: Path = field(metadata={"help": "Folder of the finished model."})
    work: Path = field(metadata={"help": "Folder of the training checkpoints."})
    steps: int = field(metadata={"help": "Optimizer steps that the learning rate is planned for."})
    stop_at: int = field(metadata={"help": "Step after which training ends, before the plan does."})
    learning_rate: float = field(metadata={"help": "Peak learning rate (AdamW)."})
    batch: int = field(default=16, metadata={"help": "Blocks per step."})
    micro_batch: int = field(default=8, metadata={"help": "Blocks per backward pass (8 are faster than 16 on a CPU)."})
    context: int = field(default=256, metadata={"help": "Tokens per block."})
    seed: int = field(default=0, metadata={"help": "Seed of text, weights and order."})
    compile: bool = field(default=False, metadata={"help": "Use torch.compile (twice as fast; needs a C++ compiler)."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in --work."})


def pack(documents: list[str], tokenizer: PreTrainedTokenizerBase, context: int) -> Dataset:
    """One stream of tokens, documents parted by ``<eos>``, cut into blocks ``[context]``."""
    end = [tokenizer.eos_token_id]
    parts = (documents[i : i + 10_000] for i in range(0, len(documents), 10_000))
    rows = (row + end for part in parts for row in tokenizer(part, verbose=False)["input_ids"])
    stream = np.fromiter(chain.from_iterable(rows), dtype=np.int32)
    blocks = stream[: len(stream) // context * context].reshape(-1, context)
    return Dataset.from_dict({"input_ids": blocks})


def training_arguments(schedule: Schedule) -> TrainingArguments:
    """AdamW, warm-up, constant rate, cosine decay over the last quarter; processes of torchrun share a step's blocks."""
    return TrainingArguments(
        output_dir=str(schedule.work), max_steps=schedule.steps, learning_rate=schedule.learning_rate, weight_decay=0.1,
        per_device_train_batch_size=schedule.micro_batch, per_device_eval_batch_size=schedule.micro_batch,
        gradient_accumulation_steps=schedule.batch // schedule.micro_batch // int(os.environ.get("WORLD_SIZE", 1)),
        adam_beta2=0.95, lr_scheduler_type="warmup_stable_decay", warmup_steps=200,
        lr_scheduler_kwargs={"num_decay_steps": schedule.steps // 4}, bf16=True, use_cpu=True,
        logging_steps=50, eval_strategy="steps", eval_steps=250, save_steps=250, save_total_limit=2,
        seed=schedule.seed, data_seed=schedule.seed, dataloader_drop_last=True, report_to="none",
        torch_compile=schedule.compile, prediction_loss_only=True,
    )  # fmt: skip


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Blocks `[B, T]`, which are their own labels."""
    ids = torch.stack([row["input_ids"] for row in rows]).long()
    return {"input_ids": ids, "labels": ids}


class StopAt(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        control.should_training_stop |= state.global_step >= self.step
        return control


def pretrain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, schedule: Schedule) -> None:
    """Train on blocks of tokens; write the finished model in bfloat16, with tokenizer, licence note and loss curve."""
    held_out, train = data.select(range(HELD_OUT_BLOCKS)), data.select(range(HELD_OUT_BLOCKS, len(data)))
    facts: dict[str, object] = {
        "parameters": model.num_parameters(), "train_tokens": len(train) * schedule.context,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "command": " ".join(["python", "scripts/" + script(), *sys.argv[1:]]),
    }  # fmt: skip
    print(facts, flush=True)
    trainer = Trainer(
        model,
        training_arguments(schedule),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collate,
        callbacks=[StopAt(schedule.stop_at)],
    )
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=schedule.resume)
    facts["seconds"] = round(time.monotonic() - started)
    if not trainer.is_world_process_zero():
        return
    save(model, tokenizer, schedule.output)
    save_curve(trainer.state.log_history, schedule, facts)


def script() -> str:
    """The name of the script that runs."""
    return Path(sys.argv[0]).name


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """The finished model in bfloat16, with its tokenizer and licence note."""
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "LICENSE-NOTE.txt").write_text(LICENCE_NOTE.format(script=script()) + "\n", encoding="utf-8")


def save_curve(history: list[dict[str, float]], schedule: Schedule, facts: dict[str, object]) -> None:
    """The loss curve as JSON, with recipe and versions, and as a picture."""
    curve = {
        "train": [[row["step"], row["loss"]] for row in history if "loss" in row],
        "held_out": [[row["step"], row["eval_loss"]] for row in history if "eval_loss" in row],
    }
    settings = {key: value for key, value in asdict(schedule).items() if not isinstance(value, Path)}
    report = {"facts": facts, "recipe": settings, "curve": curve}
    (schedule.output / "pretraining.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(curve, schedule.output / "pretraining.png")


def draw(curve: dict[str, list[list[float]]], path: Path) -> None:
    """Train and held-out loss over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curve.items():
        axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", ylim=(1, 6))
    axes.legend()
    figure.savefig(path, dpi=100)
