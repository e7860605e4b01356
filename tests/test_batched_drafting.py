"""Drafting for a batch: every row keeps what it accepts, and every text is that of ordinary decoding."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from shadow_peft import ShadowForCausalLM
from shadow_peft.generation.batched import accept, shifted
from shadow_peft.generation.drafting import Draft
from tests.test_drafting import (
    CHANCE,
    DRAFT,
    LONG,
    SAMPLED,
    EndsWith,
    agreeing,
    count_tokens,
    sampling_bias,
    set_costs,
    sharp,
)
from tests.tiny_models import CROPPABLE, FAMILIES, causal_lm, gpt2, llama, tokens


def padded(rows: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids = tokens(rows, length)
    for row in range(rows):
        ids[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


@pytest.mark.parametrize("agreement", ["always", "sometimes", "never"])
def test_fake_drafters_change_nothing(agreement: str) -> None:
    model, batch = agreeing(agreement), padded()
    expected = model.generate(**batch, **LONG)
    output = model.generate(**batch, return_dict_in_generate=True, **LONG, **DRAFT)
    assert torch.equal(output.sequences, expected)
    statistics = output.draft_statistics
    assert statistics.accepted + statistics.base_passes == 4 * 24
    assert {"always": statistics.acceptance_rate == 1, "never": statistics.accepted == 0}.get(agreement, True)
    assert output.past_key_values is None


@pytest.mark.parametrize("name", CROPPABLE)
def test_the_real_shadow_of_every_family(name: str) -> None:
    model, batch = causal_lm(FAMILIES[name](), num_shadow_layers=2), padded()
    expected = model.generate(**batch, **LONG)
    assert torch.equal(model.generate(**batch, **LONG, **DRAFT), expected)
    assert torch.equal(model.generate(**batch, **LONG, use_shadow_draft=True), expected)


def test_rows_accept_different_numbers() -> None:
    """The point of it: rows need different numbers of passes, and no row waits for another's rejections."""
    model, batch = agreeing("sometimes"), padded()
    together = model.generate(**batch, return_dict_in_generate=True, **LONG, **DRAFT).draft_statistics
    alone = [
        model.generate(ids[None], attention_mask=mask[None], return_dict_in_generate=True, **LONG, **DRAFT).draft_statistics
        for ids, mask in zip(*batch.values(), strict=True)
    ]
    assert len({one.base_passes for one in alone}) > 1
    assert together.base_passes == sum(one.base_passes for one in alone)
    assert together.accepted == sum(one.accepted for one in alone)


