"""TRL's own trainers would drop the shadow's loss: with our models they end in an error that says what to use."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from shadow_peft.demo.robot_commands import commands
from shadow_peft.tasks.base import TRAINER_TAG
from shadow_peft.training import ShadowSFTTrainer
from tests.cli.conftest import tiny_tokenizer
from tests.tiny_models import tokens
from tests.training.steps import base, options, small_model
from tests.training.test_dpo import preferences
from tests.training.test_reward import reward_model


def plain(kind: type, folder: Path, weight: float = 0.5) -> Any:
    config = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig, GRPOTrainer: GRPOConfig, RewardTrainer: RewardConfig}[kind]
    model = reward_model() if kind is RewardTrainer else small_model()
    model.shadow_loss_weight = weight
    wants: dict[Any, dict[str, Any]] = {DPOTrainer: {"ref_model": base()}, GRPOTrainer: {"reward_funcs": lambda **_: [0.0]}}
    more = wants.get(kind, {})
    data = Dataset.from_list([c.row() for c in commands("train", 8)]) if kind is SFTTrainer else preferences()
    return kind(model=model, args=config(**options(folder)), train_dataset=data, processing_class=tiny_tokenizer(), **more)


@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer, GRPOTrainer, RewardTrainer])
def test_a_plain_trainer_ends_in_an_error(kind: type, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"does not train the shadow(.|\n)*Shadow{kind.__name__}"):
        plain(kind, tmp_path)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO", "Reward", "KTO", "RLOO", "Distillation"])
def test_trl_still_signs_what_it_trains(name: str) -> None:
    kind = getattr(trl, f"{name}Trainer")
    assert "trl" in kind._tag_names
    assert "add_model_tags(self._tag_names)" in inspect.getsource(kind.__init__)


@pytest.mark.filterwarnings("ignore")  # TRL marks it as experimental
def test_an_experimental_trainer_ends_in_an_error(tmp_path: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    with pytest.raises(TypeError, match="orpo"):
        ORPOTrainer(
            small_model(), ORPOConfig(**options(tmp_path)), train_dataset=preferences(), processing_class=tiny_tokenizer()
        )


def test_a_refused_model_is_as_good_as_before(tmp_path: Path) -> None:
    model, ids = small_model(), tokens()
    expected = model(ids, labels=ids).loss
    data = Dataset.from_list([c.row() for c in commands("train", 8)])
    with pytest.raises(TypeError, match="does not train the shadow"):
        SFTTrainer(model, SFTConfig(**options(tmp_path)), train_dataset=data, processing_class=tiny_tokenizer())
    assert model(ids, labels=ids).loss == expected
    trainer = ShadowSFTTrainer(model, SFTConfig(**options(tmp_path)), train_dataset=data, processing_class=tiny_tokenizer())
    trainer.train()
    assert {"base_loss", "shadow_loss"} <= trainer.state.log_history[0].keys()


def test_a_model_without_a_task_ends_in_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ShadowForCausalLM"):
        SFTTrainer(
            small_model().peft_model,
            SFTConfig(**options(tmp_path)),
            train_dataset=Dataset.from_list([c.row() for c in commands("train", 8)]),
            processing_class=tiny_tokenizer(),
        )


def test_without_a_shadow_loss_there_is_nothing_to_drop(tmp_path: Path) -> None:
    plain(RewardTrainer, tmp_path, weight=0.0).train()


def test_a_trainer_that_knows_the_shadow_may_say_so(tmp_path: Path) -> None:
    class Knowing(RewardTrainer):
        _tag_names = [*RewardTrainer._tag_names, TRAINER_TAG]  # noqa: RUF012

    Knowing(
        reward_model(), RewardConfig(**options(tmp_path)), train_dataset=preferences(), processing_class=tiny_tokenizer()
    ).train()


def test_other_tags_and_other_loops_pass() -> None:
    model, ids = small_model(), tokens()
    model.add_model_tags(["robots", "tiny"])
    model.add_model_tags("trial")
    assert model.model_tags[-3:] == ["robots", "tiny", "trial"]
    model(ids, labels=ids).loss.backward()
    assert torch.isfinite(model.peft_model.shadow_injection_model.injection_ups.grad).all()
