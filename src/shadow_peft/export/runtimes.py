"""The formats that a shadow is exported to beside a folder of transformers: what each needs, and how one is written and run.

A runtime is one module with two functions:

    convert(source, target, settings)      writes into `target`
    running(target)                        a context manager: what was written, loaded by the runtime itself
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, cast
from urllib.parse import urlsplit

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.export.check import Answer

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m"]


class CannotExport(ValueError):
    """A shadow that a runtime has no form for, or a runtime that is not installed."""


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        model: a stock causal language model, in float32 where the runtime has no other dtype.
        tokenizer: its tokenizer.
        folder: both, as a folder of transformers.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path


@dataclass(frozen=True)
class Ask:
    """Whom the page asks where the shadow is unsure: a model behind an OpenAI-compatible endpoint.

    Attributes:
        url: of the endpoint, such as "http://127.0.0.1:8000/v1".
        model: its name there.
        scorer: of a cascade, as plain data: the signal, the knots and levels of its curve, and the head or None.
        threshold: the confidence below which it is asked; may be infinite.
        takeover: "answer" or "token".
        timeout: the most seconds that it may take for an answer.
    """

    url: str
    model: str
    scorer: dict[str, Any]
    threshold: float
    takeover: str = "answer"
    timeout: float = 30.0

    @property
    def origin(self) -> str:
        """Scheme, host and port of the endpoint."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"


@dataclass(frozen=True)
class Page:
    """What the page in the browser says and offers.

    Attributes:
        title: heading of the page.
        about: a sentence on what was trained on what.
        facts: name -> value, a table below it.
        prompt: what is put around the typed text, with `{}` in its place.
        examples: texts to choose from.
        max_tokens: most tokens of an answer.
        ask: whom the page may ask; None makes a page that sends nothing.
    """

    title: str = "A shadow model"
    about: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    prompt: str = "{}"
    examples: tuple[str, ...] = ()
    max_tokens: int = 64
    ask: Ask | None = None


@dataclass(frozen=True)
class Settings:
    """Options of a format.

    Attributes:
        type: of the weights in a GGUF.
        page: what the page in the browser says and offers.
    """

    type: GgufType = "f16"
    page: Page = field(default_factory=lambda: Page())


@dataclass(frozen=True)
class Running:
    """A model in its runtime.

    Attributes:
        answer: its greedy answer to a prompt.
        tokens: text -> token ids by the runtime's own tokenizer, without special tokens; None where it has none.
    """

    answer: Answer
    tokens: Callable[[str], list[int]] | None = None


class Runtime(Protocol):
    """A runtime's module; `USAGE` is Markdown for the card of what it writes, with `{file}` for a file's name."""

    USAGE: str

    def convert(self, source: Source, target: Path, settings: Settings) -> None:
        """Write the model into a folder."""

    def running(self, target: Path) -> AbstractContextManager[Running]:
        """Load what `convert` wrote."""


@dataclass(frozen=True)
class Needs:
    """Modules that must be importable to write a format, and those to run it beside transformers."""

    to_write: tuple[str, ...]
    to_run: tuple[str, ...]


RUNTIMES: dict[str, Needs] = {
    "gguf": Needs(to_write=("sentencepiece",), to_run=("xllamacpp",)),
    "onnx": Needs(to_write=("onnx", "onnxscript"), to_run=("onnxruntime",)),
    "html": Needs(to_write=("onnx", "onnxscript"), to_run=("playwright",)),
    "openvino": Needs(to_write=("openvino",), to_run=("openvino",)),
    "executorch": Needs(to_write=("executorch",), to_run=("executorch",)),
}
"""Name of a format, which is also its module's and its extra's."""


def runtime(name: str) -> Runtime:
    """The module of a format.

    Raises:
        CannotExport: what writes it is not installed.
    """
    require(name, RUNTIMES[name].to_write)
    return cast(Runtime, import_module(f"shadow_peft.export.{name}"))


def cannot_run(name: str) -> str | None:
    """Why a format cannot be run here, with what brings it; None where it can."""
    try:
        require(name, RUNTIMES[name].to_run)
    except CannotExport as error:
        return str(error)
    return None


def require(name: str, modules: tuple[str, ...]) -> None:
    """Raise `CannotExport` where a module is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise CannotExport(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: {brings(name)}")


def brings(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'shadow-peft[{extra}]'"
