"""Batches that a cascade answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shadow_peft.cascade.cascade import ShadowCascade
from shadow_peft.cascade.writing import Writers
from shadow_peft.serving.requests import Request, Written
from shadow_peft.serving.row_text import cut_at


class EncodedWriters(Writers):
    """Writers whose prompts are token ids already."""

    def _ids(self, prompt: Any) -> list[int]:
        return list(prompt)


def answer_by_cascade(cascade: ShadowCascade, batch: Sequence[Request]) -> None:
    """Answer requests with one config; an answer arrives in one piece."""
    live = [request for request in batch if not request.over]
    if not live:
        return
    sides = cascade._sides
    assert isinstance(sides, Writers)
    writers = EncodedWriters(sides.shadow, sides.attached, cascade.tokenizer, live[0].config)
    prompts: Any = [request.prompt for request in live]
    for request, answer in zip(live, writers.answers(prompts, cascade.policy), strict=True):
        text = answer.text[: cut_at(answer.text, request.stops)]
        request.write(text)
        request.finish(Written(text, list(answer.tokens or ()), str(answer.answered_by)))
