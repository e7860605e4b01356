"""The page: in a real Chromium it answers as transformers does, asks nothing of any host and can be used by keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shadow_peft.export import html
from shadow_peft.export.check import agreement, generates
from shadow_peft.export.runtimes import CannotExport, Page, Settings, Source
from tests.runtimes.conftest import TEXTS
from tests.runtimes.needs import need

PAGE = Page(
    title="Shadow of <base>",
    about="Trained on robot commands & nothing else.",
    facts={"its base": "3,025,344 parameters"},
    prompt="text: {}\n",
    examples=("bring the red cup", "open the </script> door"),
    max_tokens=12,
)
SIZES = {"desktop": {"width": 1100, "height": 900}, "phone": {"width": 360, "height": 740}}


def test_a_page_is_text_with_nothing_left_open() -> None:
    text = html.compose(PAGE, {"config.json": b"{}", "wasm": bytes(range(256))})
    assert not re.search(r"@(title|css|about|examples|facts|runtime|resources|worker|settings|script)@", text)
    assert "<h1>Shadow of &lt;base&gt;</h1>" in text
    assert "<p>Trained on robot commands &amp; nothing else.</p>" in text
    assert "open the &lt;/script&gt; door" in text
    assert text.count("<script") == text.count("</script>") == 4
    assert 'const SETTINGS = {"prompt": "text: {}\\n", "tokens": 12};' in text
    assert text == html.compose(PAGE, {"config.json": b"{}", "wasm": bytes(range(256))})


def test_packages_are_pinned() -> None:
    for name, package in html.packages().items():
        assert (package.registry, package.name) == ("npm", name)
        assert re.fullmatch(r"sha512-[\w+/]{86}==", package.integrity)


def test_a_model_that_is_too_large_for_a_page_is_refused(source: Source, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(html, "_LARGEST", 1000)
    with pytest.raises(CannotExport, match="and a page holds up to"):
        html.convert(source, tmp_path, Settings())


@pytest.fixture(scope="module")
def folder(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("html")
    folder = tmp_path_factory.mktemp("page")
    html.convert(source, folder, Settings(page=PAGE))
    return folder


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[html.Browser]:
    with html.opened(folder / html.FILE, viewport=SIZES["phone"], color_scheme="dark") as browser:
        yield browser


def test_chromium_answers_as_transformers(browser: html.Browser, source: Source, prompts: list[list[int]]) -> None:
    with html.asking(browser) as run:
        assert agreement(generates(source.model), run.answer, prompts, 12, {1}).same == len(prompts)
        assert run.tokens is not None
        assert [run.tokens(text) for text in TEXTS] == prompts
    assert browser.errors == []
    assert browser.requests == []


def test_by_keyboard(browser: html.Browser, source: Source) -> None:
    page = browser.page
    field = page.get_by_role("textbox", name="Your text")
    field.focus()
    page.keyboard.type("bring")
    page.keyboard.press("Shift+Enter")
    assert field.input_value() == "bring\n"
    page.keyboard.press("Enter")
    page.get_by_text("tokens per second").wait_for()
    prompt = list(source.tokenizer("text: bring\n")["input_ids"])
    expected = [token for token in generates(source.model)(prompt, 12) if token != 1]
    assert page.locator("#answer").text_content() == source.tokenizer.decode(expected, skip_special_tokens=True)
    assert page.locator("#answer").get_attribute("aria-busy") == "false"
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Answer"


def test_an_example_is_taken(browser: html.Browser) -> None:
    page = browser.page
    page.get_by_role("button", name="bring the red cup").click()
    page.get_by_text("tokens per second").wait_for()
    assert page.get_by_role("textbox", name="Your text").input_value() == "bring the red cup"
    assert page.locator("#answer").text_content()


def test_it_fits_a_phone_in_the_dark(browser: html.Browser) -> None:
    page = browser.page
    assert page.evaluate("() => document.scrollingElement.scrollWidth") <= SIZES["phone"]["width"]
    colours = page.evaluate("() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    background, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert background < 150 < 600 < text


def test_every_request_is_forbidden(browser: html.Browser) -> None:
    asked = "() => fetch('https://example.org').then(() => 'sent', (error) => error.name)"
    assert browser.page.evaluate(asked) == "TypeError"
    assert any("Content Security Policy" in error for error in browser.errors)
