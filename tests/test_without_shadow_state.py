"""Adapters that do not use the shadow's state: the shadow runs where it is read, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from shadow_peft import ShadowConfig, ShadowForCausalLM
from tests.tiny_models import causal_lm, classifier, llama, qwen3_classifier, tokens, with_nonzero_weights

FORM: dict[str, Any] = {"variant": "readout", "use_shadow_state": False}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


class Runs:
    """Counts the passes of a backbone."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        self.count = 0
        backbone.register_forward_pre_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


@pytest.fixture
def model() -> ShadowForCausalLM:
    return causal_lm(llama(), **FORM)


@pytest.fixture
def runs(model: ShadowForCausalLM) -> Iterator[Runs]:
    return Runs(model.peft_model.shadow_model)


def test_answers_without_drafts_do_not_run_the_shadow(model: ShadowForCausalLM, runs: Runs) -> None:
    ids = tokens(2, 6)
    text = model.generate(ids, **GREEDY)
    assert runs.count == 0
    assert torch.equal(model.generate(ids, use_shadow_draft=True, **GREEDY), text)
    assert runs.count > 0
    with torch.no_grad():
        assert torch.equal(model(text, use_cache=False).logits[:, 5:-1].argmax(-1), text[:, 6:])


def test_the_shadow_changes_nothing_but_its_own_logits(model: ShadowForCausalLM) -> None:
    ids = tokens()
    before = model(ids)
    with torch.no_grad():
        for parameter in model.peft_model.shadow_model.parameters():
            parameter.mul_(1.5)
    after = model(ids)
    assert torch.equal(after.logits, before.logits)
    assert not torch.equal(after.shadow_logits, before.shadow_logits)


def test_logits_with_and_without_the_shadow_are_the_same(model: ShadowForCausalLM, runs: Runs) -> None:
    ids = tokens()
    both = model(ids)
    alone = model(ids, output_shadow_logits=False)
    assert runs.count == 1
    assert alone.shadow_logits is None
    torch.testing.assert_close(alone.logits, both.logits, rtol=0, atol=1e-6)


def test_each_kind_of_cache_is_continued_as_it_was_begun(model: ShadowForCausalLM, runs: Runs) -> None:
    ids = tokens(2, 9)
    whole = model(ids).logits[:, -1]
    runs.count = 0
    for reads in (False, True):
        cache = model(ids[:, :5], use_cache=True, output_shadow_logits=reads).past_key_values
        assert (cache.shadow is not None) == reads
        for step in range(5, 9):
            last = model(ids[:, step : step + 1], past_key_values=cache, output_shadow_logits=False)
        torch.testing.assert_close(last.logits[:, -1], whole, rtol=1e-4, atol=1e-5)
        assert runs.count == (5 if reads else 0)  # a cache that holds the shadow's tokens is kept in step
    alone = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ValueError, match="The shadow has not read the tokens of these past_key_values"):
        model.generate(alone.sequences, past_key_values=alone.past_key_values, use_shadow_draft=True, **GREEDY)
    longer = model.generate(alone.sequences, past_key_values=alone.past_key_values, **GREEDY)
    assert torch.equal(longer, model.generate(ids, max_new_tokens=16, do_sample=False))


def test_a_cache_belongs_to_its_adapter(model: ShadowForCausalLM) -> None:
    ids = tokens(2, 6)
    model.peft_model.add_adapter("other", ShadowConfig(**FORM))
    begun = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    with model.disable_adapter():
        bare = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ValueError, match="tokens that the shadow has not seen"):
        model.generate(bare.sequences, past_key_values=bare.past_key_values, **GREEDY)
    model.peft_model.set_adapter("other")
    with pytest.raises(ValueError, match="belong to adapter 'default'"):
        model.generate(begun.sequences, past_key_values=begun.past_key_values, **GREEDY)
    with pytest.raises(ValueError, match="The shadow has not read"):
        model(ids[:, -1:], past_key_values=begun.past_key_values, output_shadow_logits=True)


def test_an_empty_cache_is_taken(model: ShadowForCausalLM) -> None:
    ids = tokens(2, 6)
    text = model.generate(ids, **GREEDY)
    for drafts in (False, True):
        assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), use_shadow_draft=drafts, **GREEDY), text)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), text)
    assert torch.equal(model.generate(ids, num_beams=1, use_cache=False, **GREEDY), text)


