"""Padding on either side, and embeddings instead of tokens, change nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from shadow_peft import AutoModelForCausalLMWithHiddenProjection, ShadowForCausalLM
from tests.tiny_models import BASES, SIZES, adapted, causal_lm, classifier, llama, qwen3, qwen3_classifier, tokens

SIDES = ("left", "right")


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


ROWS = [tokens(1, 4, seed=1)[0], tokens(1, 9, seed=2)[0], tokens(1, 6, seed=3)[0]]


@pytest.mark.parametrize("mode", ["base_shadow", "shadow_only"])
@pytest.mark.parametrize("name", BASES)
def test_generation_of_a_left_padded_batch(name: str, mode: str) -> None:
    model = causal_lm(BASES[name]())
    model.set_inference_mode(mode)
    ids, mask = padded(ROWS, "left")
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, -6:]
    for i, row in enumerate(ROWS):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), max_new_tokens=6, do_sample=False)
        assert torch.equal(together[i], alone[0, -6:])


@pytest.mark.parametrize("mode", ["base_shadow", "shadow_only"])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_classifiers_pool_the_last_real_token(side: str, with_mask: bool, mode: str) -> None:
    if side == "left" and not with_mask:
        pytest.skip("without a mask, attention sees padding on the left")
    model = classifier(qwen3_classifier())
    model.set_inference_mode(mode)
    ids, mask = padded(ROWS, side)
    outputs = model(ids, attention_mask=mask if with_mask else None)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(outputs.logits[i], model(row[None]).logits[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(outputs.shadow_logits[i], model(row[None]).shadow_logits[0], rtol=0, atol=2e-5)


def test_a_row_of_padding_alone_is_finite() -> None:
    model = classifier(qwen3_classifier())
    ids, mask = padded([ROWS[0], torch.zeros(0, dtype=torch.long)], "right")
    assert model(ids, attention_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("name", BASES)
def test_embeddings_instead_of_tokens(name: str) -> None:
    model, ids = causal_lm(BASES[name]()), tokens()
    embeds = model.get_input_embeddings()(ids)
    by_ids, by_embeds = model(ids), model(inputs_embeds=embeds)
    torch.testing.assert_close(by_embeds.logits, by_ids.logits)
    torch.testing.assert_close(by_embeds.shadow_logits, by_ids.shadow_logits)
    produced = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(produced, model.generate(ids, max_new_tokens=5, do_sample=False)[:, -5:])


def test_classifier_with_embeddings() -> None:
    model, ids = classifier(qwen3_classifier()), tokens()
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)


def projected(width: int) -> AutoModelForCausalLMWithHiddenProjection:
    small, large = qwen3(5, hidden_size=width, num_hidden_layers=2), llama()
    return AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small, shadow_hidden_projection=torch.nn.Linear(width, 32, bias=False), lm_head=large.lm_head
    )


def test_embeddings_reach_a_shadow_of_another_width() -> None:
    shadow, base = projected(16), llama()
    with torch.no_grad():  # a table that is a linear image of the base's, so that the least-squares map is exact
        shadow.get_input_embeddings().weight.copy_(base.get_input_embeddings().weight @ torch.randn(32, 16))
    model, ids = ShadowForCausalLM(adapted(base, shadow_model=shadow)), tokens()
    by_ids, by_embeds = model(ids), model(inputs_embeds=base.get_input_embeddings()(ids))
    torch.testing.assert_close(by_embeds.shadow_logits, by_ids.shadow_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(by_embeds.logits, by_ids.logits, rtol=0, atol=1e-4)


def test_both_or_neither_is_an_error() -> None:
    model, ids = causal_lm(llama()), tokens()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


def test_the_text_decoder_of_a_vision_language_model() -> None:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=95)
    base = LlavaForConditionalGeneration(config).eval()
    model, ids = causal_lm(base), tokens(2, 8)
    ids[:, 1:5] = 95  # the four patches of an image
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8), "attention_mask": torch.ones_like(ids)}
    assert type(model.peft_model.shadow_model).__name__ == "LlamaModel"
    assert not torch.allclose(model(**inputs).logits, base(**inputs).logits, atol=1e-3)
    produced = [model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*produced)
    merged = torch.randn(2, 8, 32)
    assert model(inputs_embeds=merged).shadow_logits.shape == (2, 8, 96)
    assert model.export_shadow()(ids).logits.shape == (2, 8, 96)
    model(**inputs, labels=ids).loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
