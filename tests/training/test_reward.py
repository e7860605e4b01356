"""ShadowRewardTrainer: the pairwise loss of both heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from trl import RewardConfig

from shadow_peft import ShadowForSequenceClassification
from shadow_peft.demo.robot_commands import commands
from shadow_peft.training import ShadowRewardTrainer
from shadow_peft.training.reward import pairwise_loss
from tests.cli.conftest import tiny_tokenizer
from tests.tiny_models import adapted, classifier, llama, qwen3_classifier
from tests.training.steps import ACCUMULATION, VOCABULARY, WEIGHT, Capture, compare, options


def reward_model(**config: Any) -> ShadowForSequenceClassification:
    base = qwen3_classifier(vocab_size=VOCABULARY, num_labels=1, eos_token_id=1, bos_token_id=None)
    shadow = llama(3, hidden_size=16, num_hidden_layers=2, vocab_size=VOCABULARY)
    model = ShadowForSequenceClassification(adapted(base, shadow_model=shadow, **config), shadow_loss_weight=WEIGHT)
    with torch.no_grad():
        model.shadow_classifier_head.weight.mul_(-1.5)
    return model


def preferences(margin: bool) -> Dataset:
    right, wrong = commands("train", 8), commands("train", 16)[8:]
    rows = [
        {"prompt": r.prompt, "chosen": r.completion, "rejected": w.completion} for r, w in zip(right, wrong, strict=True)
    ]
    return Dataset.from_list([row | ({"margin": 0.2 * i} if margin else {}) for i, row in enumerate(rows)])


def make_trainer(folder: Path, model: Any, accumulation: int = 1, margin: bool = False, **more: Any) -> ShadowRewardTrainer:
    callbacks, data = more.pop("callbacks", None), preferences(margin)
    args = RewardConfig(**options(folder, accumulation, **more))
    return ShadowRewardTrainer(
        model, args, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer(), callbacks=callbacks
    )


def reference(model: Any, rows: Any, weight: float, centering: float) -> torch.Tensor:
    losses = []
    for row in rows:
        chosen, rejected = (model(input_ids=torch.tensor([row[kind]])) for kind in ("chosen_ids", "rejected_ids"))
        for factor, name in ((1.0, "logits"), (weight, "shadow_logits")):
            a, b = chosen[name].squeeze(), rejected[name].squeeze()
            losses.append(factor * (-F.logsigmoid(a - b - row.get("margin", 0.0)) + centering * (a + b) ** 2))
    return torch.stack(losses).sum() / len(rows)


@ACCUMULATION
@pytest.mark.parametrize(("margin", "centering"), [(False, None), (True, 0.1)], ids=["plain", "margin and centering"])
def test_a_step_is_the_step_by_hand(margin: bool, centering: float | None, accumulation: int, tmp_path: Path) -> None:
    model, capture = reward_model().double(), Capture()  # the rewards of a pair nearly cancel: in float32 errors reach 1e-4
    trainer = make_trainer(tmp_path, model, accumulation, margin, center_rewards_coefficient=centering, callbacks=[capture])
    trainer.train()
    kind = "margin, centred" if margin else "padded"
    compare(
        f"reward, {kind}, accumulation {accumulation}", capture.gradients, model,
        lambda weight: reference(model, trainer.train_dataset, weight, centering or 0.0),
    )  # fmt: skip


def test_defaults_train_evaluate_and_log_both_losses(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-2, "max_steps": 2, "bf16": None, "activation_checkpointing": True}
    trainer = make_trainer(tmp_path, reward_model(dropout=0.1), 2, **settings)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "base_loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["loss"] == pytest.approx(row["base_loss"] + WEIGHT * row["shadow_loss"], rel=2e-2)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_base_loss"] + WEIGHT * metrics["eval_shadow_loss"], rel=2e-2)
    assert trainer.model.peft_model.shadow_config.dropout == 0


def test_pairwise_loss_by_hand() -> None:
    rewards = torch.tensor([[2.0], [0.0], [1.0], [3.0]])
    loss = pairwise_loss(rewards, torch.tensor([0.5, 0.0]), 0.1)
    expected = (torch.log1p(torch.tensor(-0.5).exp()) + torch.log1p(torch.tensor(3.0).exp())) / 2 + 0.1 * 9
    torch.testing.assert_close(loss, expected)


def test_refuses_other_models(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ShadowForSequenceClassification"):
        make_trainer(tmp_path, llama())
    with pytest.raises(ValueError, match="num_labels"):
        make_trainer(tmp_path, classifier(qwen3_classifier()))
    alone = reward_model()
    alone.set_inference_mode("shadow_only")
    with pytest.raises(ValueError, match="set_inference_mode"):
        make_trainer(tmp_path, alone)
