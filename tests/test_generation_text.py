"""Generation of text with a real tokenizer: stop strings, pipelines, drafting; and a cache that rounds what it holds."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import pipeline

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import load_base, load_tokenizer
from tests.tiny_models import causal_lm, llama, tokens, with_nonzero_weights

PROMPT = "text: lift the small red box up gently\nkeys: action, object, place, manner\n"


@pytest.fixture(scope="module")
def model() -> ShadowForCausalLM:
    torch.manual_seed(0)
    return ShadowForCausalLM(with_nonzero_weights(get_shadow_model(load_base(), ShadowConfig(shadow_init="base")))).eval()


@pytest.mark.parametrize("drafting", [{}, {"use_shadow_draft": True}])
def test_stop_strings(model: ShadowForCausalLM, drafting: dict[str, bool]) -> None:
    tokenizer = load_tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    whole = tokenizer.decode(model.generate(**inputs, **settings)[0, length:])
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stopped = model.generate(**inputs, **settings, **drafting, stop_strings=[stop], tokenizer=tokenizer)
    text = tokenizer.decode(stopped[0, length:])
    assert whole.startswith(text)
    assert stop in text
    assert stop not in tokenizer.decode(stopped[0, length:-1])


def test_the_pipeline_writes_what_generate_writes(model: ShadowForCausalLM) -> None:
    tokenizer = load_tokenizer()
    settings = {"max_new_tokens": 8, "do_sample": False}
    logging.getLogger("transformers").setLevel(logging.CRITICAL)  # it lists the classes that it knows
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (written,) = write(PROMPT, return_full_text=False, **settings)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert written["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_quantized_cache_holds_the_bases_states_alone() -> None:
    """A fresh adapter changes nothing, so base and backbone caches are right if the bare base writes the same."""
    base, ids = llama(), tokens(2, 9)
    greedy = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    rounded = {**greedy, "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    bare = copy.deepcopy(base)
    expected, exact = (torch.stack(bare.generate(ids, **how).logits) for how in (rounded, greedy))
    assert (expected - exact).abs().max() > 1e-3  # or else the cache rounds nothing
    fresh = ShadowForCausalLM(get_shadow_model(base, ShadowConfig())).eval()
    torch.testing.assert_close(torch.stack(fresh.generate(ids, **rounded).logits), expected)
    alone = causal_lm(llama())
    alone.set_inference_mode("shadow_only")
    kept, exact = (torch.stack(alone.generate(ids, **how).logits) for how in (rounded, greedy))
    torch.testing.assert_close(kept, exact)  # the backbone's own states stay exact
