"""State belongs to the call: nothing of a forward or a generation survives on a module."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from shadow_peft import ShadowCache, ShadowForCausalLM
from tests.tiny_models import causal_lm, llama, tokens


def held_tensors(model: ShadowForCausalLM) -> set[int]:
    known = {id(t) for t in (*model.parameters(), *model.buffers())}
    found = set()
    for module in model.modules():
        decoder = list(module.__dict__.values())
        while decoder:
            value = decoder.pop()
            if isinstance(value, torch.Tensor) and id(value) not in known:
                found.add(id(value))
            elif isinstance(value, dict):
                decoder += value.values()
            elif isinstance(value, (list, tuple, set)):
                decoder += value
    return found


def test_no_tensor_of_a_call_survives_on_a_module() -> None:
    model, ids = causal_lm(llama()), tokens()
    before = held_tensors(model)
    alive = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
    model(ids, labels=ids, use_cache=True).loss.backward()
    model.zero_grad(set_to_none=True)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    gc.collect()
    assert held_tensors(model) == before
    left = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and id(o) not in alive]
    assert not [t.shape for t in left if t.dim() == 3 and t.shape[-1] == 32 and t.shape[0] == 3]
    assert model.peft_model.attachment.coupling is None


def test_two_interleaved_generations_are_each_right() -> None:
    model = causal_lm(llama())
    prompts = [tokens(1, 6, seed=1), tokens(1, 9, seed=2)]
    expected = [model.generate(p, max_new_tokens=8, do_sample=False) for p in prompts]
    sequences, caches, steps = list(prompts), [None, None], list(prompts)
    with torch.no_grad():
        for _ in range(8):
            for i in (0, 1):
                outputs = model(steps[i], past_key_values=caches[i], use_cache=True)
                caches[i], steps[i] = outputs.past_key_values, outputs.logits[:, -1:].argmax(-1)
                sequences[i] = torch.cat([sequences[i], steps[i]], 1)
    assert torch.equal(sequences[0], expected[0])
    assert torch.equal(sequences[1], expected[1])


def test_two_threads_do_not_meet() -> None:
    model = causal_lm(llama())
    prompts = [tokens(1, 5 + i, seed=i) for i in range(8)]
    expected = [model.generate(p, max_new_tokens=6, do_sample=False) for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        produced = list(pool.map(lambda p: model.generate(p, max_new_tokens=6, do_sample=False), prompts))
    assert all(torch.equal(a, b) for a, b in zip(expected, produced, strict=True))


def test_modes_can_alternate_between_calls() -> None:
    model, ids = causal_lm(llama()), tokens(1, 6)
    together = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.set_inference_mode("shadow_only")
    alone = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(alone, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))
    model.set_inference_mode("base_shadow")
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), together)


def test_shadow_only_runs_no_layer_of_the_base() -> None:
    model, ids = causal_lm(llama()), tokens(1, 6)
    model.set_inference_mode("shadow_only")
    ran = []
    for layer in model.peft_model.base_model.model.layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model(ids).logits, model(ids).shadow_logits)
    assert not ran


def test_a_cache_the_shadow_has_not_seen_is_refused() -> None:
    model, ids = causal_lm(llama()), tokens(1, 6)
    filled = model.peft_model.base_model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="6 tokens that the shadow has not seen"):
        model(ids[:, :1], past_key_values=filled)
    empty = DynamicCache(config=model.config)
    assert isinstance(model(ids, past_key_values=empty).past_key_values, ShadowCache)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"do_sample": True, "num_return_sequences": 3}]
)
def test_other_ways_of_decoding_agree_with_uncached_ones(settings: dict[str, object]) -> None:
    model, ids = causal_lm(llama()), tokens(2, 5)
    produced = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        produced.append(model.generate(ids, max_new_tokens=6, use_cache=use_cache, **{"do_sample": False, **settings}))
    assert torch.equal(*produced)


def test_static_cache_agrees() -> None:
    model, ids = causal_lm(llama()), tokens(2, 5)
    settings = {"max_new_tokens": 6, "do_sample": False}
    dynamic = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **settings), dynamic)
