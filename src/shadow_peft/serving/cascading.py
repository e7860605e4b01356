"""Batches that a cascade answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from shadow_peft.cascade.answers import Answer
from shadow_peft.cascade.cascade import ShadowCascade
from shadow_peft.cascade.remote import RemoteModel
from shadow_peft.cascade.writing import Writers
from shadow_peft.serving.requests import Request, Written
from shadow_peft.serving.row_text import cut_at

logger = logging.getLogger(__name__)

PASSED_ON = ("temperature", "top_p", "frequency_penalty", "stop")
"""Fields of a request that a remote model is sent, too."""


class EncodedWriters(Writers):
    """Writers whose prompts are token ids already."""

    def _ids(self, prompt: Any) -> list[int]:
        return list(prompt)


def answer_by_cascade(cascade: ShadowCascade, batch: Sequence[Request], waiting: Executor) -> None:
    """Answer requests with one config; an answer arrives in one piece.

    Args:
        cascade: with a local or a remote model.
        batch: its requests.
        waiting: where a remote model is waited for, so that the next batch need not.
    """
    live = [request for request in batch if not request.over]
    if not live:
        return
    sides = cascade._sides
    assert isinstance(sides, Writers)
    writers = EncodedWriters(sides.shadow, sides.attached, cascade.tokenizer, live[0].config)
    prompts: Any = [request.prompt for request in live]
    if cascade.remote is None:
        for request, answer in zip(live, writers.answers(prompts, cascade.policy), strict=True):
            _finish(request, answer, list(answer.tokens or ()))
        return
    for request, (answer, place) in zip(live, writers.shadow_answers(prompts, cascade.policy), strict=True):
        if place is None:
            _finish(request, answer, list(answer.tokens or ()))
        else:
            waiting.submit(_ask, writers, cascade.remote, request, answer, place)


def _ask(writers: Writers, remote: RemoteModel, request: Request, answer: Answer, place: int) -> None:
    """In a thread: the remote model's answer to a request that somebody still waits for."""
    if request.over:
        return
    try:
        body = request.body
        prompt = body["messages"] if "messages" in body else body["prompt"]
        found = writers.ask(_as_asked(remote, body), prompt, answer, place)
        tokens = found.tokens
        if tokens is None:
            tokens = tuple(writers.tokenizer(found.text, add_special_tokens=False)["input_ids"])
        _finish(request, found, list(tokens))
    except Exception as error:  # nobody else would tell the client
        logger.exception("A request that another server was asked for failed")
        request.fail(error)


def _as_asked(remote: RemoteModel, body: dict[str, Any]) -> RemoteModel:
    """The remote model with the sampling that a request asks for; the likeliest tokens where it asks for none."""
    given = {name: body[name] for name in PASSED_ON if name in body}
    defaults = {} if "top_p" in given else dict(remote.extra)
    return replace(remote, extra=tuple((defaults | given).items()))


def _finish(request: Request, answer: Answer, tokens: list[int]) -> None:
    text = answer.text[: cut_at(answer.text, request.stops)]
    request.write(text)
    request.finish(Written(text, tokens, str(answer.answered_by)))
