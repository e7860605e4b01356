"""ShadowConfig: defaults, validation, JSON round trip; and the task models' own arguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shadow_peft import ShadowConfig, ShadowForCausalLM
from shadow_peft.checkpoint.reading import read
from tests.tiny_models import INTEROP, adapted, causal_lm, llama

PUBLISHED = {
    "num_shadow_layers": 1,
    "injection_hidden_size": 16,
    "gate_hidden_size": 10,
    "alpha": 0.1,
    "dropout": 0.2,
    "shadow_intermediate_size": None,
    "shadow_num_attention_heads": None,
    "shadow_num_key_value_heads": None,
    "shadow_head_dim": None,
    "modules_to_save": [],
}


@pytest.mark.parametrize("variant", ["published", "peft"])
def test_published_defaults(variant: str) -> None:
    config = ShadowConfig(variant=variant).to_dict()
    assert {name: config[name] for name in PUBLISHED} == PUBLISHED


def test_the_default_is_the_published_method() -> None:
    assert ShadowConfig() == ShadowConfig(variant="published", **PUBLISHED)
    assert ShadowConfig().shadow_init == "random"
    assert ShadowConfig.from_dict({}) == ShadowConfig()
    assert ShadowConfig.from_dict(PUBLISHED) == ShadowConfig()


def test_a_variant_has_defaults_of_its_own() -> None:
    readout = ShadowConfig(variant="readout")
    assert (readout.injection_hidden_size, readout.gate_hidden_size, readout.alpha, readout.dropout) == (64, 16, 1.0, 0.0)
    assert (readout.output_hidden_size, readout.readout_hidden_size) == (32, 32)
    assert ShadowConfig(variant="readout", alpha=0.5).alpha == 0.5
    assert ShadowConfig().output_hidden_size is None


def test_round_trip(tmp_path: Path) -> None:
    config = ShadowConfig(num_shadow_layers=3, alpha=1, modules_to_save=["lm_head"], shadow_init="random", variant="peft")
    config.save_pretrained(tmp_path)
    assert ShadowConfig.from_pretrained(tmp_path) == config
    assert ShadowConfig.from_dict(config.to_dict()) == config


def test_published_configs_of_both_dialects_are_read() -> None:
    assert ShadowConfig.from_pretrained(INTEROP / "llama_implicit" / "adapter").injection_hidden_size == 8
    paper = read(INTEROP / "peft_llama_mirror" / "adapter").config
    assert (paper.variant, paper.gate_hidden_size, paper.alpha) == ("peft", 6, 0.7)
    with pytest.raises(ValueError, match=r"no shadow_config.json"):
        ShadowConfig.from_pretrained(INTEROP / "peft_llama_mirror" / "adapter")


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ShadowConfig().alpha = 1.0  # type: ignore[misc]


WRONG = [
    ({"num_shadow_layers": 0}, ValueError),
    ({"injection_hidden_size": 0}, ValueError),
    ({"gate_hidden_size": 1}, ValueError),
    ({"dropout": 1.0}, ValueError),
    ({"dropout": -0.1}, ValueError),
    ({"alpha": "1"}, TypeError),
    ({"alpha": True}, TypeError),
    ({"num_shadow_layers": 1.5}, TypeError),
    ({"shadow_head_dim": 0}, ValueError),
    ({"first_injected_layer": -1}, ValueError),
    ({"first_injected_layer": "half"}, TypeError),
    ({"modules_to_save": "lm_head"}, TypeError),
    ({"shadow_init": "zeros"}, ValueError),
    ({"shadow_init_layers": "last"}, ValueError),
    ({"variant": "other"}, ValueError),
]


@pytest.mark.parametrize(("values", "error"), WRONG)
def test_wrong_values_are_named(values: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(values))):
        ShadowConfig(**values)


def test_wrong_arguments_of_task_models() -> None:
    with pytest.raises(ValueError, match="inference_mode must be one of"):
        causal_lm(llama()).set_inference_mode("base")
    with pytest.raises(ValueError, match="must not be negative"):
        ShadowForCausalLM(adapted(llama()), shadow_loss_weight=-1)
    with pytest.raises(ValueError, match="modules_to_save names score"):
        causal_lm(llama(), modules_to_save=["score"])


def test_states_are_normalized_in_new_adapters_of_the_variant_readout_alone() -> None:
    assert ShadowConfig(variant="readout").normalize_injection is True
    assert ShadowConfig().normalize_injection is False
    assert ShadowConfig.from_dict({"variant": "readout"}).normalize_injection is False  # stored before there was the option
    assert ShadowConfig.from_dict(ShadowConfig(variant="readout").to_dict()).normalize_injection is True
    with pytest.raises(ValueError, match="no such form"):
        ShadowConfig(normalize_injection=True)


@pytest.mark.parametrize("variant", ["published", "peft"])
def test_the_other_variants_use_the_state_of_the_shadow(variant: str) -> None:
    assert ShadowConfig.from_dict({"variant": "readout"}).use_shadow_state is True
    with pytest.raises(ValueError, match=f"use_shadow_state is for the variant 'readout'; the formulas of '{variant}'"):
        ShadowConfig(variant=variant, use_shadow_state=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["normalize_injection", "train_base_adapters", "train_shadow_embeddings", "use_shadow_state"]
)
def test_a_switch_is_true_or_false(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 1"):
        ShadowConfig(variant="readout", **{name: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["published", "peft"])
@pytest.mark.parametrize("name", ["output_hidden_size", "readout_hidden_size"])
def test_a_rank_that_a_variant_does_not_have_is_refused(variant: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is for the variant 'readout'"):
        ShadowConfig(variant=variant, **{name: 8})
