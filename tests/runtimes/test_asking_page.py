"""The page that asks a local `shadow-peft serve` where the shadow is unsure: who answers, and that nothing else is sent."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from shadow_peft.cascade.answers import Policy
from shadow_peft.cascade.decoding import run_shadow
from shadow_peft.cascade.scorer import LogisticHead, Scorer
from shadow_peft.cascade.signals import ANSWER_SIGNALS, TOKEN_SIGNALS
from shadow_peft.cascade.trace import Trace
from shadow_peft.export import html
from shadow_peft.export.check import generates
from shadow_peft.export.runtimes import Ask, Page, Settings, Source
from tests.runtimes.needs import need
from tests.serving.conftest import base, chat_tokenizer, running, stored  # noqa: F401
from tests.serving.test_answers import alone

pytest.importorskip("fastapi")
from shadow_peft.serving.app import build_app
from shadow_peft.serving.routes import ServedModels, load_served

PROMPT, TOKENS = "text: {}\n", 12
SCORER = Scorer("mean_margin")
PHONE = {"width": 400, "height": 800}
TYPED = ("bring the red cup", "open the door", "stop", "12 cups", "go", "left")


def trace_of(source: Source, ids: list[int]) -> Trace:
    """What transformers thinks of the answer to a prompt."""
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, eos_token_id=1)
    prompt = torch.tensor([ids])
    return run_shadow(source.model, prompt, torch.ones_like(prompt), config).traces[0]


def confidence(source: Source, typed: str) -> float:
    return SCORER(trace_of(source, list(source.tokenizer(PROMPT.replace("{}", typed))["input_ids"])))


@pytest.fixture(scope="module")
def served(stored: dict[str, Path]) -> ServedModels:  # noqa: F811
    return load_served(base(), chat_tokenizer(), {"one": stored["one"]})


@pytest.fixture(scope="module")
def texts(source: Source) -> tuple[str, str, float]:
    """A text of which the shadow is sure, one of which it is not, and a threshold between."""
    ranked = sorted(TYPED, key=lambda typed: confidence(source, typed))
    low, high = confidence(source, ranked[0]), confidence(source, ranked[-1])
    assert high - low > 1e-3, "the test could not fail"
    return ranked[-1], ranked[0], (low + high) / 2


@pytest.fixture(scope="module")
def asked(
    source: Source, served: ServedModels, texts: tuple[str, str, float], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[html.Browser, int]]:
    """The page on a phone in the dark, and the port of the server that it asks."""
    need("html")
    parts = html.read_parts(source, Settings())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ask = Ask(f"http://127.0.0.1:{port}/v1", "one", SCORER.to_dict(), texts[2], timeout=20)
    file = tmp_path_factory.mktemp("asking") / html.FILE
    file.write_text(html.compose(Page(prompt=PROMPT, max_tokens=TOKENS, ask=ask), parts), encoding="utf-8")
    with html.opened(file, offline=False, viewport=PHONE, color_scheme="dark") as browser:
        yield browser, port


@contextmanager
def serving(served: ServedModels, port: int, *origins: str) -> Iterator[None]:
    with running(build_app(served, allowed_origins=origins), port):
        yield


def enter(browser: html.Browser, typed: str) -> tuple[str, str]:
    """What the page answers, and what it says of who answered."""
    page = browser.page
    page.get_by_role("textbox", name="Your text").fill(typed)
    page.keyboard.press("Enter")
    page.get_by_text(re.compile("^Ready.$")).wait_for(timeout=60_000)
    return page.locator("#answer").text_content(), page.locator("#by").text_content()


@pytest.mark.parametrize("takeover", ["answer", "token"])
def test_the_page_is_as_sure_as_python(
    takeover: Any, asked: tuple[html.Browser, int], source: Source, prompts: list[list[int]]
) -> None:
    knots, levels = (0.0, 0.1, 0.4, 1.0), (0.02, 0.3, 0.6, 0.98)
    names = ANSWER_SIGNALS if takeover == "answer" else TOKEN_SIGNALS
    scorers = [Scorer(name, knots, levels) for name in names]
    if takeover == "answer":
        scorers.append(Scorer("head", knots, levels, LogisticHead((-0.2, 0.1, 0.5, -0.4, 0.3, -0.6, 0.2), 0.1)))
    decided = []
    for scorer in scorers:
        for ids in prompts:
            trace = trace_of(source, ids)
            if takeover == "answer":
                threshold = scorer(trace) + (0.05, -0.05)[len(ids) % 2]
            else:  # between the two tokens that are the least sure
                threshold = sum(sorted(scorer.of_tokens(trace))[:2]) / 2
            policy = {"scorer": scorer.to_dict(), "threshold": threshold, "takeover": takeover}
            expected = Policy(scorer, threshold, takeover).decide(trace)
            script = "([ids, tokens, policy]) => window.shadow.decide(ids, tokens, policy)"
            found = asked[0].page.evaluate(script, [ids, TOKENS, policy])
            assert found["place"] == expected[0]
            assert found["confidence"] == pytest.approx(expected[1], abs=2e-4)
            decided.append(expected[0])
    assert len(set(decided)) > 1, "the test could not fail"


def test_the_server_answers_where_the_shadow_is_unsure_and_only_there(
    asked: tuple[html.Browser, int],
    served: ServedModels,
    texts: tuple[str, str, float],
    stored: dict[str, Path],  # noqa: F811
) -> None:
    (browser, port), (sure, unsure, _) = asked, texts
    page, switch = browser.page, browser.page.get_by_role("switch")
    address = f"http://127.0.0.1:{port}"
    assert page.locator("label:has(#ask)").text_content().strip() == f"Ask one at {address} where the shadow is unsure"
    with serving(served, port, "null"):
        _, said = enter(browser, sure)
        assert said.startswith("The shadow in this page answered (confidence ")
        assert browser.requests == []
        answer, said = enter(browser, unsure)
        assert said.startswith(f"one at {address} answered. The shadow was unsure (confidence ")
        assert answer == alone("one", PROMPT.replace("{}", unsure), stored, TOKENS)
        assert set(browser.requests) == {f"{address}/v1/completions"}
        count = len(browser.requests)
        switch.focus()
        page.keyboard.press("Space")
        assert not switch.is_checked()
        own, said = enter(browser, unsure)
        assert "It is unsure" in said
        assert said.endswith("and asking is switched off.")
        assert own != answer
        assert len(browser.requests) == count
    assert browser.errors == []
    assert page.locator("#by").get_attribute("role") == "status"
    assert page.evaluate("() => document.scrollingElement.scrollWidth") <= PHONE["width"]


def test_the_server_goes_on_where_the_shadow_gets_unsure(
    asked: tuple[html.Browser, int],
    source: Source,
    served: ServedModels,
    stored: dict[str, Path],  # noqa: F811
) -> None:
    browser, port = asked
    scorer = Scorer("min_probability")
    for typed in TYPED:
        prompt = PROMPT.replace("{}", typed)
        ids = list(source.tokenizer(prompt)["input_ids"])
        levels = scorer.of_tokens(trace_of(source, ids))
        places = [i for i in range(1, len(levels)) if levels[i] < min(levels[:i])]
        if places:
            break
    place = places[-1]
    written = [int(token) for token in generates(source.model)(ids, TOKENS)[:place]]
    own = source.tokenizer.decode(written, skip_special_tokens=True)
    policy = {"scorer": scorer.to_dict(), "threshold": (min(levels[:place]) + levels[place]) / 2, "takeover": "token"}
    change = "(policy) => Object.assign(window.shadow.settings.ask, policy)"
    before = browser.page.evaluate("() => ({ ...window.shadow.settings.ask })")
    browser.page.evaluate(change, policy)
    browser.page.get_by_role("switch").check()
    with serving(served, port, "null"):
        answer, said = enter(browser, typed)
    browser.page.evaluate(change, before)
    assert answer == own + alone("one", prompt + own, stored, TOKENS - place)
    assert "The shadow began, and got unsure" in said


def test_a_server_that_gives_no_answer_leaves_the_shadows(
    asked: tuple[html.Browser, int], served: ServedModels, texts: tuple[str, str, float]
) -> None:
    (browser, port), (_, unsure, _) = asked, texts
    page, switch = browser.page, browser.page.get_by_role("switch")
    switch.uncheck()
    own, _ = enter(browser, unsure)
    switch.check()
    marked = "This is the shadow's answer, of which it is unsure"

    def failed() -> str:
        answer, said = enter(browser, unsure)
        assert answer == own
        assert marked in said
        assert page.locator("#by").get_attribute("data-who") == "failed"
        return re.findall(r"did not answer \((.*?)\)\.", said)[0]

    refused = "it cannot be reached, or does not let this page ask"
    assert failed() == refused  # nobody listens
    with serving(served, port):
        assert failed() == refused  # no page may ask
    with serving(served, port, "http://127.0.0.1:1"):
        assert failed() == refused  # another page may
    with socket.create_server(("127.0.0.1", port)):  # listens, and never answers
        page.get_by_role("textbox", name="Your text").fill(unsure)
        page.keyboard.press("Enter")
        page.get_by_text("The shadow is unsure. Asking one").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("(stopped)").wait_for()
        assert page.locator("#answer").text_content() == own
        policy = asdict(Ask(f"http://127.0.0.1:{port}/v1", "one", {}, 1.0, timeout=0.3))
        script = "(ask) => window.shadow.askServer(ask, 'x', 1).catch((error) => error.message)"
        assert page.evaluate(script, policy) == "no answer within 0.3 s"


def test_it_can_send_to_that_server_alone(asked: tuple[html.Browser, int]) -> None:
    for url in ("https://example.org", f"http://127.0.0.1:{asked[1] + 1}/v1"):
        script = "(url) => fetch(url).then(() => 'sent', (error) => error.name)"
        asked[0].errors.clear()
        assert asked[0].page.evaluate(script, url) == "TypeError"
        assert any("Content Security Policy" in error for error in asked[0].errors)


def test_a_page_names_whom_it_asks() -> None:
    ask = Ask("http://localhost:8000/v1", "a <b>", Scorer().to_dict(), float("-inf"), timeout=5)
    text = html.compose(Page(ask=ask), {})
    assert "connect-src blob: data: http://localhost:8000;" in text
    assert "Ask a &lt;b&gt; at http://localhost:8000 where the shadow is unsure" in text
    assert '"threshold": -Infinity, "takeover": "answer", "timeout": 5, "origin": "http://localhost:8000"' in text
    plain = html.compose(Page(), {})
    assert "connect-src blob: data:;" in plain
    assert 'id="ask"' not in plain
    assert "what you type stays in this window." in plain
