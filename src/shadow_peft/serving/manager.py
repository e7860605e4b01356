"""One request: its limits, its deadline, and the way of its text back to the client."""

from __future__ import annotations

import asyncio
import copy
import time
from contextlib import suppress
from typing import Any

from fastapi import HTTPException
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    GenerationState,
    _StreamError,
    response_events_to_chunks,
)

from shadow_peft.serving.batcher import Batcher, OverloadedError
from shadow_peft.serving.limits import Limits
from shadow_peft.serving.metrics import Metrics
from shadow_peft.serving.requests import Request, TimedOutError, Written
from shadow_peft.serving.routes import Route, ServedModels, context_of


class BatchedState(GenerationState):
    """Gives every request a manager of its own, all of which share one queue."""

    def __init__(self, served: ServedModels, batcher: Batcher, limits: Limits, metrics: Metrics) -> None:
        super().__init__()
        self._served, self.batcher, self._limits, self._metrics = served, batcher, limits, metrics

    def get_manager(self, model_id: str, use_cb: bool = False) -> BatchedManager:
        """A manager for one request to a model."""
        return BatchedManager(self._served.route(model_id), self.batcher, self._limits, self._metrics)

    def is_cb_alive(self) -> bool:
        """Whether batches are answered; /health asks it."""
        return self.batcher.alive


class BatchedManager(BaseGenerateManager):
    """Hands one request to the queue.

    Attributes:
        answered_by: who answered, once a cascade has; else None.
    """

    def __init__(self, route: Route, batcher: Batcher, limits: Limits, metrics: Metrics) -> None:
        self._route, self._batcher, self._limits, self._metrics = route, batcher, limits, metrics
        self.answered_by: str | None = None

    def generate_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], TextStream]:
        """The queue that gets the pieces of the answer, and what counts its tokens."""
        stream = TextStream(self, response_parser)
        stream.request = self._submit(
            model, inputs, gen_config, on_text=stream.text, on_end=stream.end, keep_special=response_parser is not None
        )
        return stream.queue, stream

    async def generate_non_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, list[int]]:
        """The answer, the length of its prompt, and its tokens.

        Raises:
            HTTPException: 504 where the time was over, 500 where the model failed.
        """
        future: asyncio.Future[Written | Exception] = asyncio.get_running_loop().create_future()

        def end(outcome: Written | Exception) -> None:
            if not future.done():
                future.set_result(outcome)

        request = self._submit(model, inputs, gen_config, on_text=None, on_end=end)
        try:
            outcome = await future
        except asyncio.CancelledError:
            self.cancel(request)
            raise
        self.count(request, outcome)
        if isinstance(outcome, Written):
            return outcome.text, len(request.prompt), outcome.tokens
        raise HTTPException(504 if isinstance(outcome, TimedOutError) else 500, said(outcome))

    def stop(self) -> None:
        """Nothing: the queue is the server's."""

    def cancel(self, request: Request) -> None:
        """The client has gone."""
        if not request.over:
            self._metrics.hang_ups.inc()
        request.cancel()

    def count(self, request: Request, outcome: Written | Exception) -> None:
        """Tell the metrics how a request ended."""
        if isinstance(outcome, TimedOutError):
            self._metrics.timeouts.inc()
        if not isinstance(outcome, Written):
            return
        self.answered_by = outcome.answered_by
        name = request.route.name
        self._metrics.answers.labels(name).inc()
        self._metrics.prompt_tokens.labels(name).inc(len(request.prompt))
        self._metrics.answer_tokens.labels(name).inc(len(outcome.tokens))
        self._metrics.seconds.observe(time.monotonic() - request.arrived)

    def _submit(self, model: PreTrainedModel, inputs: Any, config: GenerationConfig, **ways: Any) -> Request:
        """Put the request into the queue. The handler's config gets the length that the answer may have.

        Raises:
            HTTPException: 400 for a prompt or an answer that is too long, 429 where the queue is full.
        """
        prompt = inputs["input_ids"][0].tolist()
        config.max_new_tokens = self._allowed_tokens(len(prompt), config.max_new_tokens, model)
        own = copy.deepcopy(config)
        stops, own.stop_strings = _as_tuple(own.stop_strings), None
        seed, body = vars(own).pop("seed", None), vars(own).pop("body", None)
        request = Request(self._route, prompt, own, stops=stops, seed=seed, body=body, **ways)
        try:
            self._batcher.submit(request)
        except OverloadedError as error:
            self._metrics.refused.inc()
            raise HTTPException(429, str(error), headers={"Retry-After": str(error.retry_after)}) from error
        request.expire_after(self._limits.timeout)
        return request

    def _allowed_tokens(self, prompt: int, asked: int | None, model: PreTrainedModel) -> int:
        """How many tokens the answer may have."""
        limits = self._limits
        context = context_of(model)
        if prompt == 0:
            raise HTTPException(400, "The prompt is empty: there is nothing to go on with.")
        if prompt > limits.prompt_tokens:
            raise HTTPException(400, f"The prompt has {prompt} tokens, and {limits.prompt_tokens} are allowed.")
        if prompt >= context:
            raise HTTPException(400, f"The prompt has {prompt} tokens, and the model reads {context} with its answer.")
        if asked is None:
            return min(limits.new_tokens, context - prompt)
        if asked > limits.new_tokens:
            raise HTTPException(400, f"{asked} tokens are asked for, and {limits.new_tokens} are allowed.")
        if prompt + asked > context:
            raise HTTPException(400, f"Prompt and answer have {prompt} + {asked} tokens, and the model reads {context}.")
        return asked


class TextStream:
    """Pieces of an answer for a handler of transformers.

    Attributes:
        queue: gets texts, what a parser of answers makes of them, and at the end None or an error.
        total_tokens: tokens of the answer, once it is complete.
        request: whose answer it is.
    """

    request: Request

    def __init__(self, manager: BatchedManager, parser: Any) -> None:
        self._manager, self._parser = manager, parser
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.total_tokens = 0
        if parser is not None:
            self._put(parser.initial_events)

    def text(self, text: str) -> None:
        """A piece of the answer."""
        if self._parser is None:
            self.queue.put_nowait(text)
        else:
            self._put(self._parser.feed(text))

    def end(self, outcome: Written | Exception) -> None:
        """The end of the answer, or what went wrong."""
        self._manager.count(self.request, outcome)
        if not isinstance(outcome, Written):
            self.queue.put_nowait(_StreamError(said(outcome)))
            return
        self.total_tokens = len(outcome.tokens)
        if self._parser is not None:
            with suppress(ValueError, RuntimeError):  # the answer ended within a tool call, which is not one then
                self._put(self._parser.finalize()[1])
        self.queue.put_nowait(None)

    def cancel(self) -> None:
        """The client has gone."""
        self._manager.cancel(self.request)

    def _put(self, events: list[dict[str, Any]]) -> None:
        for item in response_events_to_chunks(events):
            self.queue.put_nowait(item)


def said(error: Exception) -> str:
    """What a client is told; the insides of the server are not its business."""
    return str(error) if isinstance(error, TimedOutError) else "The model failed to answer; the server's log says why."


def _as_tuple(stops: Any) -> tuple[str, ...]:
    return () if stops is None else (stops,) if isinstance(stops, str) else tuple(stops)
