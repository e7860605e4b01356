"""Optimizer groups: every trainable parameter once, at its rate, with decay where it belongs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.robot_commands import commands
from shadow_peft.training import ShadowSFTTrainer, ShadowTrainer, parameter_groups
from tests.cli.conftest import tiny_tokenizer
from tests.test_trainer import collate, rows
from tests.tiny_models import llama
from tests.training.steps import base, options, whole_model


def names_of(model: Any, groups: list[dict[str, Any]]) -> list[set[str]]:
    names = {id(p): name.split("peft_model.")[1] for name, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in groups]


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = whole_model()
    groups = parameter_groups(model, 1e-3, 0.1, 0.05)
    members = [name for group in names_of(model, groups) for name in group]
    trainable = {name.split("peft_model.")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(members) == sorted(trainable)


def test_rates_and_decay_by_hand() -> None:
    model = whole_model()
    groups = parameter_groups(model, 1e-3, 0.1, 0.05)
    settings = [(group["lr"], group["weight_decay"]) for group in groups]
    assert settings == [(1e-3, 0.1), (1e-3, 0.0), (5e-5, 0.1), (5e-5, 0.0)]
    rest, bare, shadow, shadow_bare = names_of(model, groups)
    assert bare == {"shadow_update_model.hidden_norm.weight", "shadow_update_model.hidden_norm.bias"}
    assert {"shadow_injection_model.injection_ups", "task_heads.shadow_lm_head.weight"} < rest
    assert "shadow_hidden_projection.weight" in shadow
    assert all(name.startswith(("shadow_model.", "shadow_hidden_projection.")) for name in shadow | shadow_bare)
    assert all("norm" in name for name in shadow_bare)
    assert not any("norm" in name for name in rest | shadow)


def test_the_backbones_of_all_trained_adapters_have_their_rate() -> None:
    model = whole_model()
    model.peft_model.add_adapter("other", ShadowConfig())
    model.peft_model.set_requires_grad(["default", "other"])
    shadow = {name for group in names_of(model, parameter_groups(model, 1.0, 0.0, 0.5))[1:] for name in group}
    assert any(name.startswith("other_adapters.other.shadow_model.") for name in shadow)
    assert not any("injection" in name for name in shadow)


def test_stacked_biases_do_not_decay() -> None:
    model = get_shadow_model(base(), ShadowConfig(variant="peft"))
    bare = [p for group in parameter_groups(model, 1.0, 0.1) if not group["weight_decay"] for p in group["params"]]
    biases = [p for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert any(bias.ndim == 2 for bias in biases)
    assert {id(bias) for bias in biases} <= {id(p) for p in bare}


def test_refuses_what_cannot_be_grouped() -> None:
    with pytest.raises(TypeError, match="no shadow adapter"):
        parameter_groups(llama(), 1e-3)
    with pytest.raises(ValueError, match="shadow_learning_rate_scale"):
        parameter_groups(whole_model(), 1e-3, shadow_learning_rate_scale=-1.0)
    with pytest.raises(ValueError, match="shadow_learning_rate_scale"):
        parameter_groups(whole_model(), 1e-3, shadow_learning_rate_scale=float("nan"))
    with pytest.raises(ValueError, match="trainable"):
        parameter_groups(whole_model().requires_grad_(False), 1e-3)


def make_trainer(folder: Path, scale: float = 0.05, **more: Any) -> ShadowTrainer:
    given = {name: more.pop(name) for name in ("optimizer_cls_and_kwargs",) if name in more}
    args = TrainingArguments(**options(folder, **{"learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 4, **more}))
    return ShadowTrainer(
        whole_model(), args, train_dataset=rows(8), data_collator=collate, shadow_learning_rate_scale=scale, **given
    )


@pytest.mark.parametrize(("name", "kind"), [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_optimizer_is_the_one_that_the_arguments_name(name: str, kind: type, tmp_path: Path) -> None:
    optimizer = make_trainer(tmp_path, optim=name, adam_beta2=0.95).create_optimizer()
    assert type(optimizer) is kind
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 5e-5, 5e-5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1, 0.0]
    if kind is torch.optim.AdamW:
        assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


def test_an_optimizer_class_that_the_user_gives_has_the_groups_too(tmp_path: Path) -> None:
    optimizer = make_trainer(tmp_path, optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 2.0})).create_optimizer()
    assert type(optimizer) is torch.optim.Adagrad
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 2.0, 0.1, 0.1]


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"warmup_steps": 2},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_keeps_the_ratio(schedule: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lr_scheduler_type=schedule, **SCHEDULES[schedule])
    trainer.create_optimizer_and_scheduler(4)
    seen = []
    for _ in range(3):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        rates = trainer.lr_scheduler.get_last_lr()
        assert [rate / rates[0] for rate in rates] == pytest.approx([1.0, 1.0, 0.05, 0.05])
        seen.append(rates[0])
    assert len(set(seen)) > 1


def test_the_log_shows_the_learning_rate_of_the_arguments(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lr_scheduler_type="constant")
    trainer.train()
    assert {row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row} == {1e-3}


def test_a_backbone_with_scale_zero_stays_as_it_was(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scale=0.0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    still = {name for name in before if ".shadow_model." in name or ".shadow_hidden_projection." in name}
    assert still
    assert moved == before.keys() - still


@pytest.mark.filterwarnings("ignore")  # of an optimizer that few torch builds test
def test_an_optimizer_with_groups_of_its_own_and_a_scale_are_refused(tmp_path: Path) -> None:
    grouped = (torch.optim.SGD, {"lr": 1.0, "params": [torch.nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="own parameter groups"):
        make_trainer(tmp_path, optimizer_cls_and_kwargs=grouped).create_optimizer()
    assert len(make_trainer(tmp_path, 1.0, optimizer_cls_and_kwargs=grouped).create_optimizer().param_groups) == 1


def test_a_ready_optimizer_and_a_scale_are_refused(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(whole_model().parameters(), lr=1.0)
    args = TrainingArguments(**options(tmp_path))
    with pytest.raises(ValueError, match="parameter_groups"):
        ShadowTrainer(whole_model(), args, optimizers=(optimizer, None), shadow_learning_rate_scale=0.1)
    assert ShadowTrainer(whole_model(), args, optimizers=(optimizer, None)).create_optimizer() is optimizer


def test_trainers_of_trl_have_the_groups_too(tmp_path: Path) -> None:
    args = SFTConfig(**options(tmp_path, learning_rate=1e-3))
    data = Dataset.from_list([c.row() for c in commands("train", 2)])
    model: ShadowForCausalLM = whole_model()
    trainer = ShadowSFTTrainer(
        model, args, train_dataset=data, processing_class=tiny_tokenizer(), shadow_learning_rate_scale=0.5
    )
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [1e-3, 1e-3, 5e-4, 5e-4]
