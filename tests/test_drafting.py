"""The shadow drafts for its own base: the same tokens, the same distribution, no token read twice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.generation.pass_times import CPU_PRIOR, Costs, PassTimes, prior_costs
from tests.tiny_models import CROPPABLE, FAMILIES, causal_lm, llama, tokens, with_nonzero_weights

LONG = {"max_new_tokens": 24, "do_sample": False}
DRAFT = {
    "use_shadow_draft": True,
    "num_assistant_tokens": 4,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.0,
}


def agreeing(agreement: str, make_base: Callable[[], PreTrainedModel] = llama) -> ShadowForCausalLM:
    """A shadow that is the base itself and so always agrees, one that never does, or one that does sometimes."""
    torch.manual_seed(1)
    config = ShadowConfig(num_shadow_layers=4, shadow_init="base", modules_to_save=["shadow_lm_head"])
    peft = get_shadow_model(make_base(), config)
    model = ShadowForCausalLM(peft).eval()
    head = peft.task_heads["shadow_lm_head"].weight.data
    if agreement == "never":
        head.neg_()
    elif agreement == "sometimes":
        head.add_(0.7 * head.std() * torch.randn_like(head))
    return model


@pytest.mark.parametrize("agreement", ["always", "sometimes", "never"])
def test_fake_drafters_change_nothing(agreement: str) -> None:
    model, ids = agreeing(agreement), tokens(1, 7)
    expected = model.generate(ids, **LONG)
    output = model.generate(ids, return_dict_in_generate=True, **LONG, **DRAFT)
    assert torch.equal(output.sequences, expected)
    statistics = output.draft_statistics
    assert statistics.accepted + statistics.base_passes >= 24
    if agreement == "always":
        assert statistics.acceptance_rate == 1
        assert statistics.tokens_per_base_pass >= 4
        assert statistics.drafted_at == statistics.accepted_at
    elif agreement == "never":
        assert statistics.accepted == 0
        assert statistics.base_passes == 24
    else:
        assert 0 < statistics.acceptance_rate < 1


@pytest.mark.parametrize("name", CROPPABLE)
def test_the_real_shadow_of_every_family(name: str) -> None:
    model, ids = causal_lm(FAMILIES[name](), num_shadow_layers=2), tokens(1, 7)
    expected = model.generate(ids, **LONG)
    assert torch.equal(model.generate(ids, **LONG, **DRAFT), expected)
    assert torch.equal(model.generate(ids, **LONG, use_shadow_draft=True), expected)


def sure(agreement: str) -> ShadowForCausalLM:
    """A shadow of one layer's cost that is always sure, and right or wrong by the base's own logits."""
    model = agreeing(agreement)
    with torch.no_grad():
        model.peft_model.base_model.lm_head.weight.mul_(60)
        model.peft_model.task_heads["shadow_lm_head"].weight.mul_(60)
    return model


def set_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafted token costs a fifth of a base pass, whatever the clock says."""
    times = PassTimes(Costs(draft=0.15, verify=0.05), measures=False)
    monkeypatch.setattr("shadow_peft.generation.mixin.pass_times", lambda *args: times)


def test_drafts_adapt_to_what_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    set_costs(monkeypatch)
    ids, settings = tokens(1, 7), {"max_new_tokens": 60, "do_sample": False}
    adaptive = {"use_shadow_draft": True, "return_dict_in_generate": True}
    right, wrong = sure("always"), sure("never")
    output = right.generate(ids, **settings, **adaptive)
    assert torch.equal(output.sequences, right.generate(ids, **settings))
    assert output.draft_statistics.tokens_per_base_pass > 5
    output = wrong.generate(ids, **settings, **adaptive)
    assert torch.equal(output.sequences, wrong.generate(ids, **settings))
    wasted = output.draft_statistics.drafted * 0.2
    assert 0 < wasted <= 0.05 * 60  # given up, tried again now and then


def test_what_is_believed_of_costs_before_they_are_measured() -> None:
    own = agreeing("always")  # the base is its own shadow: a draft is a pass, and verifying adds a token to another
    base = weights_read(own.peft_model.base_model)
    for rows in (1, 8):
        verifying = base * rows / CPU_PRIOR.saturation / CPU_PRIOR.of_pass(base, 4, rows)
        assert prior_costs(own, rows) == pytest.approx((1.0, verifying))
    thin = causal_lm(llama())
    assert 0.25 < sum(prior_costs(thin, rows=1)) < 0.26  # as small as that, dispatching a layer of four is all that counts
    assert CPU_PRIOR.of_pass(10**9, 4, 8) / CPU_PRIOR.of_pass(10**9, 4, 1) == pytest.approx(2.6 / 1.2, rel=1e-2)


def weights_read(model: PreTrainedModel) -> int:
    """Weights that a pass reads: all but the embeddings."""
    return sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)


def count_tokens(module: nn.Module, counts: list[int]) -> None:
    def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        counts.append(kwargs["inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"].shape[1])

    module.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("agreement", ["always", "sometimes", "never"])
