"""The folded shadow: projection and large head as one matrix, in a stock model that needs this library no more."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from shadow_peft import (
    AutoModelForCausalLMWithHiddenProjection,
    ShadowForCausalLM,
    ShadowForSequenceClassification,
    prepare_shadow_model,
)
from shadow_peft.export.folded import fold
from shadow_peft.export.head import CannotFold, HeadForm, measure_head
from tests.conformance.tiny import tiny_model
from tests.tiny_models import SIZES, adapted, causal_lm, cohere, gemma2, gpt2, llama, qwen3, qwen3_classifier, tokens

STANDALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
cached, uncached = (model.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False))
assert torch.equal(cached, uncached)
assert "shadow_peft" not in sys.modules
torch.save({"logits": model(ids).logits, "generated": cached, "class": type(model).__name__}, sys.argv[3])
"""


def scaled_head() -> PreTrainedModel:
    return cohere(logit_scale=0.3)


def divided_logits() -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 7.0}
    return GraniteForCausalLM(GraniteConfig(**SIZES, **settings)).eval()


def divided_states() -> PreTrainedModel:
    return tiny_model("minicpm3")


def head_with_bias() -> PreTrainedModel:
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**{name: size for name, size in SIZES.items() if name != "head_dim"})).eval()
    nn.init.normal_(model.lm_head.bias)
    return model


def capped() -> PreTrainedModel:
    return gemma2(final_logit_softcapping=2.0)


def narrow(make_base: Callable[[], PreTrainedModel], variant: str = "published", **config: Any) -> ShadowForCausalLM:
    """A base with an implicit shadow of half its width."""
    return causal_lm(make_base(), variant=variant, shadow_hidden_size=16, **config)


def around(make_base: Callable[[], PreTrainedModel], shadow: PreTrainedModel) -> ShadowForCausalLM:
    return ShadowForCausalLM(adapted(make_base(), shadow_model=shadow))


def check(model: ShadowForCausalLM, folder: Path) -> PreTrainedModel:
    """The folded shadow computes the shadow's logits and tokens, in memory and loaded from a folder."""
    folded, ids, expected = model.export_shadow(fold=True), tokens(), model(tokens()).shadow_logits
    assert not isinstance(folded, AutoModelForCausalLMWithHiddenProjection)
    torch.testing.assert_close(folded(ids).logits, expected, rtol=1e-4, atol=1e-5)
    folded.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(folded)
    torch.testing.assert_close(loaded(ids).logits, folded(ids).logits)
    model.set_inference_mode("shadow_only")
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    generated = loaded.generate(ids, **settings)
    assert torch.equal(generated, model.generate(ids, **settings))
    assert torch.equal(generated, loaded.generate(ids, use_cache=False, **settings))
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not held & {p.untyped_storage().data_ptr() for p in folded.parameters()}
    return loaded


@pytest.mark.parametrize("variant", ["published", "peft", "readout"])
def test_an_implicit_shadow_of_another_width(variant: str, tmp_path: Path) -> None:
    loaded = check(narrow(llama, variant), tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.lm_head.weight.shape == (96, 16)
    assert not loaded.config.tie_word_embeddings


BASES = (llama, gpt2, scaled_head, divided_logits, divided_states, head_with_bias, capped)


@pytest.mark.parametrize("make_base", BASES)
def test_what_the_class_does_to_its_logits_is_carried(make_base: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    assert type(check(narrow(make_base), tmp_path)) is type(make_base())


@pytest.mark.parametrize("make_base", [scaled_head, divided_logits, divided_states])
def test_a_factor_of_the_base_is_carried_into_another_class(make_base: Callable[[], Any], tmp_path: Path) -> None:
    check(around(make_base, qwen3(3, hidden_size=16, num_hidden_layers=2)), tmp_path)


@pytest.mark.parametrize("make_shadow", [scaled_head, divided_logits, divided_states, head_with_bias, capped])
@pytest.mark.parametrize("same_width", [True, False])
def test_a_factor_of_the_shadow_is_taken_out(make_shadow: Callable[[], Any], same_width: bool, tmp_path: Path) -> None:
    """The shadow's own class scales, caps and adds a bias; the large head's logits must pass through unchanged."""
    base = llama() if same_width else llama(hidden_size=64)
    model = ShadowForCausalLM(adapted(base, shadow_model=make_shadow()))
    torch.testing.assert_close(model.export_shadow()(tokens()).logits, model(tokens()).shadow_logits, rtol=1e-4, atol=1e-5)
    loaded = check(model, tmp_path)
    assert type(loaded) is type(make_shadow())


def test_a_trained_head_is_folded(tmp_path: Path) -> None:
    model = narrow(llama, modules_to_save=["shadow_lm_head"])
    nn.init.normal_(model.peft_model.task_heads["shadow_lm_head"].weight)
    check(model, tmp_path)


def test_a_pretrained_shadow_under_its_projection(tmp_path: Path) -> None:
    small, large = qwen3(1, hidden_size=16), llama(2, hidden_size=64)
    wrapped = AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small, shadow_hidden_projection=nn.Linear(16, 64, bias=False), lm_head=large.lm_head
    )
    torch.testing.assert_close(fold(wrapped)(tokens()).logits, wrapped(tokens()).logits, rtol=1e-4, atol=1e-5)
    assert type(check(around(lambda: large, wrapped), tmp_path)).__name__ == "Qwen3ForCausalLM"


def test_the_bias_of_a_wrapped_head_is_kept(tmp_path: Path) -> None:
    wrapped = AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=(small := qwen3(1, hidden_size=16)),
        shadow_hidden_projection=nn.Linear(16, 32, bias=False),
        lm_head=(head := head_with_bias().lm_head),
        init_optimal_projection=False,
    )
    states = small.model(tokens())[0]
    expected = head(wrapped.shadow_hidden_projection(states))
    wrapped.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, expected)


