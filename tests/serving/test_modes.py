"""Cascades, drafting, and more adapters than memory has room for."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from transformers import GenerationConfig

from shadow_peft import ShadowCascade, ShadowForCausalLM
from shadow_peft.cascade.calibration import Calibration, Promise
from shadow_peft.cascade.scorer import Scorer
from shadow_peft.cascade.storage import save_calibration
from tests.serving.conftest import ADAPTERS, base, chat_tokenizer, client, running
from tests.serving.test_answers import alone
from tests.tiny_models import causal_lm, gpt2, llama

pytest.importorskip("fastapi")
from shadow_peft.generation.batched import BatchedDrafting
from shadow_peft.serving.app import build_app
from shadow_peft.serving.decoding import Decoder
from shadow_peft.serving.limits import Limits
from shadow_peft.serving.routes import ServedModels, context_of, load_served

PROMPTS = ["put the red box", "go", "open the door", "stop", "left", "and right"]


@contextmanager
def connected(adapters: dict[str, Path], capacity: int | None = None, **settings: Any) -> Iterator[openai.OpenAI]:
    served = load_served(base(), chat_tokenizer(), adapters, capacity=capacity)
    app = build_app(served, Limits(window=0.05, batch=4), **settings)
    with running(app) as url, client(url) as api:
        yield api


def ask(api: openai.OpenAI, name: str, prompt: str, **settings: Any) -> str:
    answer = api.completions.create(model=name, prompt=prompt, **{"max_tokens": 8, "temperature": 0, **settings})
    return answer.choices[0].text


@pytest.mark.parametrize("takeover", ["answer", "token"])
def test_a_cascade_answers_as_it_does_in_python(takeover: Any, stored: dict[str, Path], tmp_path: Path) -> None:
    copytree(stored["one"], tmp_path / "one")
    model = ShadowForCausalLM.from_pretrained(base(), stored["one"])
    scorer, promise = Scorer(), Promise("escalations", 0.5, None)
    policy = ShadowCascade(model, chat_tokenizer(), threshold=0.0)
    confidences = sorted(policy.answer(prompt).confidence for prompt in PROMPTS)
    save_calibration(Calibration(scorer, confidences[3], takeover, promise, 0.5, {}, None, {}), tmp_path / "one")
    cascade = ShadowCascade(
        model, chat_tokenizer(), threshold=confidences[3], takeover=takeover, do_sample=False, max_new_tokens=8
    )
    expected = [cascade.answer(prompt) for prompt in PROMPTS]
    assert len({answer.answered_by for answer in expected}) > 1
    with connected({"one": tmp_path / "one", "two": stored["two"]}) as api, ThreadPoolExecutor(6) as pool:
        assert [m.id for m in api.models.list().data] == [
            "base", "one", "one:shadow", "one:cascade", "two", "two:shadow",
        ]  # fmt: skip
        create = api.completions.with_raw_response.create
        raw = list(pool.map(lambda p: create(model="one:cascade", prompt=p, max_tokens=8, temperature=0), PROMPTS))
        assert [r.parse().choices[0].text for r in raw] == [answer.text for answer in expected]
        assert [r.headers["x-shadow-answered-by"] for r in raw] == [answer.answered_by for answer in expected]
        with pytest.raises(openai.BadRequestError, match="takes no seed"):
            ask(api, "one:cascade", "go", seed=1)


def test_drafted_answers_are_the_same(stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    drafted: list[int] = []
    run = BatchedDrafting.run
    monkeypatch.setattr(BatchedDrafting, "run", lambda self: (drafted.append(len(self._ends)), run(self))[1])
    asked = [(name, prompt, n) for name in ("base", *ADAPTERS) for prompt in PROMPTS[:3] for n in (2, 7)]
    expected = [alone(name, prompt, stored, n) for name, prompt, n in asked]
    with connected(stored, draft=True) as api, ThreadPoolExecutor(12) as pool:
        got = pool.map(lambda key: ask(api, key[0], key[1], max_tokens=key[2]), asked)
        assert list(got) == expected
        whole = alone("one", PROMPTS[0], stored, 20)
        assert ask(api, "one", PROMPTS[0], max_tokens=20, stop=whole[5:8]) == whole[: whole.index(whole[5:8])]
    assert max(drafted) > 1


def test_more_adapters_than_memory_has_room_for(stored: dict[str, Path]) -> None:
    many = {f"{name}-{i}": path for i in range(2) for name, path in stored.items()}
    expected = {name: alone(name, PROMPTS[0], stored) for name in ADAPTERS}
    with connected(many, capacity=3) as api, ThreadPoolExecutor(12) as pool:
        asked = list(many) * 3
        got = pool.map(lambda name: ask(api, name, PROMPTS[0]), asked)
        assert list(got) == [expected[name.partition("-")[0]] for name in asked]


@torch.no_grad()
def test_penalties_and_biases_are_each_rows_own(stored: dict[str, Path]) -> None:
    tokenizer = chat_tokenizer()
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    model = ShadowForCausalLM.from_pretrained(base(), stored["one"])

    def expected(**settings: Any) -> str:
        written = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0, **settings)[0, ids.shape[1] :]
        return str(tokenizer.decode(written))

    biased = tokenizer.convert_tokens_to_ids("Z")
    wanted = [expected(), expected(repetition_penalty=1.9), expected(sequence_bias=[[[biased], 5.0]])]
    assert len(set(wanted)) == 3
    settings: list[dict[str, Any]] = [{}, {"frequency_penalty": 0.9}, {"logit_bias": {str(biased): 5.0}}]
    with connected(stored) as api, ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda s: ask(api, "one", PROMPTS[0], **s), settings)) == wanted


def test_a_row_that_has_ended_stays_within_the_table_of_positions() -> None:
    """A long prompt with a short answer, and a short prompt with a long one: together they would pass the context."""
    model = causal_lm(gpt2())
    served = ServedModels(model.eval(), chat_tokenizer(), ["default"])
    context = context_of(model)
    decoder, sizes = Decoder(served), ((context - 3, 2), (2, context // 2), (4, context // 2))
    configs = [GenerationConfig(max_new_tokens=new, do_sample=False) for _, new in sizes]
    route, pairs = served.route("default"), zip(sizes, configs, strict=True)
    waiting: list[Any] = [SimpleNamespace(route=route, prompt=[5] * n, config=config) for (n, _), config in pairs]
    assert decoder.together(waiting, 8) == waiting[:1]
    assert decoder.together(waiting[1:], 8) == waiting[1:]
    too_long = SimpleNamespace(route=route, prompt=[5] * context, config=configs[0])
    assert decoder.together([too_long, *waiting], 8) == [too_long]  # it fails alone, and nobody waits behind it for ever
    rotary = ServedModels(causal_lm(llama()).eval(), chat_tokenizer(), ["default"])
    assert Decoder(rotary).together(waiting, 8) == waiting
    assert context_of(causal_lm(llama(max_position_embeddings=256), shadow_model=gpt2())) == 128  # the shadow's table ends
