"""The base is a guest: nothing about it changes while an adapter rides it, and it is given back as it was."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from tests.tiny_models import BASES, adapted, causal_lm, llama, tokens

bases = pytest.mark.parametrize("name", BASES)


def hooks_of(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@bases
def test_names_class_and_state_dict_stay(name: str) -> None:
    base = BASES[name]()
    names, kind = [n for n, _ in base.named_modules()], type(base)
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = causal_lm(base)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert [n for n, _ in base.named_modules()] == names
    assert type(base) is kind
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(base.state_dict()[key], tensor) for key, tensor in state.items())
    assert all("forward" not in module.__dict__ for module in base.modules())


@bases
def test_calling_the_base_is_the_bare_base(name: str) -> None:
    base, ids = BASES[name](), tokens()
    before = base(ids).logits
    model = causal_lm(base)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    assert torch.equal(base(ids).logits, before)
    assert torch.equal(
        base.generate(ids, max_new_tokens=4, do_sample=False), BASES[name]().generate(ids, max_new_tokens=4, do_sample=False)
    )


def test_an_unloaded_adapter_says_so() -> None:
    base, ids = llama(), tokens()
    model = causal_lm(base)
    assert not any(p.requires_grad for p in base.parameters())
    model.peft_model.unload()
    with pytest.raises(RuntimeError, match="unloaded"):
        model(ids)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_leaves_no_trace_and_reaches_no_frozen_layer(reentrant: bool) -> None:
    base, ids = llama(), tokens()
    model = causal_lm(base).train()
    reached = []
    base.model.layers[0].mlp.register_full_backward_hook(lambda *_: reached.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(ids, labels=ids).loss.backward()
    assert not reached
    base.model.layers[0].mlp._backward_hooks.clear()
    assert base.is_activation_checkpointing
    model.peft_model.unload()
    assert not base.is_activation_checkpointing
    assert hooks_of(base) == 0


def test_parameters_frozen_before_stay_frozen_after() -> None:
    base = llama()
    base.lm_head.requires_grad_(False)
    get_shadow_model(base, ShadowConfig()).unload()
    assert not base.lm_head.weight.requires_grad
    assert base.model.norm.weight.requires_grad


def test_disable_adapter_is_the_base() -> None:
    base, ids = llama(), tokens()
    before, model = base(ids).logits, causal_lm(base)
    adapted_logits = model(ids).logits
    with model.disable_adapter():
        outputs = model(ids)
        assert torch.equal(outputs.logits, before)
        assert outputs.shadow_logits is None
        assert torch.equal(
            model.generate(ids, max_new_tokens=6, do_sample=False), llama().generate(ids, max_new_tokens=6, do_sample=False)
        )
    assert torch.equal(model(ids).logits, adapted_logits)


def test_an_error_inside_a_forward_leaves_a_bare_base() -> None:
    base, ids = llama(), tokens()
    before, model = base(ids).logits, causal_lm(base)
    adapted_logits = model(ids).logits
    broken = base.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    broken.remove()
    assert torch.equal(base(ids).logits, before)
    assert torch.equal(model(ids).logits, adapted_logits)


def test_dropping_the_wrapper_takes_its_hooks_away() -> None:
    base, ids = llama(), tokens()
    before, model = base(ids).logits, causal_lm(base)
    model(ids)
    del model
    gc.collect()
    assert hooks_of(base) == 0
    assert torch.equal(base(ids).logits, before)


def test_two_adapters_on_one_base() -> None:
    base, ids = llama(), tokens()
    first, second = causal_lm(base, seed=1), causal_lm(base, seed=2, alpha=0.4)
    alone = [causal_lm(llama(), seed=1)(ids).logits, causal_lm(llama(), seed=2, alpha=0.4)(ids).logits]
    torch.testing.assert_close(first(ids).logits, alone[0])
    torch.testing.assert_close(second(ids).logits, alone[1])
    first.peft_model.unload()
    torch.testing.assert_close(second(ids).logits, alone[1])


def test_the_base_saves_what_it_always_saved(tmp_path: Path) -> None:
    base, ids = llama(), tokens()
    before, model = base(ids).logits, causal_lm(base)
    model.peft_model.base_model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, before)


def test_unknown_attributes_are_the_bases() -> None:
    base = llama()
    peft = adapted(base)
    assert peft.lm_head is base.lm_head
    assert ShadowForCausalLM(peft).name_or_path == base.name_or_path
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = peft.no_such_thing
    with pytest.raises(TypeError, match="ShadowForCausalLM"):
        peft.generate(tokens())
