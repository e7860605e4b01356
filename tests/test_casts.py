"""Beside a base in half precision weights are cast once a generation, and again where they changed."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteria

from shadow_peft import ShadowForCausalLM
from shadow_peft.layers.casts import cast, cast_once
from tests.tiny_models import adapted, causal_lm, gpt2, llama, tokens, with_nonzero_weights

SETTINGS = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
MODELS = {
    "published": lambda: causal_lm(llama().bfloat16(), variant="published"),
    "peft": lambda: causal_lm(llama().bfloat16(), variant="peft"),
    "readout": lambda: causal_lm(llama().bfloat16(), variant="readout"),
    "Conv1D": lambda: causal_lm(gpt2().bfloat16()),
    "explicit": lambda: ShadowForCausalLM(
        with_nonzero_weights(adapted(llama().bfloat16(), shadow_model=llama(hidden_size=48).float()))
    ).eval(),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> ShadowForCausalLM:
    return MODELS[request.param]()


class WeightCasts(TorchDispatchMode):
    """Counts casts of parameters with at least two dimensions, by the pass in which they are made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() > 1}
        self.counts: list[int] = []
        model.register_forward_pre_hook(lambda *_: self.counts.append(0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_to_copy" in str(func) and args[0].untyped_storage().data_ptr() in self.storages:
            self.counts[-1] += 1
        return func(*args, **(kwargs or {}))


def generate(model: ShadowForCausalLM, **settings: Any) -> Tensor:
    return torch.stack(model.generate(tokens(2, 5), **SETTINGS, **settings).logits)


def test_a_generation_casts_each_weight_once(model: ShadowForCausalLM) -> None:
    with WeightCasts(model) as casts:
        generate(model)
    first, *others = casts.counts
    assert first > 0
    assert others == [0] * 5


def test_nothing_is_cast_more_often_by_drafting() -> None:
    model = MODELS["readout"]()
    with WeightCasts(model) as casts:
        generate(model, use_shadow_draft=True, num_assistant_tokens=2, num_assistant_tokens_schedule="constant")
    assert sum(casts.counts[1:]) == 0


def test_logits_are_those_of_casts_in_every_pass(model: ShadowForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    once = generate(model)
    monkeypatch.setattr("shadow_peft.generation.mixin.cast_once", contextlib.nullcontext)
    assert torch.equal(once, generate(model))


class Changes(StoppingCriteria):
    """Changes the adapter behind the second token, and stops nothing."""

    def __init__(self, change: Any) -> None:
        self.change, self.calls = change, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            self.change()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def in_place(model: ShadowForCausalLM) -> None:
    for parameter in model.peft_model.parts()["shadow_injection_model"].parameters():
        parameter.mul_(3)
    next(iter(p for p in model.peft_model.shadow_model.parameters() if p.dim() > 1)).mul_(3)


def replaced(model: ShadowForCausalLM) -> None:
    peft = model.peft_model
    peft.shadow_injection_model.injection_ups = nn.Parameter(3 * peft.shadow_injection_model.injection_ups)
    linear = next(m for m in peft.shadow_model.modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(3 * linear.weight)


def moved(model: ShadowForCausalLM) -> None:
    model.peft_model.shadow_injection_model.double()
    model.peft_model.shadow_model.bfloat16()


@pytest.mark.parametrize("change", [in_place, replaced, moved])
def test_a_change_in_the_middle_is_noticed(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def produced() -> Tensor:
        model = MODELS["readout"]()
        return generate(model, stopping_criteria=[Changes(lambda: change(model))])

    noticed, unchanged = produced(), generate(MODELS["readout"]())
    assert not torch.equal(noticed, unchanged) or change is moved
    monkeypatch.setattr("shadow_peft.generation.mixin.cast_once", contextlib.nullcontext)
    assert torch.equal(noticed, produced())


def test_copies_go_with_the_context_and_belong_to_its_thread() -> None:
    parameter, others = nn.Parameter(torch.ones(4)), []
    with torch.no_grad(), cast_once():
        kept = cast(parameter, torch.bfloat16)
        assert cast(parameter, torch.bfloat16) is kept
        assert cast(parameter, torch.float32) is parameter
        with cast_once():
            assert cast(parameter, torch.bfloat16) is kept
        thread = threading.Thread(target=torch.no_grad()(lambda: others.append(cast(parameter, torch.bfloat16))))
        thread.start()
        thread.join()
        assert others[0] is not kept
        with torch.enable_grad():
            assert cast(parameter, torch.bfloat16).grad_fn is not None
    gone = weakref.ref(kept)
    del kept
    gc.collect()
    assert gone() is None
