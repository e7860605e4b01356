"""Drafts chosen among likely tokens: the same texts and distributions, and few rows of the head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shadow_peft import ShadowForCausalLM
from shadow_peft.generation.draft_vocabulary import FLOOR, DraftVocabulary
from shadow_peft.generation.pass_times import pass_times, prior_costs
from shadow_peft.losses.label_tokens import LabelTokens
from tests.test_batched_drafting import padded
from tests.test_drafting import CHANCE, DRAFT, LONG, SAMPLED, agreeing, sampling_bias, set_costs, sharp
from tests.tiny_models import SIZES, causal_lm, cohere, llama, tokens

VOCABULARY, WIDTH = SIZES["vocab_size"], SIZES["hidden_size"]
LIKELY = list(range(0, 92, 4))


def narrow(agreement: str) -> ShadowForCausalLM:
    """A model whose labels were 23 tokens."""
    model = agreeing(agreement)
    model.peft_model.label_tokens = LabelTokens(LIKELY)
    return model


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken in, and tokens outside do not end it."""
    monkeypatch.setattr(DraftVocabulary, "add", lambda *args: None)
    monkeypatch.setattr(DraftVocabulary, "update", lambda *args: None)


class HeadRows(TorchDispatchMode):
    """Rows of the head in every product with it but the prompt's, which is no `mm`; no other map has as many outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten.mm", "aten.addmm")) and result.shape[-1] in (VOCABULARY, len(LIKELY)):
            self.rows.append(result.shape[-1])
        return result


def test_a_drafted_token_reads_the_likely_rows_of_the_head_alone(fixed: None) -> None:
    model, ids = narrow("always"), tokens(1, 7)
    expected = model.generate(ids, **LONG)
    for options, rows in (({}, len(LIKELY)), ({"assistant_vocab_size": 0}, VOCABULARY)):
        with HeadRows() as head:
            output = model.generate(ids, return_dict_in_generate=True, **LONG, **DRAFT, **options)
        statistics = output.draft_statistics
        assert torch.equal(output.sequences, expected)
        assert head.rows.count(VOCABULARY) == statistics.base_passes + statistics.drafted * (rows == VOCABULARY)
        assert head.rows.count(len(LIKELY)) == statistics.drafted * (rows == len(LIKELY))
        assert statistics.drafted > 15


@pytest.mark.parametrize("agreement", ["always", "sometimes"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("options", [DRAFT, {"use_shadow_draft": True}], ids=["constant", "heuristic"])
def test_texts_are_those_of_decoding_without_drafts(
    agreement: str, rows: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_costs(monkeypatch)
    model = narrow(agreement)
    batch = padded() if rows == 3 else {"input_ids": tokens(1, 7)}
    output = model.generate(**batch, return_dict_in_generate=True, **LONG, **options)
    assert torch.equal(output.sequences, model.generate(**batch, **LONG))
    assert output.draft_statistics.drafted > 0


def test_tokens_of_prompt_and_text_are_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shadow that is always right: with a draft of one token a pass, only tokens that are new are rejected."""
    monkeypatch.setattr(DraftVocabulary, "is_used", True)
    model, ids = narrow("always"), tokens(1, 7)
    output = model.generate(ids, return_dict_in_generate=True, **LONG, **{**DRAFT, "num_assistant_tokens": 1})
    known, accepted, text = {*LIKELY, *ids[0].tolist()}, 0, output.sequences[0, 7:].tolist()
    place = 1  # the prompt's pass has written the first
    while place < len(text) - 1:
        known.update(text[:place])
        right = text[place] in known
        accepted += right
        place += 1 + right
    assert output.draft_statistics.accepted == accepted > 0
    assert output.draft_statistics.accepted < output.draft_statistics.drafted


def test_with_many_tokens_outside_the_whole_head_is_read_and_later_the_likely_rows_again() -> None:
    vocabulary = DraftVocabulary(torch.tensor([1, 2, 3]), 100)
    assert vocabulary.is_used
    vocabulary.update(torch.tensor([1, 50]))
    assert vocabulary.is_used
    vocabulary.update(torch.tensor([60, 61]))
    assert not vocabulary.is_used
    assert vocabulary.ids.tolist() == [1, 2, 3, 50, 60, 61]
    vocabulary.update(torch.tensor([60, 50, 61] * 8))
    assert vocabulary.is_used
    assert vocabulary.share == 0.06
    vocabulary.add(torch.tensor([100, -200, 60]))  # no tokens of the head
    assert vocabulary.share == 0.06


@pytest.mark.parametrize("rows", [1, 4])
def test_sampling_keeps_the_bases_distribution(rows: int, fixed: None) -> None:
    """The shadow proposes three of six tokens; the base's own distribution is drawn from."""
    model = sharp("sometimes")
    model.peft_model.label_tokens = LabelTokens([0, 2, 5])
    prompt = torch.tensor([[3, 4, 5]]).expand(rows, -1)
    more = {"max_new_tokens": 201 if rows == 1 else 51, "return_dict_in_generate": True}
    output = model.generate(prompt, **more, **SAMPLED, **DRAFT)
    assert 0.05 < output.draft_statistics.acceptance_rate < 0.95
    assert sampling_bias(model, output.sequences, start=4) < CHANCE


@pytest.mark.parametrize("options", [LONG, {**LONG, "do_sample": True}], ids=["greedy", "sampled"])
def test_processors_that_leave_only_tokens_outside(options: dict[str, Any]) -> None:
    model, ids = narrow("always"), tokens(2, 7)
    allowed = [token for token in range(VOCABULARY) if token not in LIKELY][:5]
    text = model.generate(ids, prefix_allowed_tokens_fn=lambda row, text: allowed, **options, **DRAFT)
    assert set(text[:, 7:].flatten().tolist()) <= set(allowed)
    if not options["do_sample"]:
        assert torch.equal(text, model.generate(ids, prefix_allowed_tokens_fn=lambda row, text: allowed, **options))


