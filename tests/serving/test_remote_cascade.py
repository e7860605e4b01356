"""Served cascades whose attached side is another server: with a base, and with an exported shadow alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any

import openai
import pytest
from transformers import AutoModelForCausalLM

from shadow_peft import RemoteModel, ShadowCascade
from shadow_peft.cascade.answers import Answer, AnsweredBy
from shadow_peft.cascade.calibration import Calibration, Promise
from shadow_peft.cascade.scorer import Scorer
from shadow_peft.cascade.storage import save_calibration
from shadow_peft.cli import main
from tests.cascade.worlds import endpoint
from tests.serving.conftest import adapted, base, chat_tokenizer, client, eventually, running

pytest.importorskip("fastapi")
from shadow_peft.serving.app import build_app
from shadow_peft.serving.limits import Limits
from shadow_peft.serving.routes import ServedModels, load_served, load_served_shadow

PROMPTS = ["put the red box", "go", "open the door", "stop", "left", "and right"]
TALK: Any = [{"role": "user", "content": "go"}]
DECODING: Any = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shadow of an adapter as a model of its own, with its tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    adapted("one").export_shadow().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def shadow_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def calibrated(source: Path, folder: Path, takeover: Any = "answer") -> float:
    """Copy a folder, with a calibration by which half of the prompts are asked for; its threshold."""
    copytree(source, folder)
    cascade = ShadowCascade(adapted("one").eval(), chat_tokenizer(), threshold=0.0, takeover=takeover, **DECODING)
    threshold = sorted(cascade.answer(prompt).confidence for prompt in PROMPTS)[3]
    save_calibration(Calibration(Scorer(), threshold, takeover, Promise("escalations", 0.5, None), 0.5, {}), folder)
    return threshold


def expected(folder: Path, remote: RemoteModel, threshold: float, takeover: Any) -> list[Answer]:
    cascade = ShadowCascade(
        shadow_of(folder), chat_tokenizer(), remote=remote, threshold=threshold, takeover=takeover, **DECODING
    )
    return [cascade.answer(prompt) for prompt in PROMPTS]


@contextmanager
def connected(served: ServedModels) -> Iterator[openai.OpenAI]:
    with running(build_app(served, Limits(window=0.05, batch=4))) as url, client(url) as api:
        yield api


def ask(api: openai.OpenAI, prompt: str, model: str = "base:cascade", **settings: Any) -> tuple[str, str | None]:
    """An answer, and who gave it."""
    create = api.completions.with_raw_response.create
    raw = create(model=model, prompt=prompt, **{"max_tokens": 8, "temperature": 0, **settings})
    return raw.parse().choices[0].text, raw.headers.get("x-shadow-answered-by")


@pytest.mark.parametrize("takeover", ["answer", "token"])
@pytest.mark.parametrize("with_base", [True, False], ids=["adapter", "exported shadow"])
def test_it_answers_as_in_python(
    takeover: Any, with_base: bool, stored: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    threshold = calibrated(stored["one"] if with_base else exported, tmp_path / "own", takeover)
    with endpoint(text=" from afar") as told:
        remote = RemoteModel("big", told.base_url, timeout=20)
        answers = expected(exported, remote, threshold, takeover)
        assert len({answer.answered_by for answer in answers}) > 1
        wanted = sorted((body["prompt"], body["max_tokens"]) for _, body in told.requests)
        told.requests.clear()
        if with_base:
            served = load_served(base(), chat_tokenizer(), {"one": tmp_path / "own"}, remote=remote)
        else:
            served = load_served_shadow(shadow_of(exported), chat_tokenizer(), tmp_path / "own", remote)
        name = "one:cascade" if with_base else "base:cascade"
        with connected(served) as api, ThreadPoolExecutor(6) as pool:
            models = {model.id for model in api.models.list().data}
            assert models == ({"base", "one", "one:shadow", "one:cascade"} if with_base else {"base", "base:cascade"})
            got = list(pool.map(lambda prompt: ask(api, prompt, name), PROMPTS))
            assert got == [(answer.text, answer.answered_by) for answer in answers]
            assert sorted((body["prompt"], body["max_tokens"]) for _, body in told.requests) == wanted
            assert {body["temperature"] for _, body in told.requests} == {0}
            alone = ShadowCascade(shadow_of(exported), chat_tokenizer(), remote=remote, threshold=-1.0, **DECODING)
            shadow = ask(api, PROMPTS[0], "one:shadow" if with_base else "base")
            assert shadow == (alone.answer(PROMPTS[0]).text, None)


@pytest.mark.parametrize("kind", ["slow", "error", "garbage"])
def test_a_server_that_fails_leaves_the_shadows_answer_and_holds_nobody_up(
    kind: str, exported: Path, tmp_path: Path
) -> None:
    threshold = calibrated(exported, tmp_path / "own")
    with endpoint(kind) as told:
        remote = RemoteModel("big", told.base_url, timeout=2)
        cascade = ShadowCascade(shadow_of(exported), chat_tokenizer(), remote=remote, threshold=-1.0, **DECODING)
        shadows = [cascade.answer(prompt) for prompt in PROMPTS]
        served = load_served_shadow(shadow_of(exported), chat_tokenizer(), tmp_path / "own", remote)
        failed = AnsweredBy.SHADOW_REMOTE_FAILED
        who = [failed if answer.confidence < threshold else AnsweredBy.SHADOW for answer in shadows]
        assert set(who) == {failed, AnsweredBy.SHADOW}
        with connected(served) as api, ThreadPoolExecutor(6) as pool:
            unsure = pool.submit(ask, api, PROMPTS[who.index(failed)])
            eventually(lambda: told.requests)
            assert ask(api, PROMPTS[0], "base") == (shadows[0].text, None)
            assert kind != "slow" or not unsure.done()  # the other was answered while this one waited
            got = list(pool.map(lambda prompt: ask(api, prompt), PROMPTS))
            assert got == [(answer.text, marked) for answer, marked in zip(shadows, who, strict=True)]
            assert unsure.result() == got[who.index(failed)]


def test_what_is_asked_for_is_passed_on_or_refused(exported: Path, tmp_path: Path) -> None:
    calibrated(exported, tmp_path / "own")
    calibrated(exported, tmp_path / "token", "token")
    with endpoint(text=" from afar") as told:
        remote = RemoteModel("big", told.base_url, timeout=20)
        served = load_served_shadow(shadow_of(exported), chat_tokenizer(), tmp_path / "own", remote, name="edge")
        served.cascades["edge"]._threshold = 2.0
        with connected(served) as api:
            assert ask(api, "go", "edge:cascade", stop="af", temperature=0.5, top_p=0.9) == (" from ", "remote")
            assert ask(api, "go", "edge:cascade", temperature=openai.NOT_GIVEN, top_p=0.9)[1] == "remote"
            talk = api.chat.completions.create(model="edge:cascade", messages=TALK, max_tokens=8)
            assert talk.choices[0].message.content == " from afar"
            streamed = api.completions.create(model="edge:cascade", prompt="go", max_tokens=8, stream=True)
            assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == " from afar"
            first, second, chat, _ = (body for _, body in told.requests)
            assert {name: first[name] for name in ("model", "prompt", "temperature", "top_p", "stop")} == {
                "model": "big", "prompt": "go", "temperature": 0.5, "top_p": 0.9, "stop": "af",
            }  # fmt: skip
            assert "temperature" not in second
            assert (chat["messages"], chat["temperature"]) == (TALK, 0)
            for field in ({"logit_bias": {"3": 1}}, {"suffix": "x"}):
                with pytest.raises(openai.BadRequestError, match="not supported by a cascade that asks another server"):
                    ask(api, "go", "edge:cascade", **field)
            with pytest.raises(openai.BadRequestError, match="answers completions and chat completions"):
                api.responses.create(model="edge:cascade", input="go")
        served = load_served_shadow(shadow_of(exported), chat_tokenizer(), tmp_path / "token", remote, name="edge")
        with connected(served) as api, pytest.raises(openai.BadRequestError, match="cannot go on within a chat"):
            api.chat.completions.create(model="edge:cascade", messages=TALK)


def test_the_verb(exported: Path, stored: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote = ["--remote_url", "http://127.0.0.1:9/v1", "--remote_model", "big", "--check"]
    assert main(["serve", "--model", str(exported), *remote]) == 1
    assert "There is no cascade.json in" in capsys.readouterr().err
    calibrated(exported, tmp_path / "own")
    assert main(["serve", "--model", str(tmp_path / "own"), "--base_name", "edge", *remote]) == 0
    assert capsys.readouterr().out.split() == ["edge", "edge:cascade"]
    base().save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    adapter = ["--model", str(tmp_path / "base"), "--adapter", f"one={stored['one']}"]
    assert main(["serve", *adapter, *remote]) == 1
    assert "no adapter has a cascade.json, so nobody would ask http://127.0.0.1:9/v1" in capsys.readouterr().err
