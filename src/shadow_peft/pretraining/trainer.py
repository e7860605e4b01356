"""The training of a shadow on a corpus, and the finished model: `transformers.Trainer` on a stream of blocks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from shadow_peft.backbone.placement import place
from shadow_peft.pretraining.student import Student

_TERMS = ("next_token_loss", "distillation_loss")


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in which steps a shadow is trained.

    Attributes:
        max_steps: optimizer steps that the learning rate is planned for.
        batch: blocks of one forward pass.
        accumulation: forward passes of one step.
        learning_rate: its peak (AdamW).
        warmup_steps: steps in which it rises.
        decay_fraction: part of the steps, at the end, in which it falls to 0.
        weight_decay: of the matrices.
        eval_steps: steps between two evaluations.
        save_steps: steps between two checkpoints.
        logging_steps: steps between two lines of the log.
        seed: of the weights.
        use_cpu: compute on the CPU where there is a GPU, too.
    """

    max_steps: int
    batch: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_fraction: float = 0.25
    weight_decay: float = 0.1
    eval_steps: int = 250
    save_steps: int = 250
    logging_steps: int = 25
    seed: int = 0
    use_cpu: bool = False

    def arguments(self, output: Path, resumes: bool = False) -> TrainingArguments:
        """Those of transformers; checkpoints go to `output`. A run that starts is evaluated before its first step."""
        return TrainingArguments(
            output_dir=str(output),
            max_steps=self.max_steps,
            per_device_train_batch_size=self.batch,
            per_device_eval_batch_size=self.batch,
            gradient_accumulation_steps=self.accumulation,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            adam_beta2=0.95,
            lr_scheduler_type="warmup_stable_decay",
            warmup_steps=min(self.warmup_steps, self.max_steps // 2),
            lr_scheduler_kwargs={"num_decay_steps": round(self.max_steps * self.decay_fraction)},
            logging_steps=self.logging_steps,
            eval_strategy="steps",
            eval_steps=self.eval_steps,
            eval_on_start=not resumes,
            save_steps=self.save_steps,
            save_total_limit=2,
            seed=self.seed,
            data_seed=self.seed,
            use_cpu=self.use_cpu,
            dataloader_pin_memory=torch.cuda.is_available() and not self.use_cpu,
            prediction_loss_only=True,
            remove_unused_columns=False,
            report_to="none",
        )


class PretrainingTrainer(Trainer):
    """Trains a `Student`; the log carries both terms of its loss.

    Args:
        student: what is trained.
        args: the arguments of transformers, see `Schedule.arguments`.
        stream: blocks `input_ids` `[context]` with their `index`; they are repeated for as long as the training lasts.
        held_out: blocks for evaluation.
        callbacks: of transformers.
    """

    def __init__(
        self,
        student: Student,
        args: TrainingArguments,
        stream: IterableDataset,
        held_out: Sequence[dict[str, Any]],
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            student,
            args,
            train_dataset=stream.repeat(None),
            eval_dataset=list(held_out),
            data_collator=_collate,
            callbacks=callbacks,
        )
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self._started: float | None = None
        self._seconds_before, self._has_logged = 0.0, False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, see transformers; the clock starts."""
        self._started = time.perf_counter()
        return super().train(*args, **kwargs)

    def seconds(self) -> float:
        """Duration of the training, with that of earlier processes up to what they logged before the checkpoint."""
        return 0.0 if self._started is None else self._seconds_before + time.perf_counter() - self._started

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The student's loss; its terms are kept for the log."""
        outputs = model(**inputs)
        if model.training:
            for name, value in zip(_TERMS, outputs["terms"], strict=True):
                self._terms[name].append(value)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the seconds so far; in training with the means of both terms since the last time, where there are two."""
        if not self._has_logged:  # what is in the log already is the checkpoint's
            self._seconds_before = max((float(row.get("seconds", 0)) for row in self.state.log_history), default=0.0)
            self._has_logged = True
        logs = {**logs, "seconds": round(self.seconds(), 1)}
        if "loss" in logs and self._terms:
            means = {name: float(torch.stack(values).mean()) for name, values in self._terms.items()}
            self._terms.clear()
            if self.model.objective.distillation > 0:
                logs = {**logs, **means}
        super().log(logs, *args, **kwargs)


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    numbers = {"index": torch.tensor([row["index"] for row in rows])} if "index" in rows[0] else {}
    return {"input_ids": ids, "labels": ids, **numbers}


def finished(student: Student) -> PreTrainedModel:
    """The trained shadow as a model of its own, with copies of the base's embeddings and head, in the base's dtype."""
    model = student.model
    return place(model.export_shadow(), model.base_model.dtype)


def save_finished(
    student: Student, tokenizer: PreTrainedTokenizerBase, output: Path, include_embeddings: bool = True
) -> PreTrainedModel:
    """Write the finished model into a folder.

    Args:
        student: what was trained.
        tokenizer: the base's, written beside a model that has embeddings.
        output: the folder.
        include_embeddings: False leaves out the embedding table and the head, which are the base's. Such a folder is small;
            it is a shadow for this base and no model of its own.
    """
    model = finished(student)
    if include_embeddings:
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        return model
    tables = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in tables]
    model.save_pretrained(output, state_dict={k: t for k, t in model.state_dict().items() if k not in names})
    return model