def test_rows_of_several_adapters() -> None:
    model, ids = narrow("always"), tokens(3, 7)
    model.add_adapter("other", model.peft_model.shadow_config)
    model.eval()
    names = ["default", "other", "__base__"]
    config = model._prepare_generation_config(None, use_shadow_draft=True)[0]
    cache = model.peft_model.with_shadow_cache(model(ids, adapter_names=names, use_cache=True).past_key_values, tuple(names))
    assert model.draft_vocabulary(config, 3, cache) is None  # nothing is known of what the other was trained on
    model.peft_model.adapter("other").label_tokens = LabelTokens([1, 2])
    both = model.draft_vocabulary(config, 3, cache)
    assert both is not None
    assert both.ids.tolist() == sorted({1, 2, *LIKELY})
    expected = model.generate(ids, adapter_names=names, **LONG)
    assert torch.equal(model.generate(ids, adapter_names=names, **LONG, **DRAFT), expected)
    model.set_adapter("other")
    assert model.peft_model.label_tokens.most_frequent(9) == [1, 2]
    assert model.peft_model.adapter("default").label_tokens.most_frequent(1) == LIKELY[:1]


def test_logits_of_likely_tokens_are_the_heads_and_heads_that_cannot_be_narrowed_stay_whole() -> None:
    states = torch.randn(2, 1, WIDTH)
    for base, narrowed in ((llama(), True), (cohere(logit_scale=0.25), False)):
        model = causal_lm(base)
        vocabulary = DraftVocabulary(torch.tensor(LIKELY), VOCABULARY)
        cache = model(tokens(2, 3), use_cache=True).past_key_values
        expected = model.shadow_logits(states, cache)
        for added in (7, 9):
            found = model.shadow_logits(states, cache, vocabulary)
            torch.testing.assert_close(found[..., vocabulary.ids], expected[..., vocabulary.ids])
            assert bool((found == FLOOR).any()) == narrowed
            vocabulary.add(torch.tensor([added, added]))
        assert vocabulary.ids.tolist() == [*LIKELY, 7, 9]


def test_a_training_counts_its_targets_and_the_adapters_file_keeps_them(tmp_path: Path) -> None:
    model = causal_lm(llama())
    labels = torch.tensor([[9, -100, 4, 4, 7], [7, 7, -100, -100, 4]])
    model(tokens(2, 5), labels=labels)
    assert model.peft_model.label_tokens.most_frequent(9) == []  # not in training
    model.train()
    model(tokens(2, 5), labels=labels).loss.backward()
    assert model.peft_model.label_tokens.most_frequent(9) == [4, 7]  # 4 thrice, 7 twice; the first of a row is no target
    model.save_pretrained(tmp_path)
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert loaded.peft_model.label_tokens.most_frequent(9) == [4, 7]
    loaded.train()
    loaded(tokens(1, 5), labels=torch.full((1, 5), 30))
    assert loaded.peft_model.label_tokens.most_frequent(2) == [30, 4]


def test_files_without_label_tokens_and_with_wrong_ones(tmp_path: Path) -> None:
    causal_lm(llama()).save_pretrained(tmp_path)
    path = tmp_path / "shadow_config.json"
    stored = json.loads(path.read_text())
    del stored["provenance"]["label_tokens"]
    path.write_text(json.dumps(stored))
    model, ids = ShadowForCausalLM.from_pretrained(llama(), tmp_path), tokens(1, 7)
    assert model.peft_model.label_tokens.most_frequent(9) == []
    assert torch.equal(model.generate(ids, **LONG, **DRAFT), model.generate(ids, **LONG))
    for wrong in ("1,2", "-3", "", [1, 2]):
        stored["provenance"]["label_tokens"] = wrong
        path.write_text(json.dumps(stored))
        with pytest.raises(ValueError, match="label_tokens must be token ids"):
            ShadowForCausalLM.from_pretrained(llama(), tmp_path)


def test_the_option_is_stored_checked_and_bounds_the_labels() -> None:
    model = narrow("always")
    cache = model(tokens(1, 3), use_cache=True).past_key_values

    def likely(**options: Any) -> Tensor | None:
        config = model._prepare_generation_config(None, use_shadow_draft=True, **options)[0]
        vocabulary = model.draft_vocabulary(config, 1, cache)
        return None if vocabulary is None else vocabulary.ids

    assert likely().tolist() == LIKELY  # type: ignore[union-attr]
    assert likely(assistant_vocab_size=5).tolist() == LIKELY[:5]  # type: ignore[union-attr]
    assert likely(assistant_vocab_size=0) is None
    model.generation_config.assistant_vocab_size = 4
    assert likely().tolist() == LIKELY[:4]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="assistant_vocab_size"):
        likely(assistant_vocab_size=-1)
    model.peft_model.label_tokens = LabelTokens(range(VOCABULARY // 2 + 1))
    assert likely(assistant_vocab_size=90) is None  # it would read most of the head


def test_what_drafts_are_believed_to_cost() -> None:
    model = causal_lm(llama()).peft_model
    assert prior_costs(model, 1, head_share=0.1).draft < prior_costs(model, 1).draft
    assert pass_times(model, 1, head_share=0.1) is pass_times(model, 1, head_share=0.2)
    assert pass_times(model, 1, head_share=0.1) is not pass_times(model, 1)