def test_an_assistant_of_transformers_drafts_for_it(model: ShadowForCausalLM) -> None:
    ids = tokens(1, 6)
    text = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=llama(seed=5), **GREEDY), text)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), text)


def test_the_shadow_learns_from_its_own_loss_alone(model: ShadowForCausalLM, runs: Runs) -> None:
    ids = tokens()
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.peft_model.shadow_model.parameters())
    runs.count = 0
    model.zero_grad()
    model.shadow_loss_weight = 0.0
    model(ids, labels=ids).loss.backward()
    assert runs.count == 0
    assert all(p.grad is None for p in model.peft_model.shadow_model.parameters())
    assert model.peft_model.shadow_injection_model.injection_ups.grad.any()


def test_detached_it_answers_alone(model: ShadowForCausalLM, runs: Runs) -> None:
    ids = tokens()
    shadow = model(ids).shadow_logits
    model.set_inference_mode("shadow_only")
    torch.testing.assert_close(model(ids).logits, shadow)
    assert model.generate(ids, **GREEDY).shape == (3, 18)
    assert runs.count > 1


def test_a_classifier_runs_the_shadow_where_it_is_read() -> None:
    model, ids = classifier(qwen3_classifier(), **FORM), tokens()
    runs = Runs(model.peft_model.shadow_model)
    alone = model(ids, output_shadow_logits=False)
    assert runs.count == 0
    torch.testing.assert_close(alone.logits, model(ids).logits, rtol=0, atol=1e-6)


def test_in_a_mixed_batch_every_row_is_what_it_is_alone(model: ShadowForCausalLM) -> None:
    for name, config in (("second", FORM), ("with_state", {"variant": "readout"}), ("published", {})):
        model.peft_model.add_adapter(name, ShadowConfig(**config))
        with_nonzero_weights(model.peft_model.adapter(name))
    names, ids = ["with_state", "second", "default", "__base__", "published", "second"], tokens(6, 7)
    mixed = model(ids, adapter_names=names)
    for row, name in enumerate(names[:3]):
        model.peft_model.set_adapter(name)
        alone = model(ids[row : row + 1])
        torch.testing.assert_close(mixed.logits[row : row + 1], alone.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed.shadow_logits[row : row + 1], alone.shadow_logits, rtol=1e-4, atol=1e-5)


def test_in_a_mixed_batch_the_shadows_run_that_are_read(model: ShadowForCausalLM, runs: Runs) -> None:
    peft = model.peft_model
    for name, config in (("second", FORM), ("with_state", {"variant": "readout"})):
        peft.add_adapter(name, ShadowConfig(**config))
        with_nonzero_weights(peft.adapter(name))
    second, with_state = (Runs(peft.adapter(name).shadow_model) for name in ("second", "with_state"))
    names, ids = ["with_state", "second", "default", "__base__", "second"], tokens(5, 7)
    whole = model(ids, adapter_names=names).logits
    assert (runs.count, second.count, with_state.count) == (1, 1, 1)
    torch.testing.assert_close(model(ids, adapter_names=names, output_shadow_logits=False).logits, whole)
    assert (runs.count, second.count, with_state.count) == (1, 1, 2)
    begun = model.generate(ids, adapter_names=names, return_dict_in_generate=True, **GREEDY)
    assert (runs.count, second.count, with_state.count) == (1, 1, 10)
    drafted = model.generate(ids, adapter_names=names, use_shadow_draft=True, **GREEDY)
    assert torch.equal(drafted, begun.sequences)
    assert min(runs.count, second.count) > 1
    longer = model.generate(begun.sequences, past_key_values=begun.past_key_values, adapter_names=names, **GREEDY)
    assert torch.equal(longer, model.generate(ids, adapter_names=names, max_new_tokens=16, do_sample=False))
    with pytest.raises(ValueError, match="The shadow has not read the tokens"):
        model(ids[:, -1:], past_key_values=begun.past_key_values, output_shadow_logits=True)
    with pytest.raises(ValueError, match="The shadow has not read the tokens"):
        model.generate(longer, past_key_values=begun.past_key_values, adapter_names=names, use_shadow_draft=True, **GREEDY)


