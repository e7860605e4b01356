"""The monitor speaks once when a part of the adapter is not trained, and else not at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.training import GradientMonitor, GradientWatch, ShadowTrainer
from tests.test_trainer import collate, rows
from tests.tiny_models import llama, tokens
from tests.training.steps import options, whole_model

OWN_LOSS = "the shadow's own loss"


class DroppingTrainer(Trainer):
    """Reads the base's logits alone, as many loops do."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def fresh_model(weight: float = 0.5, variant: str = "published") -> ShadowForCausalLM:
    """A fresh adapter, with up projections that are zero."""
    torch.manual_seed(0)
    return ShadowForCausalLM(
        get_shadow_model(llama(), ShadowConfig(dropout=0.0, variant=variant)), shadow_loss_weight=weight
    )


def warnings_of(
    caplog: pytest.LogCaptureFixture, folder: Path, model: Any, kind: type[Trainer] = Trainer, **more: Any
) -> list[str]:
    """What the monitor says during a run."""
    args = TrainingArguments(**options(folder, **{"learning_rate": 1e-2, "max_steps": 5, **more}))
    callbacks = [] if kind is ShadowTrainer else [GradientMonitor()]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "shadow_peft"):
        kind(model, args, train_dataset=rows(32), data_collator=collate, callbacks=callbacks).train()
    return [record.getMessage() for record in caplog.records if record.name.startswith("shadow_peft")]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", [Trainer, ShadowTrainer])
@pytest.mark.parametrize("make", [fresh_model, whole_model])
def test_right_training_is_not_reported(make: Any, kind: Any, accumulation: int, caplog: Any, tmp_path: Path) -> None:
    assert warnings_of(caplog, tmp_path, make(), kind, gradient_accumulation_steps=accumulation) == []


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_dropped_shadow_loss_is_reported_once(accumulation: int, caplog: Any, tmp_path: Path) -> None:
    (message,) = warnings_of(caplog, tmp_path, fresh_model(), DroppingTrainer, gradient_accumulation_steps=accumulation)
    assert f"No gradient reached {OWN_LOSS} of" in message


def test_heads_of_a_dropped_shadow_loss_are_named(caplog: Any, tmp_path: Path) -> None:
    (message,) = warnings_of(caplog, tmp_path, whole_model(), DroppingTrainer)
    assert f"No gradient reached shadow_lm_head and {OWN_LOSS} of" in message


def test_label_smoothing_of_a_stock_trainer_is_reported(caplog: Any, tmp_path: Path) -> None:
    (message,) = warnings_of(caplog, tmp_path, fresh_model(), label_smoothing_factor=0.1)
    assert OWN_LOSS in message


def test_a_detached_part_is_named(caplog: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model(variant="readout")
    monkeypatch.setattr(model.peft_model.shadow_readout_model, "forward", lambda h, s: h)
    (message,) = warnings_of(caplog, tmp_path, model)
    assert "No gradient reached shadow_readout_model of" in message


def test_no_shadow_loss_is_wanted_at_weight_zero(caplog: Any, tmp_path: Path) -> None:
    assert warnings_of(caplog, tmp_path, fresh_model(0.0), DroppingTrainer) == []


@pytest.mark.parametrize(("variant", "part"), [("readout", "shadow_readout_model"), ("published", "shadow_update_model")])
def test_frozen_parts_are_not_missed(caplog: Any, tmp_path: Path, variant: str, part: str) -> None:
    model = fresh_model(variant=variant)
    getattr(model.peft_model, part).requires_grad_(False)
    assert warnings_of(caplog, tmp_path, model) == []


def test_a_short_run_has_no_verdict_and_leaves_no_hook(caplog: Any, tmp_path: Path) -> None:
    model = fresh_model()
    assert warnings_of(caplog, tmp_path, model, DroppingTrainer, max_steps=2) == []
    assert not model._forward_hooks
    warnings_of(caplog, tmp_path, model, max_steps=5)
    assert not model._forward_hooks


def test_a_loop_of_ones_own_is_watched() -> None:
    for own in (True, False):
        model = fresh_model()
        watch, ids = GradientWatch(model, steps=2), tokens()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            output = model(ids, labels=ids, output_logits=True)
            loss = output.loss if own else F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            assert watch.step() is (step == 1)
            optimizer.step()
            optimizer.zero_grad()
        assert watch.missing() == ([] if own else [OWN_LOSS])
        watch.close()


def test_every_trained_adapter_is_watched() -> None:
    model = fresh_model()
    model.peft_model.add_adapter("other", ShadowConfig())
    model.peft_model.set_requires_grad(["default", "other"])
    watch, ids = GradientWatch(model), tokens()
    model(ids, labels=ids).loss.backward()
    watch.step()
    missing = watch.missing()
    assert "other.shadow_injection_model" in missing
    assert "shadow_injection_model" not in missing


def test_a_tuple_is_no_evidence() -> None:
    model, ids = fresh_model(), tokens()
    watch = GradientWatch(model)
    outputs = model(ids, labels=ids, return_dict=False)
    sum(tensor.sum() for tensor in outputs if isinstance(tensor, torch.Tensor)).backward()
    assert OWN_LOSS not in watch.missing()


def test_refuses_what_cannot_be_monitored() -> None:
    with pytest.raises(ValueError, match="steps"):
        GradientMonitor(steps=1)
    with pytest.raises(TypeError, match="no shadow adapter"):
        GradientWatch(llama())
