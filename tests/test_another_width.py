"""Shadows of another width than their base: an implicit one with a table of its own, and the projected model's cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from shadow_peft import AutoModelForCausalLMWithHiddenProjection, ShadowForCausalLM
from tests.tiny_models import causal_lm, llama, tokens


@pytest.fixture(params=["published", "peft"])
def narrow(request: pytest.FixtureRequest) -> ShadowForCausalLM:
    """A Llama with an implicit shadow of half its width."""
    return causal_lm(llama(), shadow_hidden_size=16, variant=request.param)


def test_a_narrow_shadow_learns_its_embeddings_and_projection(narrow: ShadowForCausalLM) -> None:
    narrow(input_ids=tokens(), labels=tokens()).loss.backward()
    peft = narrow.peft_model
    assert peft.shadow_model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert peft.shadow_hidden_projection.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in peft.base_model.parameters())


def test_a_narrow_shadow_is_saved_and_loaded(narrow: ShadowForCausalLM, tmp_path: Path) -> None:
    narrow.save_pretrained(tmp_path)
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    with torch.no_grad():
        expected, seen = narrow.eval()(input_ids=tokens()), loaded(input_ids=tokens())
    assert torch.equal(seen.logits, expected.logits)
    assert torch.equal(seen.shadow_logits, expected.shadow_logits)


def test_a_narrow_shadow_stands_alone(narrow: ShadowForCausalLM) -> None:
    exported = narrow.eval().export_shadow()
    assert isinstance(exported, AutoModelForCausalLMWithHiddenProjection)
    with torch.no_grad():
        expected = narrow(input_ids=tokens()).shadow_logits
        torch.testing.assert_close(exported(input_ids=tokens()).logits, expected, rtol=0, atol=1e-5)


def test_a_projected_model_generates_the_same_with_a_cache(narrow: ShadowForCausalLM) -> None:
    exported = narrow.export_shadow()
    settings = {"attention_mask": torch.ones_like(tokens()), "max_new_tokens": 8, "do_sample": False}
    cached = exported.generate(tokens(), **settings, return_dict_in_generate=True)
    assert cached.past_key_values.get_seq_length() == tokens().shape[1] + 7
    assert torch.equal(cached.sequences, exported.generate(tokens(), **settings, use_cache=False))


def test_a_recurrent_projected_model_computes_and_generates() -> None:
    """Mamba's state has another name than a cache, and its outputs have no attentions."""
    model = causal_lm(
        MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, state_size=4)),
        shadow_hidden_size=16,
    )
    model.eval()
    exported = model.export_shadow().eval()
    model.set_inference_mode("shadow_only")
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-5)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(exported.generate(tokens(), **settings), model.generate(tokens(), **settings))
