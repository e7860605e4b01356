"""ShadowDPOTrainer: DPO of the adapted base against its bare base, cross entropy of the shadow on what was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from trl import DPOConfig

from shadow_peft import ShadowConfig, ShadowForCausalLM
from shadow_peft.demo.robot_commands import commands
from shadow_peft.training import ShadowDPOTrainer
from tests.cli.conftest import tiny_tokenizer
from tests.tiny_models import llama
from tests.training.steps import ACCUMULATION, TRL_NAMES, Capture, base, compare, logits_of, options, scores, whole_model

pytestmark = TRL_NAMES
BETA = 0.3


def preferences(count: int = 8) -> Dataset:
    """Robot commands; a later command's answer, and a piece of it, is what was rejected."""
    right, wrong = commands("train", count), commands("train", 2 * count)[count:]
    return Dataset.from_list(
        [
            {"prompt": r.prompt, "chosen": r.completion, "rejected": w.completion[: 20 + 3 * i]}
            for i, (r, w) in enumerate(zip(right, wrong, strict=True))
        ]
    )


def make_trainer(folder: Path, model: ShadowForCausalLM, accumulation: int = 1, **more: Any) -> ShadowDPOTrainer:
    trainer_options = {name: more.pop(name) for name in ("callbacks", "ref_model", "eval_dataset") if name in more}
    args = DPOConfig(**options(folder, accumulation, beta=BETA, **more))
    return ShadowDPOTrainer(
        model, args=args, train_dataset=preferences(), processing_class=tiny_tokenizer(), **trainer_options
    )


def reference(model: ShadowForCausalLM, rows: Any, weight: float) -> torch.Tensor:
    """-log sigmoid(beta * difference of log-ratios), a mean over pairs; and CE of the shadow, a mean over chosen tokens."""
    bare = model.peft_model.get_base_model()
    losses, nats = [], []
    for row in rows:
        ratios, start = [], len(row["prompt_ids"])
        for kind in ("chosen_ids", "rejected_ids"):
            ids = row["prompt_ids"] + row[kind]
            policy, shadow = logits_of(model, ids)
            with torch.no_grad():
                frozen = scores(bare(input_ids=torch.tensor([ids])).logits[0], ids, start).sum()
            ratios.append(scores(policy, ids, start).sum() - frozen)
            if kind == "chosen_ids":
                nats.append(-scores(shadow, ids, start))
        losses.append(-F.logsigmoid(BETA * (ratios[0] - ratios[1])))
    return torch.stack(losses).mean() + weight * torch.cat(nats).mean()


@ACCUMULATION
@pytest.mark.parametrize("precomputed", [False, True])
def test_a_step_is_the_step_by_hand(precomputed: bool, accumulation: int, tmp_path: Path) -> None:
    model, capture = whole_model(), Capture()
    trainer = make_trainer(tmp_path, model, accumulation, callbacks=[capture], precompute_ref_log_probs=precomputed)
    trainer.train()
    kind = "reference precomputed" if precomputed else "padded"
    compare(
        f"DPO, {kind}, accumulation {accumulation}", capture.gradients, model,
        lambda weight: reference(model, trainer.train_dataset, weight),
    )  # fmt: skip


def test_no_second_base_is_loaded(tmp_path: Path) -> None:
    model = whole_model()
    trainer = make_trainer(tmp_path, model)
    assert not list(trainer.ref_model.parameters())
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.peft_model.base_model)


def test_cached_reference_scores_belong_to_one_base(tmp_path: Path) -> None:
    other = whole_model()
    with torch.no_grad():
        next(other.peft_model.base_model.parameters()).mul_(2)
    models = whole_model(), whole_model(), other
    trainers = [make_trainer(tmp_path, model, precompute_ref_log_probs=True) for model in models]
    first, same, different = ([row["ref_chosen_logps"] for row in trainer.train_dataset] for trainer in trainers)
    assert first == same != different


def test_a_reference_of_its_own_is_used(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, whole_model(), ref_model=base(seed=5))
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] != 0
    with pytest.raises(TypeError, match="ref_model"):
        make_trainer(tmp_path, whole_model(), ref_model=whole_model())


def test_defaults_train_evaluate_and_log_both_losses(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-2, "max_steps": 3, "bf16": None, "activation_checkpointing": True}
    trainer = make_trainer(tmp_path, whole_model(dropout=0.1), 2, **settings, eval_dataset=preferences(4))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "base_loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["loss"] == pytest.approx(row["base_loss"] + 0.5 * row["shadow_loss"], rel=2e-2)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_base_loss"] + 0.5 * metrics["eval_shadow_loss"], rel=1e-3)


def test_outputs_are_the_models_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, whole_model())
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.warns(FutureWarning, match="return_outputs"):
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss == trainer.compute_loss(trainer.model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(outputs.logits, trainer.model(**inputs).logits)


def test_disabled_dropout_is_the_adapters_too(tmp_path: Path) -> None:
    model = whole_model(dropout=0.4)
    model.peft_model.add_adapter("other", ShadowConfig(dropout=0.3))
    make_trainer(tmp_path, model)
    assert {config.dropout for config in model.peft_model.adapter_configs.values()} == {0}
    model = whole_model(dropout=0.4)
    make_trainer(tmp_path, model, disable_dropout=False)
    assert model.peft_model.shadow_config.dropout == 0.4


def test_refuses_what_it_cannot_honour(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        make_trainer(tmp_path, llama())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sync_ref_model"):
        make_trainer(tmp_path, whole_model(), sync_ref_model=True)
    alone = whole_model()
    alone.set_inference_mode("shadow_only")
    with pytest.raises(ValueError, match="set_inference_mode"):
        make_trainer(tmp_path, alone)
