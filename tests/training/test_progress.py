"""The weight of the distillation rises over the first part of a training, and goes on rising where a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.training import ProgressCallback, ShadowTrainer
from tests.test_trainer import collate, rows
from tests.tiny_models import llama
from tests.training.steps import options


class Weights(TrainerCallback):
    """Notes the weight of the distillation at every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(model.loss_weights.distillation)


def weights_of(folder: Path, kind: type[Trainer] = ShadowTrainer, resume: str | None = None, **more: Any) -> list[float]:
    torch.manual_seed(0)
    model = ShadowForCausalLM(
        get_shadow_model(llama(), ShadowConfig()), distillation_weight=0.8, distillation_warmup_ratio=0.5
    )
    noted = Weights()
    callbacks = [noted] if kind is ShadowTrainer else [ProgressCallback(), noted]
    args = TrainingArguments(**options(folder, **{"max_steps": 8, "save_steps": 2, "save_strategy": "steps", **more}))
    kind(model, args, train_dataset=rows(32), data_collator=collate, callbacks=callbacks).train(resume)
    assert model.loss_weights.distillation == 0.8
    return noted.seen


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", [ShadowTrainer, Trainer])
def test_the_weight_rises_with_the_optimizer_steps(kind: type[Trainer], accumulation: int, tmp_path: Path) -> None:
    seen = weights_of(tmp_path, kind, gradient_accumulation_steps=accumulation)
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8])


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    weights_of(tmp_path)
    seen = weights_of(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert seen == pytest.approx([0.6, 0.8, 0.8, 0.8, 0.8, 0.8])