def test_rows_end_on_their_own() -> None:
    model, batch = agreeing("sometimes"), padded()
    whole = model.generate(**batch, **LONG)[:, 9:]
    for cut in range(1, 20, 3):
        ends: dict[str, dict[str, Any]] = {
            "eos": {"eos_token_id": [int(whole[0, cut]), int(whole[2, cut // 2])], "pad_token_id": 0},
            "length": {"max_new_tokens": cut},
            "criteria": {"stopping_criteria": StoppingCriteriaList([EndsWith(whole[1, cut - 1 : cut + 1].tolist())])},
        }
        for name, end in ends.items():
            settings = {**LONG, **end}
            expected = model.generate(**batch, **settings)
            assert torch.equal(model.generate(**batch, **settings, **DRAFT), expected), (name, cut)


def test_the_last_pass_of_a_row_counts_what_it_rejected() -> None:
    """A drafter that is never right: rows that end in a pass have drafted and lost in it as well as the others."""
    model, batch = agreeing("never"), padded()
    end = {"eos_token_id": int(model.generate(**batch, **LONG)[0, 9 + 3]), "pad_token_id": 0}
    output = model.generate(**batch, **{**LONG, **end}, return_dict_in_generate=True, **DRAFT)
    statistics, at_length = output.draft_statistics, int(output.sequences[:, -1].ne(0).sum())
    assert statistics.accepted == 0
    assert at_length < 4
    prompts, without_room = 4, at_length  # passes that draft nothing: over a prompt, and for the last token that fits
    assert statistics.drafted_at[0] == statistics.base_passes - prompts - without_room


class Biased(LogitsProcessor):
    """Depends on the row, on the length and on the whole text."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, input_ids.shape[1] % 7] += 3 * torch.arange(len(scores)) / len(scores)
        return scores.scatter_add(1, input_ids, torch.full_like(scores.gather(1, input_ids), -0.5))


def test_logits_processors_see_every_rows_own_text() -> None:
    model, batch = agreeing("sometimes"), padded()
    settings = {**LONG, "repetition_penalty": 1.3, "logits_processor": LogitsProcessorList([Biased()])}
    assert torch.equal(model.generate(**batch, **settings, **DRAFT), model.generate(**batch, **settings))


def test_scores_and_logits_of_every_place() -> None:
    model, batch = agreeing("sometimes"), padded()
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    drafted, plain = (model.generate(**batch, **LONG, **wanted, **how) for how in (DRAFT, {}))
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(drafted[name]), torch.stack(plain[name]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("are_asked_for", [False, True])
def test_logits_are_kept_only_where_they_are_asked_for(are_asked_for: bool) -> None:
    held: list[int] = []

    def count(ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        held.append(sum(t.dim() == 3 and t.shape[0] == 4 and t.shape[-1] == 96 for t in tensors))
        return torch.zeros(len(ids), dtype=torch.bool)

    model = agreeing("never")
    settings = {**LONG, **DRAFT, "output_logits": are_asked_for, "return_dict_in_generate": True}
    model.generate(**padded(), **settings, stopping_criteria=StoppingCriteriaList([count]))
    assert (held[-1] > held[0]) == are_asked_for, held


@pytest.mark.parametrize("eos", [False, True])
def test_no_row_reads_beyond_a_table_of_positions(eos: bool) -> None:
    """Rows that ended are fed on and fast rows wait for slow ones; GPT-2 has no position behind the longest answer."""
    model = agreeing("sometimes", gpt2)
    ids = tokens(6, model.config.max_position_embeddings - 24)
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    if eos:  # some rows end early, the others go on to the last position
        whole = model.generate(ids, **settings)
        settings |= {"eos_token_id": whole[::2, -20].tolist(), "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings, **DRAFT), model.generate(ids, **settings))


@pytest.mark.parametrize("agreement", ["always", "sometimes", "never"])
def test_no_token_passes_the_backbone_twice(agreement: str) -> None:
    model = agreeing(agreement)
    counts: dict[nn.Module, list[int]] = {model.peft_model.shadow_model: [], model.peft_model.base_model: []}
    for module, counted in counts.items():
        count_tokens(module, counted)
    model.generate(**padded(), **LONG, **DRAFT)
    backbone, base = map(sum, counts.values())
    assert backbone == base


def samples(model: ShadowForCausalLM) -> Any:
    """100 texts of 12 tokens behind one prompt of 3, as one batch."""
    settings = {"max_new_tokens": 12, "num_return_sequences": 100, "return_dict_in_generate": True}
    return model.generate(torch.tensor([[3, 4, 5]]), **settings, **SAMPLED, **DRAFT)


@pytest.mark.parametrize("agreement", ["sometimes", "never"])
def test_several_samples_of_one_prompt_keep_the_bases_distribution(agreement: str) -> None:
    model = sharp(agreement)
    output = samples(model)
    assert 0.2 < output.draft_statistics.acceptance_rate < 0.95
    assert sampling_bias(model, output.sequences, start=4) < CHANCE


def accept_everything(draft: Draft, logits: torch.Tensor, do_sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    count = torch.full((len(logits),), draft.tokens.shape[1])
    return count, torch.multinomial(logits[:, -1].softmax(-1), 1)[:, 0]


def redraw_from_p(draft: Draft, logits: torch.Tensor, do_sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The right rule, but for the token behind a rejection, which is drawn from p instead of what p exceeds q by."""
    accepted, _ = accept(draft, logits, do_sample)
    return accepted, torch.multinomial(logits[torch.arange(len(logits)), accepted].softmax(-1), 1)[:, 0]


@pytest.mark.parametrize("agreement", ["sometimes", "never"])
@pytest.mark.parametrize("rule", [accept_everything, redraw_from_p])
def test_a_biased_rule_is_noticed(rule: object, agreement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shadow_peft.generation.batched.accept", rule)
    model = sharp(agreement)
    assert sampling_bias(model, samples(model).sequences, start=4) > CHANCE


def test_the_rule_of_acceptance_by_enumeration() -> None:
    """Accepted or redrawn, a token has the base's probability: 200,000 rows of one position."""
    torch.manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.6, 0.05, 0.25])
    rows = 200_000
    drafted = torch.multinomial(q, rows, replacement=True)[:, None]
    logits = torch.stack([p.log(), torch.tensor([0.7, 0.1, 0.1, 0.1]).log()]).expand(rows, -1, -1)
    accepted, token = accept(Draft(drafted, q.log().expand(rows, 1, -1), torch.ones(rows, 1)), logits, do_sample=True)
    first = torch.where(accepted.bool(), drafted[:, 0], token)
    torch.testing.assert_close(torch.bincount(first) / rows, p, rtol=0, atol=0.005)
    torch.testing.assert_close(accepted.float().mean(), torch.minimum(p, q).sum(), rtol=0, atol=0.005)
    after = torch.bincount(token[accepted.bool()]) / accepted.sum()
    torch.testing.assert_close(after, logits[0, 1].exp(), rtol=0, atol=0.005)


def test_adaptive_drafts_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    set_costs(monkeypatch)
    adaptive = {"use_shadow_draft": True, "return_dict_in_generate": True, "num_assistant_tokens": 8}
    right, wrong = agreeing("always"), agreeing("never")
    for model in (right, wrong):
        with torch.no_grad():
            for head in (model.peft_model.base_model.lm_head, model.peft_model.task_heads["shadow_lm_head"]):
                head.weight.mul_(60)
    output = right.generate(**padded(), max_new_tokens=60, do_sample=False, **adaptive)
    assert output.draft_statistics.tokens_per_base_pass > 4
    output = wrong.generate(**padded(), max_new_tokens=60, do_sample=False, **adaptive)
    assert 0 < output.draft_statistics.drafted * 0.2 <= 0.05 * output.draft_statistics.base_passes


def test_a_batch_continues_from_a_cached_prefix_and_empties_the_cache() -> None:
    model, ids = agreeing("sometimes"), tokens(3, 12)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    produced = model.generate(ids, past_key_values=cache, **LONG, **DRAFT)
    assert torch.equal(produced, model.generate(ids, **LONG))
    assert cache.get_seq_length() == 0


def test_embedded_prompts_and_chunks() -> None:
    model, batch = agreeing("sometimes"), padded()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    assert torch.equal(model.generate(**given, **LONG, **DRAFT), model.generate(**given, **LONG))
    chunks = {**batch, "prefill_chunk_size": 4}
    assert torch.equal(model.generate(**chunks, **LONG, **DRAFT), model.generate(**batch, **LONG))


class Stream(BaseStreamer):
    def put(self, value: torch.Tensor) -> None: ...
    def end(self) -> None: ...


def test_what_a_batch_cannot_draft_is_said() -> None:
    model, batch = agreeing("always"), padded()
    with pytest.raises(ValueError, match="dynamic cache of attention layers"):
        model.generate(**batch, cache_implementation="quantized", cache_config={"backend": "fp8"}, **LONG, **DRAFT)
    with pytest.raises(ValueError, match="no attentions"):
        model.generate(**batch, output_hidden_states=True, return_dict_in_generate=True, **LONG, **DRAFT)
    with pytest.raises(ValueError, match="leave position_ids out"):
        model.generate(**batch, position_ids=torch.arange(9).expand(4, -1), **LONG, **DRAFT)
    with pytest.raises(ValueError, match="one name a row, got 'robot'"):
        model.generate(**batch, adapter_names="robot", **LONG)
    with pytest.raises(ValueError, match="streamer"):
        model.generate(**batch, streamer=Stream(), **LONG, **DRAFT)


def test_rows_are_shifted() -> None:
    rows = torch.arange(1, 9).view(2, 4)
    assert shifted(rows, torch.tensor([0, 3])).tolist() == [[1, 2, 3, 4], [0, 0, 0, 5]]
    states = rows[:, None, :, None].expand(-1, 2, -1, 3)
    assert shifted(states, torch.tensor([1, 2]), -2)[:, 1, :, 2].tolist() == [[0, 1, 2, 3], [0, 0, 5, 6]]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_a_prompt_of_embeddings_is_drafted_from(rows: int, masked: bool) -> None:
    model, ids = causal_lm(llama(), num_shadow_layers=2), tokens(rows, 7)
    embeds = model.get_input_embeddings()(ids).detach()
    prompt = {"inputs_embeds": embeds, **({"attention_mask": torch.ones_like(ids)} if masked else {})}
    expected = model.generate(**prompt, **LONG)
    assert torch.equal(model.generate(**prompt, **LONG, **DRAFT), expected)


def test_a_prefix_function_is_asked_about_texts_of_its_own_row_alone() -> None:
    model, ids = causal_lm(llama(), num_shadow_layers=2), tokens(3, 7)

    def successors(row: int, text: torch.Tensor) -> list[int]:
        assert torch.equal(text[:7], ids[row])
        for before, after in zip(text[6:-1].tolist(), text[7:].tolist(), strict=True):
            assert after in ((before + 1 + row) % 96, (7 * before + row) % 96), "nobody wrote this text"
        return [(int(text[-1]) + 1 + row) % 96, (7 * int(text[-1]) + row) % 96]

    expected = model.generate(ids, prefix_allowed_tokens_fn=successors, **LONG)
    assert torch.equal(model.generate(ids, prefix_allowed_tokens_fn=successors, **LONG, **DRAFT), expected)


class Collects(StoppingCriteria):
    """Never stops; keeps the texts that it is shown, and how many steps have scores."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, int | None]] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.seen.append((input_ids.clone(), None if scores is None else len(scores)))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_stopping_criteria_see_texts_that_were_written_and_their_scores() -> None:
    model, ids, criterion = causal_lm(llama(), num_shadow_layers=2), tokens(3, 7), Collects()
    settings = {"return_dict_in_generate": True, "output_scores": True, "stopping_criteria": [criterion]}
    written = model.generate(ids, **LONG, **DRAFT, **settings).sequences
    assert criterion.seen
    for texts, steps in criterion.seen:
        assert steps == texts.shape[1] - 7
        assert all(any(torch.equal(text, row[: len(text)]) for row in written) for text in texts)


def test_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance_scale"):
        causal_lm(llama()).generate(tokens(1, 7), guidance_scale=1.5, **LONG, **DRAFT)