def test_no_token_passes_the_backbone_twice(agreement: str) -> None:
    model = agreeing(agreement)
    backbone: list[int] = []
    base: list[int] = []
    count_tokens(model.peft_model.shadow_model, backbone)
    count_tokens(model.peft_model.base_model, base)
    model.generate(tokens(1, 7), **LONG, **DRAFT)
    assert sum(backbone) == sum(base)


def test_drafted_states_are_those_of_the_full_forward() -> None:
    model, ids = agreeing("sometimes"), tokens(1, 7)
    output = model.generate(ids, return_dict_in_generate=True, output_logits=True, **LONG, **DRAFT)
    full = model(output.sequences).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(output.logits, 1), full, rtol=0, atol=2e-5)
    assert output.past_key_values.drafted is None
    lengths = {output.past_key_values.base.get_seq_length(), output.past_key_values.shadow.get_seq_length()}
    assert lengths == {output.sequences.shape[1] - 1}


class EndsWith(StoppingCriteria):
    """Stops behind two given tokens in a row, seen only while they are the last two."""

    def __init__(self, pair: list[int]) -> None:
        self.pair = torch.tensor(pair)

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return (input_ids[:, -2:] == self.pair).all(-1)


@pytest.mark.parametrize("agreement", ["always", "sometimes", "never"])
def test_every_end_of_a_text_holds(agreement: str) -> None:
    model, ids = agreeing(agreement), tokens(1, 7)
    whole = model.generate(ids, **LONG)[0, 7:].tolist()
    for cut in range(2, 12):
        ends = {
            "eos": {"eos_token_id": whole[cut], "pad_token_id": 0},
            "length": {"max_new_tokens": cut},
            "criteria": {"stopping_criteria": StoppingCriteriaList([EndsWith(whole[cut - 1 : cut + 1])])},
        }
        for name, end in ends.items():
            settings = {**LONG, **end}
            expected = model.generate(ids, **settings)
            assert torch.equal(model.generate(ids, **settings, **DRAFT), expected), (name, cut)


def test_logits_processors_hold() -> None:
    model, ids = agreeing("sometimes"), tokens(1, 7)
    settings = {**LONG, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 9}
    assert torch.equal(model.generate(ids, **settings, **DRAFT), model.generate(ids, **settings))


def test_a_left_padded_prompt_and_a_continued_one() -> None:
    model, ids = agreeing("sometimes"), tokens(1, 7)
    ids[:, :3] = 0
    mask = ids.ne(0).long()
    settings = {**LONG, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **settings, **DRAFT), model.generate(ids, **settings))
    first = model.generate(tokens(1, 6), return_dict_in_generate=True, **LONG, **DRAFT)
    longer = torch.cat([first.sequences, tokens(1, 4, seed=9)], 1)
    mask = torch.ones_like(longer)
    second = model.generate(longer, attention_mask=mask, past_key_values=first.past_key_values, **LONG, **DRAFT)
    assert torch.equal(second, model.generate(longer, attention_mask=mask, **LONG))


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0, "eos_token_id": None}
CHANCE = 16.3  # exceeded by one unbiased sample in a thousand, chi square of 3 degrees of freedom


def sharp(agreement: str) -> ShadowForCausalLM:
    """A model of six tokens that is rarely in doubt, and a shadow whose own distribution is another."""
    torch.manual_seed(1)
    base = llama(vocab_size=6, max_position_embeddings=512)
    config = ShadowConfig(num_shadow_layers=4, shadow_init="base", alpha=0.3, modules_to_save=["shadow_lm_head"])
    model = ShadowForCausalLM(with_nonzero_weights(get_shadow_model(base, config))).eval()
    with torch.no_grad():
        model.peft_model.task_heads["shadow_lm_head"].weight.mul_(1.5 if agreement == "sometimes" else -2.0)
        base.lm_head.weight.mul_(8)
    return model


@torch.no_grad()
def sampling_bias(model: ShadowForCausalLM, texts: torch.Tensor, start: int) -> float:
    """How far the tokens drawn at `start` and behind are from the base's distribution p; see CHANCE.

    Given the text before it, every drawn token x has scores f(x) of known mean and covariance under p. What the scores of
    all tokens exceed their means by is weighed against the covariances of all. With q the shadow's distribution, the scores
    are log q(x) - log p(x), which a rule that trusts drafts too much favours, log p(x), and whether q is largest at x.
    """
    outputs = model(texts[:, :-1])
    log_p, log_q = (
        (logits[:, start - 1 :].double() / SAMPLED["temperature"]).log_softmax(-1).flatten(0, 1)
        for logits in (outputs.logits, outputs.shadow_logits)
    )
    likeliest = nn.functional.one_hot(log_q.argmax(-1), log_q.shape[-1])
    scores = torch.stack([log_q - log_p, log_p, likeliest], -1)  # [N, V, 3]
    p, drawn = log_p.exp(), texts[:, start:].flatten()
    scores -= torch.einsum("nv,nvi->ni", p, scores)[:, None]
    covariance = torch.einsum("nv,nvi,nvj->ij", p, scores, scores)
    excess = scores[torch.arange(len(drawn)), drawn].sum(0)
    return float(excess @ torch.linalg.solve(covariance, excess))


