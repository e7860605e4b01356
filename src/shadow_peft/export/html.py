"""One page for a browser, with model, tokenizer and runtime inside; it opens from a file.

It asks nothing of any host, unless it was made with an endpoint to ask where the shadow is unsure (`Ask`).

model.html   page, style and script of `page/`; transformers.js and onnxruntime-web, fetched once as
             `page/packages.lock.json` names them; the ONNX graph and the tokenizer. Parts are gzip in base64.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shadow_peft.export import onnx
from shadow_peft.export.fetched import Package, fetch
from shadow_peft.export.runtimes import Ask, CannotExport, Page, Running, Settings, Source

FILE = "model.html"
USAGE = "Open `{file}` in a browser. It needs neither a network nor a server."

_LARGEST = 350_000_000
"""Bytes of weights; a browser's strings end at half a GB."""

_PARTS = Path(__file__).with_name("page")
_MODEL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", onnx.FILE)
_SCRIPTS = ("confidence.js", "ask.js", "page.js")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def packages() -> dict[str, Package]:
    """The npm packages that the page is made of, by name."""
    locked = json.loads((_PARTS / "packages.lock.json").read_text(encoding="utf-8"))
    return {
        name: Package("npm", name, entry["version"], entry["integrity"], tuple(entry["files"]))
        for name, entry in locked.items()
    }


def convert(source: Source, target: Path, settings: Settings) -> None:
    """Write the page.

    Raises:
        CannotExport: the model has no ONNX graph, is too large for a page, or the packages cannot be fetched.
    """
    weights = sum(parameter.nbytes for parameter in source.model.parameters())
    if weights > _LARGEST:
        raise CannotExport(f"the weights have {weights / 1e6:.0f} MB, and a page holds up to {_LARGEST / 1e6:.0f}")
    if not source.tokenizer.is_fast:
        raise CannotExport("transformers.js needs a tokenizer.json, which this tokenizer has not")
    (target / FILE).write_text(compose(settings.page, read_parts(source, settings)), encoding="utf-8")


def read_parts(source: Source, settings: Settings) -> dict[str, bytes]:
    """What a page carries, by name: the runtime, the graph and the tokenizer.

    Raises:
        CannotExport: the model has no ONNX graph, or the packages cannot be fetched.
    """
    parts = _runtime_parts()
    onnx.convert(source, source.folder, settings)
    return parts | {name: (source.folder / name).read_bytes() for name in _MODEL}


def compose(page: Page, parts: dict[str, bytes]) -> str:
    """The page as text.

    Args:
        page: what it says.
        parts: name -> content of what it carries.
    """
    read = {name: (_PARTS / name).read_text(encoding="utf-8") for name in ("page.css", "worker.js", *_SCRIPTS)}
    packed = {name: base64.b64encode(gzip.compress(content, mtime=0)).decode() for name, content in parts.items()}
    facts = page.facts | {"size of this page": f"{sum(map(len, packed.values())) / 1e6:.1f} MB"}
    named = ", ".join(f"{package.name} {package.version}" for package in packages().values())
    settings: dict[str, Any] = {"prompt": page.prompt, "tokens": page.max_tokens}
    if page.ask is not None:
        settings["ask"] = asdict(page.ask) | {"origin": page.ask.origin}
    values = {
        "title": html.escape(page.title),
        "about": f"<p>{html.escape(page.about)}</p>" if page.about else "",
        "css": read["page.css"],
        "examples": _examples(page.examples),
        "facts": "\n".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items()),
        "runtime": f"Runs on {html.escape(named)} (Apache-2.0 and MIT), on one thread of the processor.",
        "resources": "\n".join(
            f'<script type="text/plain" data-part="{name}">{text}</script>' for name, text in packed.items()
        ),
        "worker": read["worker.js"],
        "settings": json.dumps(settings).replace("<", "\\u003c"),  # JavaScript, so an infinite threshold is a number
        "script": "".join(read[name] for name in _SCRIPTS),
        **_ask_parts(page.ask),
    }
    pieces = (_PARTS / "page.html").read_text(encoding="utf-8").split("@")
    return "".join(values.get(piece, piece) if index % 2 else piece for index, piece in enumerate(pieces))


