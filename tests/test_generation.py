"""Every way of decoding equals decoding without a cache, on different kinds of attention and state."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

from shadow_peft import ShadowCache, ShadowForCausalLM
from tests.tiny_models import CROPPABLE, FAMILIES, causal_lm, llama, tokens

GREEDY = {"max_new_tokens": 8, "do_sample": False}


WITHOUT_STATE = "llama, whose adapter does not use the shadow's state"


@pytest.fixture(params=[*FAMILIES, WITHOUT_STATE])
def model(request: pytest.FixtureRequest) -> ShadowForCausalLM:
    if request.param == WITHOUT_STATE:
        return causal_lm(llama(), num_shadow_layers=2, variant="readout", use_shadow_state=False)
    return causal_lm(FAMILIES[request.param](), num_shadow_layers=2)


@pytest.fixture(params=["base_shadow", "shadow_only"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def uncached(model: ShadowForCausalLM, ids: torch.Tensor, steps: int, **kwargs: torch.Tensor) -> torch.Tensor:
    """Greedy tokens `[B, steps]` from full forwards."""
    sequence = ids
    with torch.no_grad():
        for _ in range(steps):
            mask = kwargs.get("attention_mask")
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(ids), sequence.shape[1] - mask.shape[1])], 1)
            logits = model(sequence, attention_mask=mask, use_cache=False).logits
            sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], 1)
    return sequence[:, ids.shape[1] :]


def test_greedy_of_a_left_padded_batch(model: ShadowForCausalLM, mode: str) -> None:
    model.set_inference_mode(mode)
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, pads in enumerate((0, 3, 5)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    produced = model.generate(ids, attention_mask=mask, **GREEDY)[:, 9:]
    assert torch.equal(produced, uncached(model, ids, 8, attention_mask=mask))


WAYS = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams with several sequences": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_equal_themselves_without_a_cache(model: ShadowForCausalLM, mode: str, way: str) -> None:
    model.set_inference_mode(mode)
    produced = []
    for use_cache in (True, False):
        torch.manual_seed(2)
        produced.append(model.generate(tokens(2, 7), max_new_tokens=6, use_cache=use_cache, **WAYS[way]))
    assert torch.equal(*produced)


def test_embeddings_as_prompt(model: ShadowForCausalLM, mode: str) -> None:
    model.set_inference_mode(mode)
    ids = tokens(2, 7)
    embeds = model.get_input_embeddings()(ids)
    produced = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(produced, model.generate(ids, **GREEDY)[:, 7:])


@pytest.mark.parametrize("name", CROPPABLE)
def test_chunked_prefill(name: str, mode: str) -> None:
    model = causal_lm(FAMILIES[name](), num_shadow_layers=2)
    model.set_inference_mode(mode)
    ids = tokens(2, 9)
    assert torch.equal(model.generate(ids, prefill_chunk_size=4, **GREEDY), model.generate(ids, **GREEDY))


def test_a_conversation_continues_from_its_cache(model: ShadowForCausalLM, mode: str) -> None:
    model.set_inference_mode(mode)
    first = model.generate(tokens(1, 6), return_dict_in_generate=True, **GREEDY)
    assert isinstance(first.past_key_values, ShadowCache)
    longer = torch.cat([first.sequences, tokens(1, 4, seed=9)], 1)
    mask = torch.ones_like(longer)  # or else generate takes a generated 0 for padding
    second = model.generate(longer, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, model.generate(longer, attention_mask=mask, **GREEDY))


def test_a_prefix_is_cached_once_for_several_continuations(model: ShadowForCausalLM) -> None:
    prefix = tokens(1, 6)
    with torch.no_grad():
        cache = model(prefix, use_cache=True).past_key_values
    for seed in (4, 5):
        prompt = torch.cat([prefix, tokens(1, 3, seed=seed)], 1)
        produced = model.generate(prompt, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(produced, model.generate(prompt, **GREEDY))


@pytest.mark.parametrize("kind", ["static", "offloaded", "dynamic"])
def test_kinds_of_cache(model: ShadowForCausalLM, mode: str, kind: str) -> None:
    model.set_inference_mode(mode)
    if kind == "offloaded" and not torch.accelerator.is_available():
        pytest.skip("offloading a cache needs an accelerator")
    ids = tokens(2, 7)
    produced = model.generate(ids, cache_implementation=kind, disable_compile=True, **GREEDY)
    assert torch.equal(produced, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("name", CROPPABLE)
def test_an_external_assistant_and_prompt_lookup(name: str) -> None:
    model, ids = causal_lm(FAMILIES[name](), num_shadow_layers=2), tokens(1, 7)
    expected = model.generate(ids, max_new_tokens=14, do_sample=False)
    assistant = FAMILIES[name]()
    assert torch.equal(model.generate(ids, assistant_model=assistant, max_new_tokens=14, do_sample=False), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=14, do_sample=False), expected)


def test_an_empty_cache_of_the_callers(model: ShadowForCausalLM) -> None:
    ids = tokens(2, 7)
    produced = model.generate(ids, past_key_values=DynamicCache(config=model.config), **GREEDY)
    assert torch.equal(produced, model.generate(ids, **GREEDY))


def test_a_cache_that_the_base_has_not_seen_is_refused() -> None:
    model, ids = causal_lm(llama()), tokens(1, 6)
    model.set_inference_mode("shadow_only")
    cache = model(ids, use_cache=True).past_key_values
    model.set_inference_mode("base_shadow")
    with pytest.raises(ValueError, match="the base has not seen"):
        model(ids[:, :1], past_key_values=cache)


def test_scores_and_logits_are_those_of_the_full_forward() -> None:
    model, ids = causal_lm(llama()), tokens(2, 7)
    outputs = model.generate(ids, return_dict_in_generate=True, output_logits=True, output_scores=True, **GREEDY)
    full = model(outputs.sequences).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(outputs.logits, 1), full, rtol=0, atol=2e-5)


class Words:
    """A tokenizer that a streamer can use: token 7 reads `w7 `."""

    def decode(self, ids, **kwargs) -> str:
        return "".join(f"w{int(i)} " for i in ids)


def test_streamers_get_every_token() -> None:
    model, ids = causal_lm(llama()), tokens(1, 5)
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    produced = model.generate(ids, streamer=streamer, **GREEDY)
    assert "".join(streamer) == Words().decode(produced[0, 5:])


def test_crop_reset_and_length_act_on_both_caches() -> None:
    model, ids = causal_lm(llama()), tokens(2, 9)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        full = model(torch.cat([ids[:, :5], ids[:, 7:]], 1))
        cache.crop(-4)
        assert cache.get_seq_length() == cache.base.get_seq_length() == cache.shadow.get_seq_length() == 5
        again = model(ids[:, 7:], past_key_values=cache)
        torch.testing.assert_close(again.logits, full.logits[:, 5:], rtol=0, atol=2e-5)
        torch.testing.assert_close(again.shadow_logits, full.shadow_logits[:, 5:], rtol=0, atol=2e-5)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    assert {layer.keys.shape[0] for layer in cache.layers} == {3}
    cache.reset()
    assert not cache.shadow.layers[0].is_initialized or cache.shadow.get_seq_length() == 0
