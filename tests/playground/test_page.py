"""`shadow-peft playground`, driven in a real browser as somebody would use it, on a wide screen and on a phone's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from shadow_peft import ShadowForCausalLM
from shadow_peft.playground.comparison import NAMES, answers, encoded, opinions

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZES = {"wide": (1280, 900), "phone": (390, 844)}
TOKENS = 12

pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed: pip install '.[playground]'"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to drive"),
]


@pytest.fixture(scope="module")
def address(
    model: ShadowForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Where the command serves the page; Ctrl-C ends it with status 0."""
    folder = tmp_path_factory.mktemp("playground")
    model.peft_model.base_model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model.save_pretrained(folder / "out")
    command = [sys.executable, "-m", "shadow_peft.cli", "playground", "--adapter", "out", "--model", "base"]
    command += ["--prompt", r"open\nthe door", "--max_new_tokens", str(TOKENS)]
    environment = {**os.environ, "NO_PROXY": "*", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line.startswith("http://127.0.0.1:"):
                server.kill()
                pytest.fail(f"no address: {line!r}\n{server.communicate()[1]}")
            yield line.split()[0]
            server.send_signal(signal.SIGINT)
            said = server.communicate(timeout=60)[1]
            assert (server.returncode, said) == (0, "")
        finally:
            server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def test_the_playground(
    address: str, browser: Any, model: ShadowForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    elsewhere, errors = [], []
    for name, (width, height) in SIZES.items():
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("request", lambda request: elsewhere.append(request.url) if not _is_here(request.url, address) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        prompt = page.get_by_label("Prompt")
        assert prompt.input_value() == "open\nthe door"

        typed = "close <b>it</b>" if name == "phone" else "open the door"
        prompt.fill(typed)
        page.get_by_role("button", name="Answer").click()
        page.get_by_role("heading", name="Where the opinions differ").wait_for(timeout=60_000)

        inputs = encoded(tokenizer, typed, False, "cpu")
        found = {answer.name: answer for answer in answers(model, tokenizer, inputs, TOKENS)}
        for answer in NAMES:
            card = page.locator(f"#answer-{answer}")
            assert card.locator(".text").text_content() == found[answer].text.replace(
                "\r", "\n"
            )  # HTML has no other line break
            assert "tokens/s" in str(card.text_content())
        thought = opinions(model, tokenizer, inputs, found["attached"].ids)
        differing = [opinion for opinion in thought if not opinion.agrees]
        marks = page.locator(".opinions mark")
        assert marks.count() == len(differing) > 0
        assert all("≠" in text for text in marks.all_text_contents())
        page.get_by_text("Every token as a table").click()
        assert page.locator(".opinions tbody tr").count() == TOKENS

        scrolled = page.evaluate("document.documentElement.scrollWidth")
        assert scrolled <= width, f"{name}: the page is {scrolled} wide"
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        page.close()
    assert elsewhere == [], "the page needs nothing from elsewhere"
    assert errors == []


def test_an_empty_prompt_is_an_error_on_the_page(address: str, browser: Any) -> None:
    page = browser.new_page()
    page.goto(address)
    page.get_by_label("Prompt").fill("")
    page.get_by_role("button", name="Answer").click()
    page.get_by_text("The prompt is empty").wait_for(timeout=60_000)


def _is_here(url: str, address: str) -> bool:
    return url.startswith((address.rstrip("/"), "data:", "blob:"))
