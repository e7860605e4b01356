"""What would go wrong without a word is one clear error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, BertModel, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from shadow_peft import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification, get_shadow_model
from tests.tiny_models import adapted, causal_lm, classifier, llama, llama_classifier, qwen3_classifier, tokens

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def test_an_encoder_is_no_base() -> None:
    with pytest.raises(ValueError, match="is_decoder=True"):
        get_shadow_model(BertModel(BertConfig(**TINY, vocab_size=64)), ShadowConfig())
    with pytest.raises(ValueError, match="no decoder-only language model"):
        get_shadow_model(ViTModel(ViTConfig(**TINY, image_size=8, patch_size=4)), ShadowConfig())
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64))
    with pytest.raises(ValueError, match="no decoder-only language model"):
        get_shadow_model(t5, ShadowConfig())
    get_shadow_model(BertLMHeadModel(BertConfig(**TINY, vocab_size=64, is_decoder=True)), ShadowConfig())


def test_a_shadow_of_another_vocabulary_is_no_shadow(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="64 tokens, the base's 96"):
        get_shadow_model(llama(), ShadowConfig(), shadow_model=llama(vocab_size=64))
    with caplog.at_level(logging.WARNING, "shadow_peft"):
        get_shadow_model(llama(vocab_size=1000), ShadowConfig(), shadow_model=llama(vocab_size=995))
    assert "995 rows, the base's 1000" in caplog.text


def test_a_base_stays_as_it_was_when_attaching_fails() -> None:
    base = llama().train()
    trainable = [name for name, p in base.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="tokens"):
        get_shadow_model(base, ShadowConfig(), shadow_model=llama(vocab_size=64))
    assert [name for name, p in base.named_parameters() if p.requires_grad] == trainable
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


@pytest.mark.parametrize("variant", ["published", "readout"])
def test_a_cache_that_is_out_of_step_is_refused(variant: str) -> None:
    model, ids = causal_lm(llama(), variant=variant), tokens(2, 8)
    with torch.no_grad():
        for other in ("disabled", "shadow_only"):
            cache = model(ids[:, :4], use_cache=True).past_key_values
            if other == "disabled":
                with model.disable_adapter():
                    model(ids[:, 4:6], past_key_values=cache, use_cache=True)
            else:
                model.set_inference_mode("shadow_only")
                model(ids[:, 4:6], past_key_values=cache, use_cache=True)
                model.set_inference_mode("base_shadow")
            with pytest.raises(ValueError, match="used alone"):
                model(ids[:, 6:], past_key_values=cache, use_cache=True)


def test_the_map_of_embeddings_follows_a_trained_table() -> None:
    model, ids = adapted(llama(), shadow_model=llama(5, hidden_size=16), train_shadow_embeddings=True), tokens(2, 6)
    embeds = model.get_input_embeddings()(ids)
    before = model.forward_with_shadow(inputs_embeds=embeds)[1]
    with torch.no_grad():
        model.shadow_model.get_input_embeddings().weight.mul_(2.0)
    torch.testing.assert_close(
        model._to_shadow_width(embeds), 2 * adapted(llama(), shadow_model=llama(5, hidden_size=16))._to_shadow_width(embeds)
    )
    assert not torch.allclose(model.forward_with_shadow(inputs_embeds=embeds)[1], before)


@pytest.mark.parametrize("variant", ["published", "readout"])
def test_the_last_hidden_state_is_what_the_head_reads(variant: str) -> None:
    model = causal_lm(llama(), variant=variant)
    outputs = model(tokens(), output_hidden_states=True)
    torch.testing.assert_close(model.peft_model.base_model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert len(outputs.hidden_states) == 5


def test_the_warmup_of_distillation_leaves_the_evaluation_alone() -> None:
    model, ids = causal_lm(llama()), tokens()
    model.distillation_weight, model.distillation_warmup_ratio = 0.7, 0.5
    losses = []
    for progress in (0.0, 0.25, 1.0):
        model.training_progress = progress
        losses.append(model(ids, labels=ids).loss)
    assert losses[0] == losses[1] == losses[2]
    model.train()
    model.training_progress = 0.0
    assert model(ids, labels=ids).loss < losses[0]


@pytest.mark.parametrize("width", [None, 16])
def test_resized_embeddings_reach_base_shadow_and_heads(width: int | None) -> None:
    shadow = None if width is None else llama(5, hidden_size=width)
    model = ShadowForCausalLM(adapted(llama(), shadow_model=shadow))
    model.resize_token_embeddings(100)
    outputs = model(torch.tensor([[99, 3, 98]]))
    assert outputs.logits.shape == outputs.shadow_logits.shape == (1, 3, 100)
    assert not any(p.requires_grad for p in model.peft_model.base_model.parameters())


def test_a_base_that_is_resized_behind_the_models_back_has_its_new_head() -> None:
    model = causal_lm(llama())
    model.peft_model.base_model.resize_token_embeddings(100)
    assert model(torch.tensor([[99, 3, 98]])).shadow_logits.shape == (1, 3, 100)


@pytest.mark.parametrize("make", [causal_lm, lambda base, **config: classifier(qwen3_classifier(), **config)])
def test_outputs_come_in_the_order_of_transformers(make: Callable[..., Any]) -> None:
    model, ids = make(llama()), tokens()
    labels = ids if isinstance(model, ShadowForCausalLM) else torch.tensor([0, 1, 2])
    outputs = model(ids, labels=labels)
    assert list(outputs)[:2] == ["loss", "logits"]
    assert outputs[1] is outputs.logits
    loss, logits, *_ = model(ids, labels=labels, return_dict=False)
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(logits, outputs.logits)


def test_resized_embeddings_reach_the_shadow_of_a_classifier() -> None:
    model = ShadowForSequenceClassification(adapted(llama_classifier(), shadow_model=llama(5, hidden_size=16)))
    model.resize_token_embeddings(100)
    assert model.peft_model.shadow_model.get_input_embeddings().weight.shape[0] == 100
    assert model(torch.tensor([[99, 3, 98]])).shadow_logits.isfinite().all()
