"""Several named adapters on one base: switching, trainability, files, replacing weights in place, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadow_peft import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification, ShadowPeftModel
from shadow_peft.adapter import ShadowAdapter
from tests.tiny_models import (
    adapted,
    causal_lm,
    classifier,
    gemma3,
    llama,
    llama_classifier,
    qwen3,
    tokens,
    with_nonzero_weights,
)

OTHERS: dict[str, dict[str, Any]] = {
    "published": {"injection_hidden_size": 5, "alpha": 0.4, "dropout": 0.0},
    "peft": {"num_shadow_layers": 2, "dropout": 0.0},
    "readout": {"injection_hidden_size": 3, "shadow_intermediate_size": 24},
    "wide": {"shadow_hidden_size": 16, "dropout": 0.0, "modules_to_save": ["lm_head"]},
    "heads": {"modules_to_save": ["shadow_lm_head"], "dropout": 0.0},
}
"""Name -> settings of adapters that differ in variant, ranks, shadow and heads."""


def config_of(name: str) -> ShadowConfig:
    variant = name if name in ("peft", "readout") else "published"
    return ShadowConfig(variant=variant, **OTHERS[name])


def stir(adapter: ShadowAdapter, seed: int) -> None:
    """Weights that are not zero, and heads that are no copies."""
    with_nonzero_weights(adapter, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in adapter.task_heads.values():
            head.weight.add_(torch.randn(head.weight.shape, generator=generator) * 0.1)


def several(base: Any = None, names: tuple[str, ...] = tuple(OTHERS)) -> ShadowForCausalLM:
    """A causal LM with an adapter "default" and others of all kinds."""
    model = causal_lm(llama() if base is None else base)
    for seed, name in enumerate(names, start=20):
        torch.manual_seed(seed)
        model.add_adapter(name, config_of(name))
        stir(model.peft_model.adapter(name), seed)
    return model.eval()


@torch.no_grad()
def answers(model: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    outputs = model(tokens(), **kwargs)
    return outputs.logits, outputs.shadow_logits


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- switching


def test_a_model_with_one_adapter_has_the_names_that_it_had() -> None:
    model = adapted(llama())
    parts = ("shadow_model", "shadow_injection_model", "shadow_update_model")
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"base_model", *parts}
    assert model.active_adapter == "default"
    assert list(model.adapter_configs) == ["default"]


def test_switching_there_and_back_changes_nothing() -> None:
    model = several()
    first = answers(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = [first]
    for name in OTHERS:
        model.set_adapter(name)
        assert model.active_adapter == name
        assert model.peft_model.shadow_config == config_of(name)
        seen.append(answers(model))
    assert all(not same(a, b) for i, a in enumerate(seen) for b in seen[:i])
    model.set_adapter("default")
    assert same(answers(model), first)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_among_others_is_that_adapter_alone(name: str, tmp_path: Path) -> None:
    model = several()
    model.save_pretrained(tmp_path)
    model.set_adapter(name)
    alone = ShadowForCausalLM.from_pretrained(llama(), tmp_path / name)
    assert same(answers(model), answers(alone))
    assert trained(model).isdisjoint(n for n, _ in model.peft_model.base_model.named_parameters(prefix="base_model"))
    again = ShadowForCausalLM.from_pretrained(llama(), tmp_path / name, is_trainable=True)
    assert trained(model) == trained(again)


def test_what_is_trained_follows_the_active_adapter() -> None:
    model = several()
    model.peft_model.shadow_model.requires_grad_(False)  # a choice of the user, which stays
    before = trained(model)
    model.set_adapter("readout")
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    others = [p for adapter in model.peft_model.other_adapters.values() for p in adapter.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in others)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert "peft_model.shadow_readout_model.up" in trained(model)
    model.set_adapter("default")
    assert trained(model) == before


def test_the_base_is_never_touched() -> None:
    base = llama()
    expected = base(tokens()).logits
    names = [name for name, _ in base.named_modules()]
    model = several(base)
    model.set_adapter("peft")
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, expected)
    assert torch.equal(base(tokens()).logits, expected)
    assert [name for name, _ in base.named_modules()] == names
    assert model.unload() is base
    assert torch.equal(base(tokens()).logits, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_a_deep_copy_and_a_move_take_all_adapters_along() -> None:
    model = several()
    copied = copy.deepcopy(model).to(torch.float64)
    for name in OTHERS:
        model.set_adapter(name)
        copied.set_adapter(name)
        assert {p.dtype for p in copied.parameters()} == {torch.float64}
        for found, expected in zip(answers(copied), answers(model), strict=True):
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4)


def test_checkpointed_training_reaches_adapters_of_before_and_after() -> None:
    model = several(names=("published",))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.add_adapter("later", ShadowConfig(dropout=0.0))
    for name in ("published", "later"):
        model.set_adapter(name)
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
        assert model.peft_model.shadow_model.is_activation_checkpointing
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.gradient_checkpointing_disable()
    assert not model.peft_model.adapter("published").shadow_model.is_activation_checkpointing


def test_the_vocabulary_is_resized_for_all() -> None:
    model = several(names=("published", "readout"))
    model.resize_token_embeddings(104)
    for name in ("published", "readout", "default"):
        model.set_adapter(name)
        assert model(torch.tensor([[100, 5]])).shadow_logits.shape[-1] == 104


def test_a_trained_head_of_any_adapter_stops_a_resize() -> None:
    model = several(names=("published",))
    model.add_adapter("trained", ShadowConfig(modules_to_save=["lm_head"]))
    assert model.active_adapter == "default"
    with pytest.raises(ValueError, match="before heads are copied"):
        model.resize_token_embeddings(104)


def test_classifiers_keep_their_own_heads(tmp_path: Path) -> None:
    model = classifier(llama_classifier())
    first = answers(model)
    model.add_adapter("other", ShadowConfig(variant="readout"))
    stir(model.peft_model.adapter("other"), 4)
    model.set_adapter("other")
    second = answers(model)
    assert not torch.allclose(first[0], second[0])
    model.save_pretrained(tmp_path)
    alone = ShadowForSequenceClassification.from_pretrained(llama_classifier(), tmp_path)
    assert same(answers(alone), first)
    alone.load_adapter(tmp_path / "other", "second")
    alone.set_adapter("second")
    assert same(answers(alone), second)


# ---------------------------------------------------------------- files


def test_default_is_saved_in_the_folder_and_others_in_folders_of_their_names(tmp_path: Path) -> None:
    model = several(names=("published", "peft"))
    model.set_adapter("peft")
    model.save_pretrained(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors")} == {
        "shadow_adapter.safetensors",
        "published/shadow_adapter.safetensors",
        "peft/adapter_model.safetensors",
    }
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    for name in ("published", "peft"):
        loaded.load_adapter(tmp_path / name, name)
    for name in ("published", "peft", "default"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert same(answers(loaded), answers(model))
        assert not trained(loaded)


def test_only_selected_adapters_are_saved(tmp_path: Path) -> None:
    model = several(names=("published", "peft"))
    model.save_pretrained(tmp_path, selected_adapters=["peft"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peft"]
    with pytest.raises(ValueError, match=r"selected_adapters=\['nobody'\]\) is not possible"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])


def test_nothing_is_written_if_one_folder_is_in_use(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "out" / "published")
    before = sorted(p.name for p in (tmp_path / "out").rglob("*"))
    with pytest.raises(ValueError, match="Cannot save into"):
        several(names=("published",)).save_pretrained(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == before


def test_a_trainers_folder_holds_the_active_adapter(tmp_path: Path) -> None:
    model = several(names=("readout",))
    model.set_adapter("readout")
    expected = answers(model)
    model.save_pretrained(tmp_path / "checkpoint-3")
    assert not [p for p in (tmp_path / "checkpoint-3").iterdir() if p.is_dir()]
    assert same(answers(ShadowForCausalLM.from_pretrained(llama(), tmp_path / "checkpoint-3")), expected)
    model.save_pretrained(tmp_path / "gathered", state_dict=model.state_dict())
    assert same(answers(ShadowForCausalLM.from_pretrained(llama(), tmp_path / "gathered")), expected)


def test_an_explicit_shadow_is_rebuilt(tmp_path: Path) -> None:
    torch.manual_seed(3)
    causal_lm(llama(), shadow_model=qwen3(hidden_size=16)).save_pretrained(tmp_path)
    model = causal_lm(llama())
    model.load_adapter(tmp_path, "small")
    model.set_adapter("small")
    assert same(answers(model), answers(ShadowForCausalLM.from_pretrained(llama(), tmp_path)))


# ---------------------------------------------------------------- replacing weights


def test_weights_are_replaced_in_place(tmp_path: Path) -> None:
    other = causal_lm(llama(), seed=9)
    other.save_pretrained(tmp_path)
    model = several(names=("published",))
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    model.set_adapter("published")
    model.hotswap_adapter(tmp_path)
    model.set_adapter("default")
    assert same(answers(model), answers(other))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == where


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"alpha": 0.2}, r"alpha 0\.2 \(here 0\.7\)"),
        ({"variant": "readout"}, "variant 'readout'"),
        ({"injection_hidden_size": 4}, "shape"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ],
)
def test_other_shapes_cannot_be_swapped_in(settings: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    causal_lm(llama(), seed=9, **settings).save_pretrained(tmp_path)
    model = causal_lm(llama(), modules_to_save=["shadow_lm_head"])
    before = answers(model)
    with pytest.raises(ValueError, match=complaint):
        model.hotswap_adapter(tmp_path)
    assert same(answers(model), before)


def test_a_trained_head_is_not_dropped_by_a_swap(tmp_path: Path) -> None:
    causal_lm(llama(), seed=9, modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model = causal_lm(llama())
    before = answers(model)
    with pytest.raises(ValueError, match=r"has a trained lm_head, and the adapter 'default' has none\. Load it"):
        model.hotswap_adapter(tmp_path)
    assert same(answers(model), before)


def test_a_backbone_of_layers_of_another_kind_is_not_swapped_in(tmp_path: Path) -> None:
    """Gemma's layers attend far or near: the same weights compute something else in a layer of the other kind."""

    def make(base: PreTrainedModel, layers: str) -> ShadowForCausalLM:
        return causal_lm(base, seed=9, num_shadow_layers=2, shadow_init_layers=layers)

    for layers in ("0,2", "1,3"):
        make(gemma3(), layers).save_pretrained(tmp_path / layers)
    make(llama(), "0,2").save_pretrained(tmp_path / "llama")
    model = make(gemma3(), "1,3")
    model.hotswap_adapter(tmp_path / "1,3")
    with pytest.raises(ValueError, match=r"layers \[0, 2\] of the base \(here \[1, 3\]\)"):
        model.hotswap_adapter(tmp_path / "0,2")
    make(llama(), "1,3").hotswap_adapter(tmp_path / "llama")  # whose layers are all of one kind


