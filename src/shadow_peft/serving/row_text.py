"""The text of one row while it is written, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class RowText:
    """Tokens in, text out; a text that may be the beginning of a stop string is held back until it is known.

    Args:
        tokenizer: the fast tokenizer's own `Tokenizer`.
        stops: strings before which the text ends.
        keep_special: write special tokens too.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], keep_special: bool = False) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._decoder = DecodeStream([], skip_special_tokens=not keep_special)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        return self._released(last=False)

    def flush(self) -> str:
        """The text that was held back, once no token follows."""
        return self._released(last=True)

    def _released(self, last: bool) -> str:
        text, cut = self._held, cut_at(self._held, self._stops)
        if self.stopped or cut is not None:
            self.stopped, self._held = True, ""
            return text[: cut or 0]
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def cut_at(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string in a text begins, or None."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that is a beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