def test_what_is_stock_already_stays_as_it_is(tmp_path: Path) -> None:
    assert type(check(causal_lm(gpt2()), tmp_path)).__name__ == "GPT2LMHeadModel"


def scaled_embeddings() -> PreTrainedModel:
    """Its embedding module multiplies what it looks up."""
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, layer_types=["full_attention"] * 4)).eval()


@pytest.mark.parametrize(("make_base", "make_shadow"), [(scaled_embeddings, llama), (llama, scaled_embeddings)])
def test_a_shadow_that_is_fed_by_the_base_gets_its_embeddings(make_base: Any, make_shadow: Any, tmp_path: Path) -> None:
    model = around(make_base, prepare_shadow_model(make_shadow(), remove_embed_tokens=True))
    check(model, tmp_path / "folded")
    model.set_inference_mode("base_shadow")
    model.export_shadow().save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).shadow_logits, rtol=1e-4, atol=1e-5)


def test_a_larger_vocabulary_of_the_shadow_is_cut_to_the_head(tmp_path: Path) -> None:
    loaded = check(around(llama, qwen3(3, hidden_size=16, vocab_size=130)), tmp_path)
    assert loaded.config.vocab_size == loaded.get_input_embeddings().weight.shape[0] == 96


def test_special_tokens_are_the_bases(tmp_path: Path) -> None:
    base = llama(eos_token_id=5, bos_token_id=4)
    shadow = qwen3(3, hidden_size=16, eos_token_id=90, bos_token_id=91, pad_token_id=92, num_hidden_layers=2)
    ShadowForCausalLM(adapted(base, shadow_model=shadow)).export_shadow(fold=True).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for config in (loaded.config, loaded.generation_config):
        assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (5, 4, 0)


def test_a_classifier_of_another_width(tmp_path: Path) -> None:
    model = ShadowForSequenceClassification(adapted(qwen3_classifier(), shadow_hidden_size=16)).eval()
    torch.testing.assert_close(model.export_shadow(fold=True)(tokens()).logits, model(tokens()).shadow_logits)


def test_a_process_without_this_library(tmp_path: Path) -> None:
    model, ids = narrow(qwen3), tokens()
    model.export_shadow(fold=True).save_pretrained(tmp_path / "model")
    arguments = [tmp_path / "model", str(ids.tolist()), tmp_path / "seen.pt"]
    subprocess.run([sys.executable, "-c", STANDALONE, *arguments], check=True, capture_output=True)
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["class"] == "Qwen3ForCausalLM"
    torch.testing.assert_close(seen["logits"], model(ids).shadow_logits, rtol=1e-4, atol=1e-5)
    model.set_inference_mode("shadow_only")
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(seen["generated"], model.generate(ids, **settings))


# ---------------------------------------------------------------- what is refused


def always_capped() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**SIZES, "lru_width": 32, "block_types": ["recurrent", "attention"], "num_key_value_heads": 1}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes)).eval()


REFUSED = {
    "the logits are capped at 2.0, and LlamaForCausalLM caps none": (capped, lambda: llama(3, hidden_size=16)),
    "the head has a bias, and that of LlamaForCausalLM has none": (head_with_bias, lambda: llama(3, hidden_size=16)),
    "BertLMHeadModel computes its logits with more than one": (lambda: tiny_model("bert"), lambda: llama(3, hidden_size=16)),
    "RecurrentGemmaForCausalLM always caps its logits": (lambda: llama(hidden_size=64), always_capped),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_stock_class_computes_is_refused(reason: str) -> None:
    make_base, make_shadow = REFUSED[reason]
    model = ShadowForCausalLM(adapted(make_base(), shadow_model=make_shadow()))
    with pytest.raises(CannotFold, match=reason):
        model.export_shadow(fold=True)


@pytest.mark.parametrize("make_base", [capped, head_with_bias])
def test_what_cannot_be_folded_is_a_projected_model(make_base: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = around(make_base, llama(3, hidden_size=16))
    model.export_shadow().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, AutoModelForCausalLMWithHiddenProjection)
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).shadow_logits, rtol=1e-4, atol=1e-5)


def test_the_form_of_a_head_is_measured() -> None:
    def form(model: PreTrainedModel) -> HeadForm:
        from shadow_peft.base.decoder import find_decoder

        return measure_head(model, find_decoder(model))

    assert form(llama()) == HeadForm(1.0, 1.0, None)
    assert form(scaled_head()).scale == pytest.approx(0.3, abs=1e-12)
    assert form(divided_logits()).scale == pytest.approx(1 / 7, abs=1e-12)
    assert form(capped()).cap == 2.0


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("width", [32, 16])
def test_trained_weights_beside_a_base_in_bfloat16_are_not_rounded(width: int, fold: bool) -> None:
    """The embeddings come from the base, and are in bfloat16; the shadow was trained in float32."""
    shadow = llama(3, hidden_size=width, num_hidden_layers=2)
    model = ShadowForCausalLM(adapted(llama().to(torch.bfloat16), shadow_model=shadow))
    trained = {
        name: weight.clone() for name, weight in model.peft_model.shadow_model.state_dict().items() if "layers" in name
    }
    exported = model.export_shadow(fold=fold).state_dict()
    assert trained
    for name, weight in trained.items():
        found = next(value for path, value in exported.items() if path.endswith(name))
        assert torch.equal(found, weight), name
