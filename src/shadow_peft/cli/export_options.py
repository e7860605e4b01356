"""The options of `shadow-peft export`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from shadow_peft.cli.ranges import Dtype, require

_OF_ONE_FORMAT = {"type": "gguf", "dtype": "hf", "page_title": "html", "page_about": "html", "page_prompt": "html"}
"""Option -> the format that it is for."""

LONGEST_TIMEOUT = 3600
"""Seconds that a page waits for an answer, at most."""


@dataclass
class ExportOptions:
    """Options of `shadow-peft export`."""

    to: Literal["hf", "gguf", "onnx", "html", "openvino", "executorch"] = field(
        default="hf",
        metadata={"help": "Format: hf is a folder of transformers, gguf is for llama.cpp, html one page for a browser."},
    )
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_k_m"] = field(
        default="f16", metadata={"help": "Type of the weights in a GGUF."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the base; by default the one that the adapter names."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Folder to write into; by default one inside the adapter's, with the format's name."}
    )
    quantize: Literal["none", "int8", "nf4"] = field(
        default="none",
        metadata={"help": "Store the layers of an hf folder in 8 bits (torchao) or 4 (bitsandbytes)."},
    )
    fold: bool = field(
        default=True,
        metadata={
            "help": "Multiply the projection of a shadow of another width into its head, so that it is a stock model."
        },
    )
    dtype: Dtype = field(
        default="auto", metadata={"help": "dtype of the weights of an hf folder; auto is the one they were trained in."}
    )
    check: str | None = field(
        default=None, metadata={"help": "JSON lines with prompt, messages or text to compare answers on; by default a few."}
    )
    check_prompts: int = field(default=20, metadata={"help": "Number of prompts to take from --check."})
    check_tokens: int = field(default=40, metadata={"help": "Maximum number of tokens of an answer that is compared."})
    page_title: str | None = field(default=None, metadata={"help": "Heading of the page; by default names base and shadow."})
    page_about: str = field(default="", metadata={"help": "A sentence for the page on what was trained on what."})
    page_prompt: str = field(
        default="{}", metadata={"help": "What the page puts around the typed text, with {} in its place; \\n is a new line."}
    )
    remote_url: str | None = field(
        default=None,
        metadata={
            "help": "OpenAI-compatible endpoint that the page asks where the shadow is unsure; by default it asks none."
        },
    )
    remote_model: str | None = field(default=None, metadata={"help": "Name of the model there."})
    timeout: float = field(default=30.0, metadata={"help": "Most seconds that the endpoint may take for an answer."})
    threshold: float | None = field(
        default=None,
        metadata={"help": "Confidence below which the page asks; by default the adapter's cascade.json has it."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier export."})

    def __post_init__(self) -> None:
        require("check_prompts", self.check_prompts, 1)
        require("check_tokens", self.check_tokens, 1)
        if "{}" not in self.page_prompt:
            raise ValueError(f"--page_prompt needs {{}} for the typed text, got {self.page_prompt!r}")
        if self.quantize != "none" and self.to != "hf":
            raise ValueError(f"--quantize is for --to hf, got --to {self.to}")
        if not self.fold and self.to != "hf":
            raise ValueError(f"--no_fold is for --to hf; {self.to} needs a stock model")
        for name, format in _OF_ONE_FORMAT.items():
            if self.to != format and getattr(self, name) != ExportOptions.__dataclass_fields__[name].default:
                raise ValueError(f"--{name} is for --to {format}, got --to {self.to}")
        self._check_remote()

    def _check_remote(self) -> None:
        if (self.remote_url is None) != (self.remote_model is None):
            raise ValueError("--remote_url and --remote_model go together: where the endpoint is, and its model's name")
        if self.remote_url is None:
            if self.threshold is not None:
                raise ValueError("--threshold says when the page asks; add --remote_url and --remote_model")
            if self.timeout != ExportOptions.timeout:
                raise ValueError("--timeout is for the endpoint of a page; add --remote_url and --remote_model")
            return
        if self.to != "html":
            raise ValueError(f"--remote_url is for --to html, got --to {self.to}")
        if not is_endpoint(self.remote_url):
            raise ValueError(f"--remote_url is an address such as http://127.0.0.1:8000/v1, got {self.remote_url!r}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("--threshold is not a number")
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise ValueError(f"--timeout must be above 0, up to {LONGEST_TIMEOUT}, got {self.timeout}")


def is_endpoint(url: str) -> bool:
    """Whether a text is the address of an endpoint: of http or https, with a host, and no name, password or query.

    An IPv6 address is none: a content security policy cannot name it.
    """
    return re.fullmatch(r"https?://[\w.-]+(:\d{1,5})?(/[\w./~%+-]*)?", url, re.ASCII) is not None