@pytest.mark.parametrize("agreement", ["sometimes", "never"])
def test_sampling_keeps_the_bases_distribution(agreement: str) -> None:
    """One long text: each of its 400 tokens, drafted, rejected or redrawn, is drawn from the base's distribution."""
    model, prompt = sharp(agreement), torch.tensor([[3, 4, 5]])
    output = model.generate(prompt, max_new_tokens=401, return_dict_in_generate=True, **SAMPLED, **DRAFT)
    assert 0.2 < output.draft_statistics.acceptance_rate < 0.95
    assert sampling_bias(model, output.sequences, start=4) < CHANCE  # the first token was not drafted


def test_sampling_keeps_the_bases_distribution_where_lengths_adapt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides on a token's draft and verification, confidence and what was accepted before, does not know the token."""
    set_costs(monkeypatch)
    model, prompt = sharp("sometimes"), torch.tensor([[3, 4, 5]])
    adaptive = {"use_shadow_draft": True, "return_dict_in_generate": True}
    output = model.generate(prompt, max_new_tokens=401, **SAMPLED, **adaptive)
    assert len(output.draft_statistics.drafted_at) > 2
    assert output.draft_statistics.drafted > 150
    assert sampling_bias(model, output.sequences, start=4) < CHANCE


def test_times_are_measured_in_a_running_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes without drafts, then drafts; all passes but the prompt's and the last have a time, and no other."""
    model, seconds, passes = agreeing("always"), count(), []
    monkeypatch.setattr("shadow_peft.generation.pass_times.clock", lambda: float(next(seconds)))
    monkeypatch.setattr(PassTimes, "add_pass", lambda times, drafted, seconds: passes.append((drafted, seconds)))
    monkeypatch.setattr(PassTimes, "knows_base", property(lambda times: len(passes) > 1))
    monkeypatch.setattr(PassTimes, "costs", lambda times: Costs(0.1, 0.1))
    adaptive = {"use_shadow_draft": True, "return_dict_in_generate": True}
    statistics = model.generate(tokens(1, 7), **LONG, **adaptive).draft_statistics
    assert passes[:2] == [(0, 1.0), (0, 1.0)]
    assert len(passes) == statistics.base_passes - 2
    assert all(drafted > 0 for drafted, _ in passes[2:])


def test_no_confidence_is_too_low_where_lengths_adapt_and_nobody_names_a_threshold() -> None:
    model, ids = agreeing("always"), tokens(1, 7)
    cases = (({}, 0.0), ({"num_assistant_tokens_schedule": "constant"}, 0.4), ({"assistant_confidence_threshold": 0.3}, 0.3))
    for given, threshold in cases:
        prepared = model._prepare_generation_config(None, use_shadow_draft=True, **given)[0]
        assert prepared.assistant_confidence_threshold == threshold
    model.generation_config.assistant_confidence_threshold = 0.2
    assert model._prepare_generation_config(None, use_shadow_draft=True)[0].assistant_confidence_threshold == 0.2
    assert torch.equal(model.generate(ids, use_shadow_draft=True, **LONG), model.generate(ids, **LONG))


def test_the_switch_can_be_stored() -> None:
    model, ids = agreeing("always"), tokens(1, 7)
    expected = model.generate(ids, **LONG)
    stored = GenerationConfig.from_dict({**GenerationConfig(**LONG).to_dict(), **DRAFT})
    output = model.generate(ids, generation_config=stored, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert output.draft_statistics.drafted > 0
    model.generation_config.use_shadow_draft = True
    assert model.generate(ids, return_dict_in_generate=True, **LONG).draft_statistics.base_passes == 24
    plain = model.generate(ids, return_dict_in_generate=True, use_shadow_draft=False, **LONG)
    assert "draft_statistics" not in plain


def test_what_cannot_be_drafted_is_said() -> None:
    model, ids = agreeing("always"), tokens(1, 7)
    with pytest.raises(ValueError, match="not with beam_search"):
        model.generate(ids, num_beams=2, **LONG, **DRAFT)
    with pytest.raises(ValueError, match="switched off"), model.disable_adapter():
        model.generate(ids, **LONG, **DRAFT)
    model.set_inference_mode("shadow_only")
    with pytest.raises(ValueError, match="switched off"):
        model.generate(ids, **LONG, **DRAFT)


def test_one_drafter_at_a_time() -> None:
    model = causal_lm(llama())
    with pytest.raises(ValueError, match="use_shadow_draft and prompt_lookup_num_tokens exclude each other"):
        model.generate(tokens(1), max_new_tokens=3, prompt_lookup_num_tokens=2, **DRAFT)
    with pytest.raises(ValueError, match="use_shadow_draft and assistant_model exclude each other"):
        model.generate(tokens(1), max_new_tokens=3, assistant_model=llama(num_hidden_layers=1), **DRAFT)
    with pytest.raises(ValueError, match="works without assistant_ensemble_weight"):
        model.generate(tokens(2), max_new_tokens=3, assistant_ensemble_weight=0.5, **DRAFT)
