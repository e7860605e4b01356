"""The options of `shadow-peft export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shadow_peft.cli.ranges import Dtype, require


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
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the weights; auto is the one they were trained in."})
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
