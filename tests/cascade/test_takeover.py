"""Who answers, token for token: the shadow alone, the attached model alone, and the one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from shadow_peft import ShadowCascade, ShadowForCausalLM
from shadow_peft.cascade.answers import AnsweredBy
from shadow_peft.cascade.calibration import Calibration, Promise
from shadow_peft.cascade.decoding import run_shadow
from shadow_peft.cascade.scorer import Scorer
from tests.cascade.worlds import PROMPTS, ids_of, tokenizer
from tests.tiny_models import FAMILIES, causal_lm, classifier, gemma3, llama, llama_classifier, qwen3_classifier

NEW = 12
NEVER, ALWAYS = float("-inf"), float("inf")
VARIANTS = ["published", "readout", "peft"]


def cascade(model: PreTrainedModel, threshold: float, takeover: str = "answer", **settings: object) -> ShadowCascade:
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return ShadowCascade(model, tokenizer(), threshold=threshold, takeover=takeover, **settings)


def alone(model: PreTrainedModel, text: str, mode: str, prefix: tuple[int, ...] = ()) -> tuple[int, ...]:
    """What one network adds to a text and a beginning of the answer, without any cache and without the cascade."""
    model.set_inference_mode(mode)
    ids = torch.cat([ids_of(text), torch.tensor([prefix], dtype=torch.long)], dim=1)
    for _ in range(NEW - len(prefix)):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if int(token) == 2:
            break
    model.set_inference_mode("base_shadow")
    return tuple(ids[0, ids_of(text).shape[1] :].tolist())


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> ShadowForCausalLM:
    """A task model of each family."""
    return causal_lm(FAMILIES[request.param]())


@pytest.mark.parametrize("takeover", ["answer", "token"])
def test_without_takeover_the_answer_is_the_shadows(model: ShadowForCausalLM, takeover: str) -> None:
    answers = cascade(model, NEVER, takeover).answers(PROMPTS)
    assert [a.tokens for a in answers] == [alone(model, text, "shadow_only") for text in PROMPTS]
    assert {a.answered_by for a in answers} == {AnsweredBy.SHADOW}
    assert all(a.shadow_tokens == len(a.tokens or ()) for a in answers)


@pytest.mark.parametrize("takeover", ["answer", "token"])
def test_always_taken_over_the_answer_is_the_attached_models(model: ShadowForCausalLM, takeover: str) -> None:
    answers = cascade(model, ALWAYS, takeover).answers(PROMPTS)
    assert [a.tokens for a in answers] == [alone(model, text, "base_shadow") for text in PROMPTS]
    assert {(a.answered_by, a.shadow_tokens) for a in answers} == {(AnsweredBy.ATTACHED, 0)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_taken_over_within_an_answer_the_attached_model_continues_the_prefix(variant: str) -> None:
    model = causal_lm(llama(), variant=variant)
    places = set()
    for text in PROMPTS:
        own = alone(model, text, "shadow_only")
        trace = cascade(model, NEVER, "token").answers([text])[0]
        run = run_shadow(cascade(model, NEVER).shadow, ids_of(text), torch.ones_like(ids_of(text)), _config(model))
        for threshold in sorted(set(run.traces[0].margins)):
            answer = cascade(model, threshold + 1e-9, "token").answer(text)
            place = answer.shadow_tokens
            places.add(place)
            assert place == next(i for i, m in enumerate(run.traces[0].margins) if m < threshold + 1e-9)
            assert answer.tokens == own[:place] + alone(model, text, "base_shadow", own[:place])[place:]
            assert answer.confidence == pytest.approx(run.traces[0].margins[place])
        assert trace.tokens == own
    assert len(places) > 2, "takeovers at the beginning and within"


def _config(model: ShadowForCausalLM) -> object:
    return cascade(model, NEVER)._sides.config


def test_takeover_in_every_family(model: ShadowForCausalLM) -> None:
    text = PROMPTS[1]
    own = alone(model, text, "shadow_only")
    run = run_shadow(cascade(model, NEVER).shadow, ids_of(text), torch.ones_like(ids_of(text)), _config(model))
    margins = run.traces[0].margins
    threshold = sorted(margins[1:])[0] + 1e-9 if min(margins[1:]) < margins[0] else margins[0] + 1e-9
    answer = cascade(model, threshold, "token").answer(text)
    place = answer.shadow_tokens
    assert answer.tokens == own[:place] + alone(model, text, "base_shadow", own[:place])[place:]


def test_some_rows_of_a_batch_are_taken_over() -> None:
    model = causal_lm(llama())
    sure = sorted(a.confidence for a in cascade(model, NEVER).answers(PROMPTS))
    answers = cascade(model, sure[2]).answers(PROMPTS)
    assert sorted(a.answered_by for a in answers) == ["attached", "attached", "shadow", "shadow"]
    for text, answer in zip(PROMPTS, answers, strict=True):
        mode = "shadow_only" if answer.answered_by is AnsweredBy.SHADOW else "base_shadow"
        assert answer.tokens == alone(model, text, mode)
        assert answer.confidence < sure[2] or mode == "shadow_only"


# ---------------------------------------------------------------- what is reused


def count_calls(monkeypatch: pytest.MonkeyPatch, model: ShadowForCausalLM) -> Callable[[], list[int]]:
    """How many tokens the backbone reads in each of its calls."""
    read: list[int] = []
    own = model.peft_model.run_backbone

    def counted(inputs: object) -> object:
        read.append(inputs.length)  # type: ignore[attr-defined]
        return own(inputs)

    monkeypatch.setattr(model.peft_model, "run_backbone", counted)
    return lambda: read


def test_no_token_passes_the_backbone_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = causal_lm(llama()), PROMPTS[1]
    made = cascade(model, 2.0, "token")  # every token is below it: the attached model takes over at once
    read = count_calls(monkeypatch, model)
    answer = made.answer(text)
    assert answer.answered_by is AnsweredBy.ATTACHED
    prompt = ids_of(text).shape[1]
    assert sum(read()) == prompt + len(answer.tokens or ()) - 1, "the last token is read by nobody"
    assert read()[0] == prompt


def test_of_an_answer_taken_over_the_backbone_reads_the_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = causal_lm(llama()), PROMPTS[1]
    made = cascade(model, ALWAYS)
    read = count_calls(monkeypatch, model)
    made.answers([text, PROMPTS[0]])
    assert [n for n in read() if n > 1] == [ids_of(text).shape[1]]


def test_the_callers_model_keeps_its_mode() -> None:
    model = causal_lm(gemma3())
    model.set_inference_mode("shadow_only")
    cascade(model, ALWAYS).answers(PROMPTS[:2])
    assert model.inference_mode == "shadow_only"
    assert not model.training


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("takeover", ["answer", "token"])
def test_sampling_draws_what_the_networks_alone_would(takeover: str) -> None:
    model, ids = causal_lm(llama()), ids_of(PROMPTS[1])
    settings = {"do_sample": True, "temperature": 1.3, "top_k": 20}
    torch.manual_seed(5)
    own = cascade(model, NEVER, takeover, **settings).answer(PROMPTS[1])
    torch.manual_seed(5)
    model.set_inference_mode("shadow_only")
    expected = model.generate(ids, max_new_tokens=NEW, pad_token_id=0, eos_token_id=2, **settings)
    assert own.tokens == tuple(expected[0, ids.shape[1] :].tolist())


def test_sampling_is_no_excuse_for_a_takeover_by_luck() -> None:
    """Whether the attached model takes over is decided by the distribution, not by the token that was drawn."""
    model, places = causal_lm(llama()), set()
    for seed in range(5):
        torch.manual_seed(seed)
        answer = cascade(model, 0.9, "token", do_sample=True).answer(PROMPTS[1])
        places.add((answer.shadow_tokens, answer.confidence))
    assert len(places) == 1


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("base", [llama_classifier, qwen3_classifier])
def test_classes_are_those_of_the_network_that_answered(base: Callable[[], PreTrainedModel]) -> None:
    model = classifier(base())
    texts = [*PROMPTS, "one more", "and another"]
    with torch.no_grad():
        outputs = [model(input_ids=ids_of(text)) for text in texts]
    shadow = [int(o.shadow_logits.argmax()) for o in outputs]
    attached = [int(o.logits.argmax()) for o in outputs]
    assert shadow != attached, "the test could not fail"
    made = ShadowCascade(model, tokenizer(), threshold=NEVER)
    never = made.answers(texts)
    assert [a.tokens for a in never] == [(c,) for c in shadow]
    assert [a.text for a in never] == [f"LABEL_{c}" for c in shadow]
    always = ShadowCascade(model, tokenizer(), threshold=ALWAYS).answers(texts)
    assert [a.tokens for a in always] == [(c,) for c in attached]
    middle = sorted(a.confidence for a in never)[3]
    mixed = ShadowCascade(model, tokenizer(), threshold=middle).answers(texts)
    expected = [a if n.confidence < middle else s for s, a, n in zip(shadow, attached, never, strict=True)]
    assert [a.tokens for a in mixed] == [(c,) for c in expected]
    assert {a.answered_by for a in mixed} == {AnsweredBy.SHADOW, AnsweredBy.ATTACHED}


def test_a_class_is_no_text() -> None:
    model = classifier(llama_classifier())
    with pytest.raises(ValueError, match="takes over per answer"):
        ShadowCascade(model, tokenizer(), threshold=0.5, takeover="token").answer("x")
    with pytest.raises(ValueError, match="writes no text"):
        ShadowCascade(model, tokenizer(), max_new_tokens=3)


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_a_cascade_is_refused() -> None:
    model = causal_lm(llama())
    with pytest.raises(ValueError, match="no base to ask"):
        ShadowCascade(model.export_shadow(), tokenizer())
    with pytest.raises(ValueError, match="training mode"):
        ShadowCascade(causal_lm(llama()).train(), tokenizer())
    with pytest.raises(ValueError, match="must be 1"):
        ShadowCascade(model, tokenizer(), num_beams=3)
    with pytest.raises(ValueError, match="no settings of generation called tempreature"):
        ShadowCascade(model, tokenizer(), tempreature=3)
    with pytest.raises(TypeError, match="got str"):
        ShadowCascade("out", tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no threshold"):
        ShadowCascade(model, tokenizer()).answer("x")
    with pytest.raises(ValueError, match="prompt is empty"):
        ShadowCascade(model, tokenizer(), threshold=0.5).answer("")
    with pytest.raises(ValueError, match="takeover is 'answer' or 'token'"):
        ShadowCascade(model, tokenizer(), threshold=0.5, takeover="word").answer("x")
    other = Calibration(Scorer(), 0.5, "answer", Promise("regret", 0.1), 0.1, {}, None, {})
    with pytest.raises(ValueError, match="for a takeover per answer, and takeover='token' was given"):
        ShadowCascade(model, tokenizer(), calibration=other, takeover="token")
    assert ShadowCascade(model, tokenizer(), calibration=other, takeover="token", threshold=0.5).takeover == "token"
    with pytest.raises(ValueError, match="not a number"):
        ShadowCascade(model, tokenizer(), threshold=float("nan")).answer("x")
