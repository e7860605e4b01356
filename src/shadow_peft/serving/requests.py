"""One request on its way through the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from shadow_peft.serving.routes import Route


@dataclass(frozen=True)
class Written:
    """A finished answer.

    Attributes:
        text: without special tokens.
        tokens: its ids.
        answered_by: who answered, of a cascade; else None.
    """

    text: str
    tokens: list[int]
    answered_by: str | None = None


class TimedOutError(Exception):
    """A request was not answered in time."""


class Request:
    """A prompt with its settings, and the way back to the client.

    The worker's thread calls `write`, `finish` and `fail`; what they say arrives in the event loop, and only while the
    request is not over. `cancel` and `expire` are called in the event loop.

    Args:
        route: who answers.
        prompt: token ids, at least one.
        config: how, with `max_new_tokens`, `eos_token_id` and `pad_token_id`.
        stops: strings before which the answer ends.
        seed: of the sampling; None draws one.
        on_text: takes pieces of the answer; None where only the whole counts.
        on_end: takes the answer, or what went wrong.
        keep_special: pieces have special tokens, too.
        body: what the client sent.
    """

    def __init__(
        self,
        route: Route,
        prompt: list[int],
        config: GenerationConfig,
        *,
        stops: tuple[str, ...],
        seed: int | None,
        on_text: Callable[[str], None] | None,
        on_end: Callable[[Written | Exception], None],
        keep_special: bool = False,
        body: dict[str, Any] | None = None,
    ) -> None:
        self.route, self.prompt, self.config, self.stops, self.seed = route, prompt, config, stops, seed
        self.on_text, self._on_end, self.keep_special = on_text, on_end, keep_special
        self.body = body or {}
        self._loop = asyncio.get_running_loop()
        self.arrived = time.monotonic()
        self.over = False
        self.hung_up = False
        self._timer: asyncio.TimerHandle | None = None

    def expire_after(self, seconds: float) -> None:
        """Give up when the time is over."""
        self._timer = self._loop.call_later(seconds, self._end, TimedOutError(f"There was no answer in {seconds:g} s."))

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.hung_up = self.hung_up or not self.over
        self._close()

    def write(self, text: str) -> None:
        """Send a piece of the answer."""
        if text and self.on_text is not None:
            self._loop.call_soon_threadsafe(self._write, text)

    def finish(self, written: Written) -> None:
        """The answer is complete."""
        self._loop.call_soon_threadsafe(self._end, written)

    def fail(self, error: Exception) -> None:
        """There will be no answer."""
        self._loop.call_soon_threadsafe(self._end, error)

    def _write(self, text: str) -> None:
        if not self.over and self.on_text is not None:
            self.on_text(text)

    def _end(self, outcome: Written | Exception) -> None:
        if not self.over:
            self._close()
            self._on_end(outcome)

    def _close(self) -> None:
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
