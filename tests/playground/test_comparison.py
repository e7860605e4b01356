"""The four answers are what the model generates, and the opinions are what its logits say."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from shadow_peft import ShadowForCausalLM
from shadow_peft.cli import main
from shadow_peft.playground.comparison import NAMES, Answer, Guess, Opinion, answers, encoded, opinions
from shadow_peft.playground.markup import answers_html, opinions_html
from tests.tiny_models import causal_lm, lfm2, qwen3

PROMPT, TOKENS = "open the door", 12


def test_the_four_answers(model: ShadowForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    inputs = encoded(tokenizer, PROMPT, False, "cpu")
    start, settings = inputs["input_ids"].shape[1], {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    found = {answer.name: answer for answer in answers(model, tokenizer, inputs, TOKENS)}
    assert tuple(found) == NAMES
    assert model.inference_mode == "base_shadow"

    bare = qwen3(vocab_size=300, eos_token_id=1, bos_token_id=None)
    assert found["base"].ids.tolist() == bare.generate(**inputs, **settings)[0, start:].tolist()
    assert found["attached"].ids.tolist() == model.generate(**inputs, **settings)[0, start:].tolist()
    assert found["drafted"].ids.tolist() == found["attached"].ids.tolist()
    model.set_inference_mode("shadow_only")
    assert found["detached"].ids.tolist() == model.generate(**inputs, **settings)[0, start:].tolist()
    model.set_inference_mode("base_shadow")
    assert len({tuple(found[name].ids.tolist()) for name in ("base", "attached", "detached")}) == 3

    for answer in found.values():
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)
        assert answer.tokens_per_second == len(answer.ids) / answer.seconds
    assert found["detached"].base_passes == 0
    assert found["base"].base_passes == found["attached"].base_passes == TOKENS
    assert 1 <= found["drafted"].base_passes <= TOKENS


def test_an_answer_that_cannot_be_drafted_says_why(tokenizer: PreTrainedTokenizerBase) -> None:
    model = causal_lm(lfm2())  # its cache cannot be cropped
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    drafted = list(answers(model, tokenizer, inputs, 2))[-1]
    assert drafted.problem is not None
    assert "crop" in drafted.problem
    assert "no answer: " in answers_html([drafted])


def test_opinions_are_those_of_the_logits(model: ShadowForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    inputs = encoded(tokenizer, PROMPT, False, "cpu")
    attached = list(answers(model, tokenizer, inputs, TOKENS))[1]
    found = opinions(model, tokenizer, inputs, attached.ids)
    assert len(found) == TOKENS
    assert all(opinion.base.token == opinion.token for opinion in found), "greedy: the base writes what it finds likeliest"
    assert any(not opinion.agrees for opinion in found)
    read = inputs["input_ids"]
    for token, opinion in zip(attached.ids, found, strict=True):
        with torch.no_grad():
            outputs = model(input_ids=read)
        shadow = outputs.shadow_logits[0, -1].softmax(-1)
        assert opinion.shadow.token == tokenizer.decode([int(shadow.argmax())])
        assert opinion.shadow.of_written == pytest.approx(float(shadow[token]), abs=1e-5)
        assert opinion.base.of_written == pytest.approx(float(outputs.logits[0, -1].softmax(-1)[token]), abs=1e-5)
        read = torch.cat([read, token.view(1, 1)], dim=1)


def test_a_chat_prompt_is_a_users_message(tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [{"role": "user", "content": PROMPT}]
    expected = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert encoded(tokenizer, PROMPT, True, "cpu")["input_ids"].tolist() == expected["input_ids"].tolist()


def test_an_empty_prompt_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="empty"):
        encoded(tokenizer, "", False, "cpu")


# ---------------------------------------------------------------- markup


def test_answers_are_escaped_and_counted() -> None:
    html = answers_html([Answer("attached", "<b>&", torch.tensor([1, 2]), 0.5, 1)])
    assert '<div class="text">&lt;b&gt;&amp;</div>' in html
    assert "<strong>4.0 tokens/s</strong>, 2 tokens in 1 pass of the base" in html
    assert html.count("waiting") == 3


def test_a_difference_is_a_sign_and_words_not_a_colour_alone() -> None:
    same = Opinion("<a>", Guess(7, "<a>", 0.9), Guess(7, "<a>", 0.8))
    other = Opinion(" b", Guess(8, " b", 0.9), Guess(9, "\n", 0.125))
    html = opinions_html([same, other])
    assert "differs from the adapted base at 1 of 2 tokens" in html
    assert '<div class="text">&lt;a&gt;<mark> b<small> ≠ ⏎</small></mark></div>' in html
    assert "<td>90.0%</td><td>12.5%</td><td>≠ differs</td>" in html
    assert html.count("<td>same</td>") == 1


def test_without_gradio_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "shadow_peft.playground.page", raising=False)
    assert main(["playground", "--adapter", "out"]) == 1
    assert "pip install 'shadow-peft[playground]'" in capsys.readouterr().err
