"""What the server answers, through the official client: each model what it answers alone, in whatever batch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

from shadow_peft import ShadowForCausalLM
from tests.serving.conftest import ADAPTERS, base, chat_tokenizer, client, running

pytest.importorskip("fastapi")
from shadow_peft.serving.app import build_app
from shadow_peft.serving.limits import Limits
from shadow_peft.serving.routes import load_served

PROMPT, TOKENS = "put the red box", 8
NAMES = ["base", *ADAPTERS, *(f"{name}:shadow" for name in ADAPTERS)]


@pytest.fixture(scope="module")
def api(stored: dict[str, Path]) -> Iterator[openai.OpenAI]:
    app = build_app(load_served(base(), chat_tokenizer(), stored), Limits(window=0.05, new_tokens=64))
    with running(app) as address, client(address) as connected:
        yield connected


@torch.no_grad()
def alone(name: str, prompt: str, stored: dict[str, Path], tokens: int = TOKENS) -> str:
    """What one model answers by itself."""
    adapter, _, shadow = name.partition(":")
    model = base() if name == "base" else ShadowForCausalLM.from_pretrained(base(), stored[adapter])
    if shadow:
        model.set_inference_mode("shadow_only")
    tokenizer = chat_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(ids, do_sample=False, max_new_tokens=tokens, pad_token_id=0)[0, ids.shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True))


@pytest.fixture(scope="module")
def expected(stored: dict[str, Path]) -> dict[str, str]:
    found = {name: alone(name, PROMPT, stored) for name in NAMES}
    assert len(set(found.values())) == len(NAMES), "the models must be told apart by their answers"
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_completion_is_that_of_the_model_alone(name: str, api: openai.OpenAI, expected: dict[str, str]) -> None:
    answer = api.completions.create(model=name, prompt=PROMPT, max_tokens=TOKENS, temperature=0)
    assert (answer.choices[0].text, answer.model) == (expected[name], name)
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", TOKENS)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_is_the_same_text_in_pieces(name: str, api: openai.OpenAI, expected: dict[str, str]) -> None:
    chunks = list(api.completions.create(model=name, prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True))
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert "".join(pieces) == expected[name]
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_and_responses_use_the_template(api: openai.OpenAI, stored: dict[str, Path]) -> None:
    expected = alone("two", "user: hello\nassistant:", stored)
    chat = api.chat.completions.create(
        model="two", messages=[{"role": "user", "content": "hello"}], max_tokens=TOKENS, temperature=0
    )
    assert chat.choices[0].message.content == expected
    response = api.responses.create(model="two", input="hello", max_output_tokens=TOKENS, temperature=0)
    assert response.output_text == expected
    stream = api.chat.completions.create(
        model="two", messages=[{"role": "user", "content": "hello"}], max_tokens=TOKENS, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
    events = api.responses.create(model="two", input="hello", max_output_tokens=TOKENS, temperature=0, stream=True)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected


def test_no_model_answers_for_another(api: openai.OpenAI, stored: dict[str, Path]) -> None:
    prompts = ["go", "open the door quickly", PROMPT]
    wanted = {(name, prompt, n): alone(name, prompt, stored, n) for name in NAMES for prompt in prompts for n in (1, 5)}
    asked = list(wanted) * 2

    def ask(key: tuple[str, str, int]) -> str:
        name, prompt, tokens = key
        return api.completions.create(model=name, prompt=prompt, max_tokens=tokens, temperature=0).choices[0].text

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, asked)) == [wanted[key] for key in asked]


def test_models_are_listed(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list().data] == [
        "base", *(entry for name in ADAPTERS for entry in (name, f"{name}:shadow")),
    ]  # fmt: skip


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(api: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        c = api.completions
        return c.create(model="one", prompt=PROMPT, max_tokens=20, temperature=1.5, top_p=0.9, seed=seed).choices[0].text

    lone = [ask(seed) for seed in range(6)]
    assert len(set(lone)) == 6
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == lone


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_ends_before_a_stop_string(streamed: bool, api: openai.OpenAI, stored: dict[str, Path]) -> None:
    whole = alone("one", PROMPT, stored, 30)
    stop = whole[7:10]
    c = api.completions
    if streamed:
        chunks = c.create(model="one", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop], stream=True)
        text = "".join(chunk.choices[0].text for chunk in chunks)
    else:
        answer = c.create(model="one", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop])
        text = answer.choices[0].text
        assert answer.choices[0].finish_reason == "stop"
    assert text == whole[: whole.index(stop)]


def test_an_unknown_model_is_not_found(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'four'"):
        api.completions.create(model="four", prompt="x")