def test_a_mixed_cache_without_a_shadow_moves_rows_of_one_adapter_alone(model: ShadowForCausalLM) -> None:
    model.peft_model.add_adapter("second", ShadowConfig(**FORM))
    with_nonzero_weights(model.peft_model.adapter("second"))
    names, ids = ["second", "default", "__base__", "second"], tokens(4, 8)
    quiet = {"output_shadow_logits": False}
    whole = model(ids, adapter_names=names, **quiet).logits[:, 6:]
    cache = model(ids[:, :6], adapter_names=names, use_cache=True, **quiet).past_key_values
    swapped = torch.tensor([3, 1, 2, 0])
    cache.reorder_cache(swapped)
    torch.testing.assert_close(model(ids[swapped, 6:], past_key_values=cache, **quiet).logits, whole[swapped])
    for wrong, said in (([1, 1, 2, 3], "Row 1 belongs to 'default'; a row of 'second'"), ([0, 1, 0, 3], "of '__base__'")):
        with pytest.raises(ValueError, match=said):
            cache.reorder_cache(torch.tensor(wrong))


@pytest.mark.parametrize("names", [None, ["second", "default"]])
@torch.no_grad()
def test_a_cache_that_the_bare_base_went_on_with_is_refused(model: ShadowForCausalLM, names: list[str] | None) -> None:
    model.peft_model.add_adapter("second", ShadowConfig(**FORM))
    ids, quiet = tokens(2, 8), {"output_shadow_logits": False}
    cache = model(ids[:, :4], use_cache=True, adapter_names=names, **quiet).past_key_values
    with model.disable_adapter():
        model(ids[:, 4:6], past_key_values=cache)
    with pytest.raises(ValueError, match="The bare base has gone on with these past_key_values"):
        model(ids[:, 6:], past_key_values=cache, **quiet)
    cache.reset()
    again = model(ids, past_key_values=cache, **quiet).logits
    torch.testing.assert_close(again, model(ids, adapter_names=names, **quiet).logits)


def test_drafts_from_a_cache_of_several_adapters_are_theirs(model: ShadowForCausalLM) -> None:
    """Without `adapter_names`, and whatever adapter is active."""
    model.peft_model.add_adapter("second", ShadowConfig(**FORM))
    with_nonzero_weights(model.peft_model.adapter("second"))
    names, ids, full = ["second", "default"], tokens(2, 6), {"return_dict_in_generate": True, **GREEDY}
    begun = model.generate(ids, adapter_names=names, **full)
    with pytest.raises(ValueError, match="The shadow has not read the tokens"):
        model.generate(begun.sequences, past_key_values=begun.past_key_values, use_shadow_draft=True, **GREEDY)
    whole = model.generate(ids, adapter_names=names, **GREEDY)
    for active in ("second", "default"):
        with torch.no_grad():
            cache = model(ids[:, :4], adapter_names=names, use_cache=True).past_key_values
        model.peft_model.set_adapter(active)
        drafted = model.generate(ids, past_key_values=cache, use_shadow_draft=True, **full)
        assert torch.equal(drafted.sequences, whole)
        assert drafted.draft_statistics.drafted > 0
        assert cache.adapter_name is None


@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
@torch.no_grad()
def test_a_recurrent_base_takes_its_cache_under_both_names(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "intermediate_size": 64}
    model = causal_lm(MambaForCausalLM(MambaConfig(**sizes)).eval(), **FORM)
    model.peft_model.add_adapter("second", ShadowConfig(**FORM))
    with_nonzero_weights(model.peft_model.adapter("second"))
    ids = tokens(2, 7)
    for names in (None, ["second", "second"]):
        whole = model(ids, adapter_names=names)
        cache = model(ids[:, :5], adapter_names=names, use_cache=True).past_key_values
        other = ["default", "second"] if names else ["second", "second"]
        with pytest.raises(ValueError, match=r"These past_key_values belong to"):
            model(ids[:, 5:], adapter_names=other, **{name: cache})
        model(ids[:, 5:6], output_shadow_logits=False, **{name: cache})
        last = model(ids[:, 6:], **{name: cache})
        torch.testing.assert_close(last.logits, whole.logits[:, 6:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last.shadow_logits, whole.shadow_logits[:, 6:], rtol=1e-4, atol=1e-5)
        quiet = model(ids[:, :5], adapter_names=names, use_cache=True, output_shadow_logits=False).past_key_values
        with pytest.raises(ValueError, match="The shadow has not read the tokens"):
            model(ids[:, 5:], **{name: quiet})


def test_it_is_what_was_saved(model: ShadowForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    assert loaded.peft_model.shadow_config.use_shadow_state is False
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
