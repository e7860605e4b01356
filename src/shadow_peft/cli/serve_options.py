"""The options of `shadow-peft serve`; needs no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from shadow_peft.cli.ranges import Dtype, require

ANY_PAGE = ("null", "*")
"""Origins that any web page can have: null is that of files, and of frames without an origin."""


@dataclass
class ServeOptions:
    """Options of `shadow-peft serve`."""

    adapter: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=PLACE of each adapter: its name in requests, and its folder or hub id."},
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Base, by default the one that the first adapter names; or an exported shadow without adapters."},
    )
    base_name: str = field(default="base", metadata={"help": "Name of the base, or of the exported shadow, in requests."})
    remote_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint that cascades ask instead of the adapted base."}
    )
    remote_model: str | None = field(
        default=None,
        metadata={"help": "Name of the model there; the variable SHADOW_PEFT_API_KEY holds its key."},
    )
    remote_timeout: float = field(
        default=30.0, metadata={"help": "Most seconds that the endpoint may take, before the shadow's answer is sent."}
    )
    adapters_in_memory: int | None = field(
        default=None,
        metadata={"help": "Most adapters in memory, those used least recently make room; by default all are."},
    )
    draft: bool = field(default=False, metadata={"help": "The shadow drafts greedy answers that are not streamed."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    api_key_file: str | None = field(
        default=None, metadata={"help": "File of API keys, one a line; a request must bring one of them."}
    )
    allowed_origins: list[str] = field(
        default_factory=list,
        metadata={"help": "Origins of web pages that may call the server, such as http://127.0.0.1:9000; null is any file."},
    )
    max_prompt_tokens: int = field(default=4096, metadata={"help": "Longest prompt in tokens."})
    max_new_tokens: int = field(
        default=1024, metadata={"help": "Most tokens of an answer; also the limit where a request names none."}
    )
    max_queue: int = field(default=256, metadata={"help": "Requests that may wait; one more gets status 429."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds in which a request must be answered."})
    max_batch: int = field(default=32, metadata={"help": "Requests that are answered together."})
    window: float = field(default=5.0, metadata={"help": "Milliseconds that a request waits for others to share a batch."})
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the base; auto is that of its file."})
    device: str | None = field(default=None, metadata={"help": "Device to compute on; by default a GPU if there is one."})
    check: bool = field(default=False, metadata={"help": "Load everything, say what would be served, and end."})

    def __post_init__(self) -> None:
        if not self.adapter and (self.model is None or self.remote_url is None):
            raise ValueError("give --adapter; or an exported shadow as --model, and who it asks as --remote_url")
        if (self.remote_url is None) != (self.remote_model is None):
            raise ValueError("--remote_url and --remote_model go together: where the endpoint is, and its model's name")
        if self.base_name in self.named_adapters():
            raise ValueError(f"--base_name {self.base_name} is the name of an adapter, too")
        wrong = [origin for origin in self.allowed_origins if not is_origin(origin)]
        if wrong:
            example = "scheme, host and port, such as http://127.0.0.1:9000, or null, or *"
            raise ValueError(f"--allowed_origins takes {example}; got {wrong[0]!r}")
        for name in ("max_prompt_tokens", "max_new_tokens", "max_queue", "max_batch"):
            require(name, getattr(self, name), 1)
        require("adapters_in_memory", self.adapters_in_memory, 2)
        require("port", self.port, 0, 65535)
        require("window", self.window, 0)
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"--timeout must be above 0, got {self.timeout}")
        if self.remote_url is not None and not 0 < self.remote_timeout < self.timeout:
            raise ValueError(f"--remote_timeout must be above 0 and below --timeout, got {self.remote_timeout}")

    def named_adapters(self) -> dict[str, str]:
        """Name -> place.

        Raises:
            ValueError: an adapter without name or place, or two of one name.
        """
        found: dict[str, str] = {}
        for entry in self.adapter:
            name, _, place = entry.partition("=")
            if not (name and place):
                raise ValueError(f"--adapter takes NAME=PLACE, such as robot=out, got {entry!r}")
            if name in found:
                raise ValueError(f"--adapter has two of the name {name}")
            found[name] = place
        return found


def is_origin(text: str) -> bool:
    """Whether a text is what a browser sends as `Origin`, or a star for all."""
    return text in ANY_PAGE or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@,;]+", text) is not None
