"""The options of `shadow-peft playground`; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from shadow_peft.cli.ranges import Dtype, require


@dataclass
class PlaygroundOptions:
    """Options of `shadow-peft playground`."""

    adapter: str = field(metadata={"help": "Folder or hub id of a shadow adapter."})
    model: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the base; by default the one that the adapter names."}
    )
    prompt: str = field(
        default="The function returns", metadata={"help": "First prompt; the two characters \\n mean a line break."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Most tokens of an answer at first."})
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to serve at; 0.0.0.0 lets other machines in, without a password."}
    )
    port: int | None = field(
        default=None, metadata={"help": "Port to serve at; by default the first free one from 7860 on."}
    )
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the base; auto is that of its file."})

    def __post_init__(self) -> None:
        require("max_new_tokens", self.max_new_tokens, 1, 512)
        require("port", self.port, 1, 65535)
