"""Adapters that leave the lower layers of the base untouched (`first_injected_layer`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shadow_peft import ShadowConfig, ShadowForCausalLM
from tests.tiny_models import causal_lm, llama, tokens, with_nonzero_weights

GREEDY = {"max_new_tokens": 8, "do_sample": False}
VARIANTS = ["published", "readout"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_goes_through_the_layers_below(variant: str) -> None:
    model, outputs = causal_lm(llama(), variant=variant, first_injected_layer=2).train(), []
    for layer in model.peft_model.decoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model(tokens(), labels=tokens()).loss.backward()
    assert [output.requires_grad for output in outputs] == [False, False, True, True]
    assert len(model.peft_model.shadow_injection_model.injection_downs) == 2


@pytest.mark.parametrize("first", [0, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_and_drafted_answers_are_the_uncached_ones(variant: str, first: int) -> None:
    model, ids = causal_lm(llama(), variant=variant, first_injected_layer=first), tokens(2, 6)
    text = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), text)
    assert torch.equal(model.generate(ids, use_shadow_draft=True, **GREEDY), text)
    with model.disable_adapter():
        assert not torch.equal(model.generate(ids, **GREEDY), text)


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_a_mixed_batch_every_row_is_what_it_is_alone(variant: str) -> None:
    model = causal_lm(llama(), variant=variant)
    for name, first in (("upper", 2), ("second_upper", 2), ("last", 3)):
        model.peft_model.add_adapter(name, ShadowConfig(variant=variant, first_injected_layer=first))
        with_nonzero_weights(model.peft_model.adapter(name))
    names, ids = ["last", "upper", "default", "__base__", "second_upper"], tokens(5, 7)
    mixed = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name != "__base__":
            model.peft_model.set_adapter(name)
            torch.testing.assert_close(mixed[row : row + 1], model(ids[row : row + 1]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_what_was_saved(variant: str, tmp_path: Path) -> None:
    model = causal_lm(llama(), variant=variant, first_injected_layer=3)
    model.save_pretrained(tmp_path)
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    assert loaded.peft_model.shadow_config.first_injected_layer == 3
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_base_without_an_injected_layer_is_refused_and_stays() -> None:
    base = llama()
    before = base(tokens()).logits
    with pytest.raises(ValueError, match="first_injected_layer is 4, but the base's layers are 0 to 3"):
        causal_lm(base, first_injected_layer=4)
    assert torch.equal(base(tokens()).logits, before)
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(("variant", "first"), [("published", 1), ("readout", 1), ("peft", 0)])
def test_layers_of_stored_adapters(variant: str, first: int) -> None:
    """Configs that were stored before there was the option."""
    stored: dict[str, Any] = {"variant": variant}
    assert ShadowConfig.from_dict(stored).first_injected_layer == ShadowConfig(**stored).first_injected_layer == first


def test_the_variant_of_peft_injects_every_layer() -> None:
    with pytest.raises(ValueError, match="first_injected_layer must be 0 in the variant 'peft', got 1"):
        ShadowConfig(variant="peft", first_injected_layer=1)
