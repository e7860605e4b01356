"""An OpenAI-compatible endpoint in the place of the attached model.

It may be dead, slow or strange: then the shadow's answer stands. The client runs in a thread of its own. Whatever it waits
for, the caller waits no longer than `timeout` in all. A client's own limit counts from the last byte, so a server that sends
a byte now and then could hold it for ever.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

Prompt = str | list[dict[str, str]]
"""A text to continue, or the messages of a conversation."""

_DONE = object()


class RemoteError(Exception):
    """The endpoint gave no answer; the message says why."""


@dataclass(frozen=True)
class RemoteModel:
    """A model behind an OpenAI-compatible endpoint; needs the package `openai`.

    Attributes:
        model: its name there.
        base_url: such as "http://127.0.0.1:8000/v1".
        api_key: sent to that endpoint; None sends none, whatever the environment holds.
        timeout: the most seconds that an answer may take in all.
        chat: send texts as a user's message to `chat/completions`; else they go to `completions`. Messages always go to
            `chat/completions`.
        stream: ask for the answer in pieces; a connection that breaks in between is noticed then.
        extra: names and values of further fields of the requests; by default a temperature of 0, the likeliest tokens.

    Raises:
        ValueError: a timeout that is not above 0.
        ImportError: `openai` is not installed.
    """

    model: str
    base_url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 30.0
    chat: bool = False
    stream: bool = True
    extra: tuple[tuple[str, Any], ...] = (("temperature", 0),)

    def __post_init__(self) -> None:
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout must be above 0 and finite, got {self.timeout}.")
        import openai  # noqa: F401  now, and not at the first prompt that needs it

    def complete(self, prompt: Prompt, written: str = "", max_tokens: int | None = None) -> str:
        """The endpoint's continuation.

        Args:
            prompt: what to answer.
            written: the beginning of the answer, which the endpoint continues; not for a chat.
            max_tokens: the most tokens to add; None leaves it to the endpoint.

        Raises:
            RemoteError: no answer, no complete one, or no sense in it, or all that not within the time limit.
            ValueError: the beginning of an answer for a chat.
        """
        if written and self.is_chat(prompt):
            raise ValueError("An endpoint cannot continue the answer of a chat; take over per answer.")
        pieces: queue.Queue[Any] = queue.Queue()
        deadline = time.monotonic() + self.timeout
        work = threading.Thread(target=self._work, args=(prompt, written, max_tokens, pieces, deadline), daemon=True)
        work.start()
        found: list[str] = []
        while True:
            try:
                piece = pieces.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise RemoteError(self._too_late) from None
            if piece is _DONE:
                return "".join(found)
            if isinstance(piece, Exception):
                raise RemoteError(_reason(piece)) from piece
            found.append(piece)

    @property
    def _too_late(self) -> str:
        return f"no complete answer within {self.timeout:g} s"

    def is_chat(self, prompt: Prompt) -> bool:
        """Whether a prompt goes to `chat/completions`."""
        return self.chat or not isinstance(prompt, str)

    def _work(self, prompt: Prompt, written: str, max_tokens: int | None, pieces: queue.Queue[Any], deadline: float) -> None:
        """In a thread: pieces of the answer, then `_DONE` or what went wrong."""
        try:
            self._ask(prompt, written, max_tokens, pieces, deadline)
        except Exception as error:  # what a strange server sends may make the client raise anything
            pieces.put(error)
        else:
            pieces.put(_DONE)

    def _ask(self, prompt: Prompt, written: str, max_tokens: int | None, pieces: queue.Queue[Any], deadline: float) -> None:
        from openai import OpenAI

        limits = {} if max_tokens is None else {"max_tokens": max_tokens}
        settings: dict[str, Any] = {"model": self.model, "stream": self.stream, **dict(self.extra), **limits}
        with OpenAI(base_url=self.base_url, api_key=self.api_key or "none", timeout=self.timeout, max_retries=0) as client:
            if self.is_chat(prompt):
                messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
                response: Any = client.chat.completions.create(messages=messages, **settings)
            else:
                response = client.completions.create(prompt=f"{prompt}{written}", **settings)
            finished = False
            for event in response if self.stream else [response]:
                finished = self._take(event, self.is_chat(prompt), pieces) or finished
                if time.monotonic() > deadline:
                    raise RemoteError(self._too_late)
            if not finished:
                raise RemoteError("the answer broke off")

    def _take(self, event: Any, chat: bool, pieces: queue.Queue[Any]) -> bool:
        """Pass on the text of a response, or of a piece of one; whether it is the last piece."""
        for choice in event.choices[:1]:
            text = choice.text if not chat else choice.delta.content if self.stream else choice.message.content
            if text is not None and not isinstance(text, str):
                raise RemoteError(f"the answer is no text but {type(text).__name__}")
            pieces.put(text or "")
            return not self.stream or choice.finish_reason is not None
        return False


def _reason(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, RemoteError) else f"{type(error).__name__}: {text}" if text else type(error).__name__
