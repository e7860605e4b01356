"""A base that carries PEFT adapters: kept or trained with the shadow, stored with it, and given back."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import TrainingArguments

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.training import ShadowTrainer, parameter_groups
from tests.test_trainer import collate, rows
from tests.tiny_models import llama, tokens, with_nonzero_weights
from tests.training.steps import options

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
LORA: dict[str, Any] = {
    "r": 4,
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "init_lora_weights": False,
}


def with_lora(seed: int = 3, **changes: Any) -> PeftModel:
    """A tiny base with a LoRA that shows."""
    torch.manual_seed(seed)
    return get_peft_model(llama(), LoraConfig(**{**LORA, **changes})).eval()


def shadowed(base: Any, train: bool = True, **config: Any) -> ShadowForCausalLM:
    """A stirred shadow on it."""
    torch.manual_seed(1)
    config = ShadowConfig(injection_hidden_size=8, train_base_adapters=train, **config)
    return ShadowForCausalLM(with_nonzero_weights(get_shadow_model(base, config)), shadow_loss_weight=0.5)


def adapters(model: ShadowForCausalLM) -> dict[str, Tensor]:
    """The LoRA's parameters."""
    return {name: p for name, p in model.peft_model.base_model.named_parameters() if "lora_" in name}


def train_a_little(model: ShadowForCausalLM) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model.train()(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("given", ["PeftModel", "add_adapter"])
def test_a_fresh_shadow_changes_nothing_of_it(given: str) -> None:
    wrapped = with_lora()
    base: Any = wrapped if given == "PeftModel" else llama()
    if given == "add_adapter":
        torch.manual_seed(3)
        base.add_adapter(LoraConfig(**LORA))
    expected = base.eval()(tokens()).logits
    assert not torch.equal(expected, llama()(tokens()).logits)
    model = get_shadow_model(base, ShadowConfig())
    assert torch.equal(model(tokens()).logits, expected)
    assert not any(p.requires_grad for p in model.base_model.parameters())
    assert model.unload() is base
    assert torch.equal(base(tokens()).logits, expected)


def test_the_shadow_is_cut_from_the_weights_below() -> None:
    plain, carried = (get_shadow_model(base, ShadowConfig(shadow_init="base")) for base in (llama(), with_lora()))
    found = carried.shadow_model.state_dict()
    for name, tensor in plain.shadow_model.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("train", [True, False])
def test_both_are_trained_or_the_shadow_alone(train: bool) -> None:
    model = shadowed(with_lora(), train)
    before = {name: p.detach().clone() for name, p in adapters(model).items()}
    assert any("lora_" in name for name, p in model.named_parameters() if p.requires_grad) is train
    grouped = {id(p) for group in parameter_groups(model, 1e-3) for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} == grouped
    train_a_little(model)
    changed = [name for name, p in adapters(model).items() if not torch.equal(p, before[name])]
    assert changed == (list(before) if train else [])


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("onto", ["bare", "carrying"])
def test_they_travel_with_the_adapter(onto: str, train: bool, use_dora: bool, tmp_path: Path) -> None:
    model = shadowed(with_lora(use_dora=use_dora), train)
    train_a_little(model)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    base: Any = llama() if onto == "bare" else with_lora(use_dora=use_dora)
    before = base(tokens()).logits
    loaded = ShadowForCausalLM.from_pretrained(base, tmp_path, is_trainable=True)
    torch.testing.assert_close(loaded.eval()(tokens()).logits, expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained
    given_back = loaded.peft_model.unload()
    assert given_back is base
    if onto == "bare":
        assert torch.equal(base(tokens()).logits, before)
        assert not any("lora_" in name for name in base.state_dict())


def test_a_copy_trains_on_its_own() -> None:
    model = shadowed(with_lora())
    copied, before = copy.deepcopy(model), model.eval()(tokens()).logits
    train_a_little(copied)
    assert torch.equal(model(tokens()).logits, before)


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    def run(folder: Path, resume: str | None = None) -> ShadowForCausalLM:
        model = shadowed(with_lora())
        args = TrainingArguments(**options(folder, max_steps=4, save_steps=2, save_strategy="steps", learning_rate=1e-2))
        ShadowTrainer(model, args, train_dataset=rows(16), data_collator=collate).train(resume)
        return model

    whole = run(tmp_path)
    resumed = run(tmp_path, str(tmp_path / "checkpoint-2"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, msg=name)


def test_a_base_with_adapters_that_the_checkpoint_does_not_know_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shadowed(llama(), train=False).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "shadow_peft"):
        ShadowForCausalLM.from_pretrained(with_lora(), tmp_path)
    assert "PEFT adapters" in caplog.text


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    base = llama().train()
    with pytest.raises(ValueError, match="carries no PEFT adapter"):
        get_shadow_model(base, ShadowConfig(train_base_adapters=True))
    assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        get_shadow_model(
            get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), ShadowConfig()
        )
    shadowed(with_lora()).save_pretrained(tmp_path)
    other, expected = with_lora(r=2), with_lora(r=2)(tokens()).logits
    with pytest.raises(ValueError, match="shape"):
        ShadowForCausalLM.from_pretrained(other, tmp_path)
    assert torch.equal(other(tokens()).logits, expected)