def test_another_backbone_is_not_swapped_in(tmp_path: Path) -> None:
    def explicit(theta: float) -> ShadowForCausalLM:
        rope = {"rope_type": "default", "rope_theta": theta}
        return causal_lm(llama(), shadow_model=qwen3(rope_parameters=rope, num_hidden_layers=1))

    for folder, theta in (("same", 1e4), ("other", 5e3)):
        explicit(theta).save_pretrained(tmp_path / folder)
    causal_lm(llama()).save_pretrained(tmp_path / "implicit")
    model = explicit(1e4)
    model.hotswap_adapter(tmp_path / "same")
    with pytest.raises(ValueError, match="the shadow's rope_parameters"):
        model.hotswap_adapter(tmp_path / "other")
    with pytest.raises(ValueError, match=r"an implicit shadow \(here an explicit one\)"):
        model.hotswap_adapter(tmp_path / "implicit")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "__base__", "keys", "training", "default", "taken", 3])
def test_names_that_cannot_be(name: Any) -> None:
    model = adapted(llama())
    model.add_adapter("taken", ShadowConfig())
    with pytest.raises(ValueError, match="already" if name in ("default", "taken") else "cannot be the name"):
        model.add_adapter(name, ShadowConfig())
    assert list(model.adapter_configs) == ["default", "taken"]


