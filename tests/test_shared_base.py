"""Several shadows on one base, attaching and loading that fail, and what a base is given back as."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import shadow_peft.model as model_module
from shadow_peft import ShadowConfig, ShadowForCausalLM, ShadowPeftModel, get_shadow_model
from shadow_peft.adapter import ShadowAdapter
from shadow_peft.base import hooks, peft_adapters
from shadow_peft.checkpoint import store
from tests.test_base_adapters import shadowed, with_lora
from tests.tiny_models import adapted, causal_lm, llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it


def mixed_base() -> PreTrainedModel:
    """A base of which parts are frozen and parts in training mode."""
    base = llama()
    base.model.layers[1].requires_grad_(False)
    base.lm_head.train()
    return base


def facts(base: PreTrainedModel) -> dict[str, Any]:
    """All that a shadow must give back as it was."""
    return {
        "state": {name: tensor.detach().clone() for name, tensor in base.state_dict().items()},
        "memory": {name: p.data_ptr() for name, p in base.named_parameters()},
        "trainable": {name: p.requires_grad for name, p in base.named_parameters()},
        "training": {name: module.training for name, module in base.named_modules()},
        "classes": {name: type(module) for name, module in base.named_modules()},
        "hooks": [n for n, m in base.named_modules() if m._forward_hooks or m._forward_pre_hooks],
        "attributes": {
            name for name in vars(base) if not name.startswith("_require_grads_hook")
        },  # an empty list of transformers
        "checkpointing": [n for n, m in base.named_modules() if getattr(m, "gradient_checkpointing", False)],
    }


def same(base: PreTrainedModel, before: dict[str, Any]) -> None:
    found = facts(base)
    for kind, expected in before.items():
        if kind == "state":
            assert found[kind].keys() == expected.keys()
            assert not [name for name, tensor in expected.items() if not torch.equal(found[kind][name], tensor)]
        else:
            assert found[kind] == expected, kind


# ---------------------------------------------------------------- several shadows


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_last_unload_gives_the_base_back(order: tuple[int, ...]) -> None:
    base = mixed_base()
    before = facts(base)
    shadows = [adapted(base, seed=seed, variant=v) for seed, v in enumerate(("published", "peft", "readout"))]
    shadows[0].train()
    for i, shadow in enumerate(shadows):
        expected = adapted(llama(), seed=i, variant=shadow.shadow_config.variant)(tokens()).logits
        assert torch.equal(shadow.eval()(tokens()).logits, expected)
    for gone in order[:2]:
        shadows[gone].unload()
        assert not any(p.requires_grad for p in base.parameters())
        assert base.lm_head.training is base.training
    shadows[order[2]].unload()
    same(base, before)


def test_a_shadow_that_was_dropped_does_not_keep_the_base() -> None:
    base = mixed_base()
    before = facts(base)
    first, second = adapted(base, seed=1), adapted(base, seed=2)
    del first
    gc.collect()
    second.unload()
    same(base, before)


def test_a_copy_of_the_base_is_given_back_on_its_own() -> None:
    base = mixed_base()
    first = adapted(base)
    copied = copy.deepcopy(base)
    before = {name: p.requires_grad for name, p in copied.named_parameters()}
    mode = copied.training
    adapted(copied).train().unload()
    assert {name: p.requires_grad for name, p in copied.named_parameters()} == before
    assert copied.training is mode
    first.unload()


def test_a_copied_shadow_gives_its_own_base_back() -> None:
    base = mixed_base()
    before = facts(base)
    original = adapted(base)
    copied = copy.deepcopy(original)
    given = copied.unload()
    assert not any(p.requires_grad for p in base.parameters())
    assert {n: p.requires_grad for n, p in given.named_parameters()} == before["trainable"]
    original.unload()
    same(base, before)


def test_activation_checkpointing_goes_with_the_last_one() -> None:
    base = llama()
    before = facts(base)
    first, second = adapted(base, seed=1), adapted(base, seed=2)
    first.gradient_checkpointing_enable()
    first.unload()
    second.unload()
    same(base, before)
    base.activation_checkpointing_enable()
    before = facts(base)
    first = adapted(base)
    first.gradient_checkpointing_enable()
    first.unload()
    same(base, before)


def test_a_second_shadow_leaves_what_the_first_one_trains(tmp_path: Path) -> None:
    base = with_lora()
    adapted(with_lora(), seed=5).save_pretrained(tmp_path)
    first = get_shadow_model(base, ShadowConfig(train_base_adapters=True))
    trained = [name for name, p in first.named_parameters() if p.requires_grad]
    second = ShadowPeftModel.from_pretrained(base, tmp_path)
    assert [name for name, p in first.named_parameters() if p.requires_grad] == trained
    assert any("lora_" in name for name in trained)
    second.unload()
    assert [name for name, p in first.named_parameters() if p.requires_grad] == trained


def test_adapters_of_a_checkpoint_do_not_come_under_another_shadow(tmp_path: Path) -> None:
    shadowed(with_lora()).save_pretrained(tmp_path / "one")
    other = shadowed(with_lora())
    with torch.no_grad():
        for parameter in peft_adapters.adapter_parameters(other.peft_model.base_model).values():
            parameter.mul_(2)
    other.save_pretrained(tmp_path / "other")

    base = llama()
    first = adapted(base)
    expected = first(tokens()).logits
    with pytest.raises(ValueError, match="carries another shadow already"):
        ShadowForCausalLM.from_pretrained(base, tmp_path / "one")
    assert torch.equal(first(tokens()).logits, expected)
    first.unload()

    before = facts(base)
    first = ShadowForCausalLM.from_pretrained(base, tmp_path / "one")
    expected = first(tokens()).logits
    with pytest.raises(ValueError, match="carries another shadow already"):
        ShadowForCausalLM.from_pretrained(base, tmp_path / "other")
    second = ShadowForCausalLM.from_pretrained(base, tmp_path / "one")
    assert torch.equal(second(tokens()).logits, expected)
    first.peft_model.unload()
    assert torch.equal(second(tokens()).logits, expected)
    second.peft_model.unload()
    same(base, before)


# ---------------------------------------------------------------- what fails


class Failure(BaseException):
    """None that anybody expects."""


def fail_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int = 1) -> None:
    """Let the given call of a function do its work and fail then."""
    original, calls = getattr(owner, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            raise Failure
        return result

    monkeypatch.setattr(owner, name, failing)


POINTS: dict[str, tuple[Any, str, int]] = {
    "building the adapter": (ShadowAdapter, "_add_layer_parts", 1),
    "freezing": (peft_adapters, "freeze", 1),
    "a hook in the middle": (torch.nn.Module, "register_forward_pre_hook", 2),
    "the last hook": (hooks.Attachment, "__init__", 1),
    "holding": (hooks.Attachment, "hold", 1),
    "the mode": (torch.nn.Module, "train", 3),
    "attaching": (model_module.ShadowPeftModel, "_attach", 1),
}
LOADING: dict[str, tuple[Any, str, int]] = {
    **POINTS,
    "injecting": (peft_adapters, "inject_adapters", 1),
    "a LoRA layer in the middle": (torch.nn.ModuleDict, "update", 5),
    "a head": (ShadowForCausalLM, "_fresh_head", 1),
    "loading": (store, "load_into", 1),
    "copying": (store, "fill", 1),
    "freezing what is not trained": (ShadowPeftModel, "freeze", 1),
    "the task model": (ShadowForCausalLM, "_rebuild_heads", 1),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("others", [0, 1])
def test_a_failed_attach_leaves_the_base(point: str, others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = mixed_base()
    kept = [adapted(base, seed=seed) for seed in range(others)]
    before = facts(base)
    fail_in(monkeypatch, *POINTS[point])
    with pytest.raises(Failure):
        get_shadow_model(base, ShadowConfig())
    monkeypatch.undo()
    same(base, before)
    for shadow in kept:
        assert torch.equal(shadow.eval()(tokens()).logits, adapted(llama(), seed=0)(tokens()).logits)


@pytest.mark.parametrize("point", LOADING)
@pytest.mark.parametrize("onto", ["bare", "carrying"])
def test_a_failed_load_leaves_the_base(point: str, onto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shadowed(with_lora(init_lora_weights="olora"), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    base = mixed_base() if onto == "bare" else with_lora(seed=8).get_base_model()
    before = facts(base)
    fail_in(monkeypatch, *LOADING[point])
    if onto == "carrying" and point in ("injecting", "a LoRA layer in the middle"):
        ShadowForCausalLM.from_pretrained(base, tmp_path).peft_model.unload()
        return
    with pytest.raises(Failure):
        ShadowForCausalLM.from_pretrained(base, tmp_path)
    monkeypatch.undo()
    same(base, before)


@pytest.mark.parametrize("load", [ShadowForCausalLM.from_pretrained, ShadowPeftModel.from_pretrained, get_shadow_model])
def test_what_is_no_model_is_said(load: Callable[..., Any], tmp_path: Path) -> None:
    causal_lm(llama()).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="Got the name 'gpt2'; load the base first"):
        load("gpt2", ShadowConfig() if load is get_shadow_model else tmp_path)


# ---------------------------------------------------------------- adapters that change the base's weights

INITS = ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian", True]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("moved", [False, True])
def test_weights_that_an_adapter_changed_come_back(init: Any, moved: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    targets = ["q_proj", "down_proj", "embed_tokens"]
    made_on = get_peft_model(llama(), LoraConfig(r=4, target_modules=targets, init_lora_weights=init)).eval()
    model = shadowed(made_on, train=True)
    expected = model.eval()(tokens()).logits
    model.save_pretrained(tmp_path)

    base = mixed_base()
    before = facts(base)
    loaded = ShadowForCausalLM.from_pretrained(base, tmp_path)
    if init != "pissa_niter_4":  # which draws at random
        torch.testing.assert_close(loaded(tokens()).logits, expected)
    if moved:
        loaded.to(torch.float64)
        loaded.to(torch.float32)
        del before["memory"]
    assert loaded.peft_model.unload() is base
    same(base, before)


@pytest.mark.parametrize("method", ["LOHA", "LOKR", "IA3", "OFT", "HRA", "MISS", "VERA", "ADALORA", "RANDLORA"])
def test_adapters_of_other_methods_come_and_go(method: str, tmp_path: Path) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    settings: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
    settings |= {"IA3": {"feedforward_modules": ["down_proj"]}, "ADALORA": {"total_step": 10}}.get(method, {})
    settings |= {"OFT": {"oft_block_size": 4}, "MISS": {"r": 4}}.get(method, {})
    torch.manual_seed(3)
    wrapped = get_peft_model(llama(), PEFT_TYPE_TO_CONFIG_MAPPING[method](**settings)).eval()
    model = shadowed(wrapped, train=True)
    expected = model.eval()(tokens()).logits
    model.save_pretrained(tmp_path)
    base = mixed_base()
    before = facts(base)
    loaded = ShadowForCausalLM.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, expected)
    loaded.peft_model.unload()
    same(base, before)


def test_unloading_one_leaves_the_others_checkpointing() -> None:
    base = llama()
    first, second = adapted(base), adapted(base)
    for shadow in (first, second):
        shadow.gradient_checkpointing_enable()
    first.unload()
    assert base.model.layers[1].gradient_checkpointing
    second.unload()
    assert not base.model.layers[1].gradient_checkpointing
