"""transformers.Trainer, stock and ours, against steps by hand; the arguments that would drop the shadow's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from shadow_peft import ShadowForSequenceClassification
from shadow_peft.training import ShadowTrainer
from tests.test_trainer import collate, rows
from tests.tiny_models import adapted, llama, qwen3_classifier
from tests.training.steps import ACCUMULATION, WEIGHT, Capture, compare, logits_of, options, scores, whole_model

TRAINERS = pytest.mark.parametrize("kind", [Trainer, ShadowTrainer])


def classification_model() -> ShadowForSequenceClassification:
    shadow = llama(3, hidden_size=16, num_hidden_layers=2)
    return ShadowForSequenceClassification(adapted(qwen3_classifier(), shadow_model=shadow), shadow_loss_weight=WEIGHT)


def labelled(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    padded = collate(batch)
    return padded | {"labels": padded["input_ids"].sum(1) % 3}


def language_modelling(model: Any, weight: float) -> torch.Tensor:
    """CE of both paths, a mean over the targets of all rows."""
    total, count = torch.zeros(()), 0
    for row in rows(8):
        base, shadow = (-scores(logits, row["input_ids"], 1).sum() for logits in logits_of(model, row["input_ids"]))
        total, count = total + base + weight * shadow, count + len(row["input_ids"]) - 1
    return total / count


def classification(model: Any, weight: float) -> torch.Tensor:
    """CE of both paths, a mean over rows."""
    total = torch.zeros(())
    for row in rows(8):
        output = model(input_ids=torch.tensor([row["input_ids"]]))
        label = torch.tensor([sum(row["input_ids"]) % 3])
        total = total + F.cross_entropy(output.logits, label) + weight * F.cross_entropy(output.shadow_logits, label)
    return total / 8


@TRAINERS
@ACCUMULATION
@pytest.mark.parametrize("task", [language_modelling, classification])
def test_a_step_is_the_step_by_hand(task: Any, accumulation: int, kind: Any, tmp_path: Path) -> None:
    models = task is language_modelling
    model, capture = whole_model() if models else classification_model(), Capture()
    args = TrainingArguments(**options(tmp_path, accumulation))
    collator = collate if models else labelled
    kind(model, args, train_dataset=rows(8), data_collator=collator, callbacks=[capture]).train()
    title = f"{kind.__name__}, {task.__name__}, accumulation {accumulation}"
    compare(title, capture.gradients, model, lambda weight: task(model, weight))


def test_refuses_what_would_drop_the_shadows_loss(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        ShadowTrainer(whole_model(), TrainingArguments(**options(tmp_path, label_smoothing_factor=0.1)))
    with pytest.raises(ValueError, match="compute_loss_func"):
        ShadowTrainer(whole_model(), TrainingArguments(**options(tmp_path)), compute_loss_func=lambda *a, **k: None)
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        ShadowTrainer(llama(), TrainingArguments(**options(tmp_path)))  # type: ignore[arg-type]