def test_unknown_names_and_the_active_one(tmp_path: Path) -> None:
    model = several(names=("published",))
    for act in (model.set_adapter, model.delete_adapter, model.peft_model.set_requires_grad):
        with pytest.raises(ValueError, match="There is no adapter 'nobody'; there are 'default', 'published'"):
            act("nobody")
    with pytest.raises(ValueError, match="is the active adapter"):
        model.delete_adapter("default")
    model.delete_adapter("published")
    assert list(model.peft_model.adapter_configs) == ["default"]
    model.add_adapter("published", config_of("peft"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_what_would_change_the_base_under_the_others(tmp_path: Path) -> None:
    from tests.test_base_adapters import shadowed, with_lora

    shadowed(with_lora()).save_pretrained(tmp_path)
    model = causal_lm(llama())
    with pytest.raises(ValueError, match="train_base_adapters"):
        model.add_adapter("other", ShadowConfig(train_base_adapters=True))
    with pytest.raises(ValueError, match="brings PEFT adapters"):
        model.load_adapter(tmp_path, "other")
    with pytest.raises(ValueError, match="modules_to_save names score"):
        model.add_adapter("other", ShadowConfig(modules_to_save=["score"]))
    assert list(model.peft_model.adapter_configs) == ["default"]


def test_sliding_windows_and_a_frozen_adapter() -> None:
    model = several(gemma3(), names=("peft", "readout"))
    assert isinstance(model.peft_model, ShadowPeftModel)
    model.peft_model.freeze()
    model.set_adapter("peft")
    model.set_adapter("default")
    assert not trained(model)