@contextmanager
def running(target: Path) -> Iterator[Running]:
    """The page in a Chromium without a network and without a window."""
    with opened(target / FILE) as browser, asking(browser) as run:
        yield run


@dataclass
class Browser:
    """A page in a browser.

    Attributes:
        page: of playwright.
        requests: addresses that were asked for, but the file's own and what the page made itself.
        errors: errors on the console and exceptions of the script.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextmanager
def opened(file: Path, **context: Any) -> Iterator[Browser]:
    """A page whose model is loaded, in Debian's or playwright's Chromium.

    Args:
        file: the page.
        context: of playwright's `new_context`: viewport, color_scheme, ...; it is offline if nothing else is said.
    """
    from playwright.sync_api import sync_playwright

    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program)
        browser = Browser(chromium.new_context(**{"offline": True} | context).new_page())
        browser.page.on("request", lambda request: _note(browser.requests, request.url))
        browser.page.on("console", lambda said: browser.errors.append(said.text) if said.type == "error" else None)
        browser.page.on("pageerror", lambda error: browser.errors.append(str(error)))
        browser.page.goto(file.resolve().as_uri())
        browser.page.evaluate("() => window.shadow.ready()")
        yield browser
        chromium.close()


@contextmanager
def asking(browser: Browser) -> Iterator[Running]:
    """The model of an opened page.

    Raises:
        RuntimeError: at the end, where the page asked a host for something or its console has errors.
    """

    def answer(prompt: list[int], tokens: int) -> list[int]:
        return list(browser.page.evaluate("([ids, tokens]) => window.shadow.answer(ids, tokens)", [prompt, tokens]))

    def split(text: str) -> list[int]:
        return list(browser.page.evaluate("(text) => window.shadow.split(text)", text))

    yield Running(answer, split)
    if browser.errors or browser.requests:
        raise RuntimeError(f"the page made errors {browser.errors} and requests {browser.requests}")


def _note(requests: list[str], url: str) -> None:
    if not url.startswith(("file:", "blob:", "data:")):
        requests.append(url)


def _runtime_parts() -> dict[str, bytes]:
    folders = {name: fetch(package) / "package" / "dist" for name, package in packages().items()}
    web, runtime = folders["@huggingface/transformers"], folders["onnxruntime-web"]
    return {
        "transformers": (web / "transformers.web.min.js").read_bytes(),
        "runtime": (runtime / "ort.wasm.bundle.min.mjs").read_bytes(),
        "glue": (runtime / "ort-wasm-simd-threaded.mjs").read_bytes(),
        "wasm": (runtime / "ort-wasm-simd-threaded.wasm").read_bytes(),
    }


def _examples(examples: tuple[str, ...]) -> str:
    if not examples:
        return ""
    items = "\n".join(f'<li><button type="button">{html.escape(text)}</button></li>' for text in examples)
    section = '<section aria-labelledby="examples-title">\n<h2 id="examples-title">Examples</h2>'
    return f'{section}\n<ul class="examples">\n{items}\n</ul>\n</section>'


def _ask_parts(ask: Ask | None) -> dict[str, str]:
    """The origin that the page may send to, the switch, and what the page says of what is typed."""
    if ask is None:
        return {"origin": "", "ask": "", "privacy": "It needs no network, and what you type stays in this window."}
    model, origin = html.escape(ask.model), html.escape(ask.origin)
    switch = f"""<p class="ask"><label><input type="checkbox" id="ask" role="switch" checked aria-describedby="ask-hint">
Ask {model} at {origin} where the shadow is unsure</label></p>
<p id="ask-hint" class="hint">Only then your text goes to that server. Switched off, it stays in this window.</p>"""
    privacy = f"What you type stays in this window, unless the shadow is unsure and the switch is on: then {origin} gets it."
    return {"origin": f" {origin}", "ask": switch, "privacy": privacy}
