"""transformers' handlers of completions, chat and responses, with checks of what they are sent.

Fields that transformers takes and ignores are refused here, unless they say what happens anyway, such as `n=1`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from jinja2 import TemplateError
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler

from shadow_peft.serving.manager import BatchedManager
from shadow_peft.serving.routes import ServedModels, defaults_of

ANSWERED_BY = "x-shadow-answered-by"
"""Header of an answer of a cascade that is not streamed: who answered."""

MOST_STOPS = 16
LOWEST_TEMPERATURE = 1e-4
"""What is below decodes greedily: logits that are divided by less may overflow."""
LARGEST_SEED = 2**63 - 1
OF_THE_SHADOW = ("logit_bias", "chat_template_kwargs", "suffix", "tools")
"""Fields that a cascade with a remote model refuses, since they would reach the shadow alone."""


Check = Callable[[Any], bool]


def _number(low: float, high: float) -> Check:
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and low <= v <= high


def _whole(low: int, high: int) -> Check:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _is_stop(value: Any) -> bool:
    stops = [value] if isinstance(value, str) else value
    return isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(s, str) and s for s in stops)


def _is_bias(value: Any) -> bool:
    number = _number(-100, 100)
    return isinstance(value, dict) and all(str(k).isdecimal() and number(v) for k, v in value.items())


_ANY_TOKENS = (_whole(1, 1 << 31), "a whole number above 0")

#: Field -> what its value must be, and how that is said; a value of null is as good as none.
FIELDS: dict[str, tuple[Check, str]] = {
    "max_tokens": _ANY_TOKENS,
    "max_completion_tokens": _ANY_TOKENS,
    "max_output_tokens": _ANY_TOKENS,
    "temperature": (_number(0, 2), "a number from 0 to 2"),
    "top_p": (lambda v: _number(0, 1)(v) and v > 0, "a number above 0, up to 1"),
    "frequency_penalty": (lambda v: _number(-2, 2)(v) and v > -1, "a number above -1, up to 2"),
    "seed": (_whole(0, LARGEST_SEED), "a whole number, 0 or more"),
    "stop": (_is_stop, f"a text that is not empty, or a list of up to {MOST_STOPS}"),
    "stream": (lambda v: isinstance(v, bool), "true or false"),
    "logit_bias": (_is_bias, "an object of token ids and numbers from -100 to 100"),
    "chat_template_kwargs": (lambda v: isinstance(v, dict), "an object"),
    "suffix": (lambda v: isinstance(v, str), "a text"),
    "tools": (lambda v: isinstance(v, list) and all(isinstance(t, dict) for t in v), "a list of objects"),
    "instructions": (lambda v: isinstance(v, str), "a text"),
    "user": (lambda v: True, ""),
    "metadata": (lambda v: True, ""),
    "store": (lambda v: True, ""),
    "stream_options": (lambda v: isinstance(v, dict), "an object"),
    "model": (lambda v: isinstance(v, str), "the name of a model, see /v1/models"),
    "prompt": (lambda v: isinstance(v, str), "a text"),
    "messages": (lambda v: isinstance(v, list) and bool(v) and all(map(_is_message, v)), "a list of messages"),
    "input": (lambda v: isinstance(v, (str, list)) and bool(v), "a text or a list of messages"),
}

#: Field -> values that say what happens anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "parallel_tool_calls": (True, False),
    "tool_choice": ("auto",),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "background": (False,),
    "truncation": ("disabled",),
}


class CheckedHandler:
    """Checks of requests; stands before a handler of transformers.

    Attributes:
        required: the fields that a request must have.
    """

    required: tuple[str, ...] = ()
    model_manager: ServedModels

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Check a request and answer it.

        Raises:
            HTTPException: 400 for a field that cannot be honoured, 404 for an unknown model, 422 for a field of another
                endpoint.
        """
        body = {name: value for name, value in body.items() if value is not None}
        check_fields(body, ("model", *self.required))
        route = self.model_manager.route(body["model"])
        if route.answering == "cascade" and "seed" in body:
            raise HTTPException(400, "A cascade takes no seed: its answers share one source of random numbers.")
        if self.model_manager.asks_remote(route):
            self._check_remote(body)
        body.setdefault("stream", False)
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except TemplateError as error:
            raise HTTPException(400, f"The chat template refuses these messages: {error}") from error

    def _check_remote(self, body: dict[str, Any]) -> None:
        """Refuse what a remote model would not be told.

        Raises:
            HTTPException: 400.
        """
        wrong = [name for name in OF_THE_SHADOW if name in body]
        if wrong:
            raise HTTPException(400, f"{wrong[0]} is not supported by a cascade that asks another server.")

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> Any:
        """The response, with a header that says who answered, of a cascade."""
        response = await super()._non_streaming(*args, **kwargs)  # type: ignore[misc]
        manager = next(value for value in (*args, *kwargs.values()) if isinstance(value, BatchedManager))
        if manager.answered_by is not None:
            response.headers[ANSWERED_BY] = manager.answered_by
        return response

    def _build_generation_config(self, body: dict[str, Any], *_: Any, **__: Any) -> GenerationConfig:
        """The config of one request, with its seed.

        A request that names a temperature above 0 (`LOWEST_TEMPERATURE`) or a `top_p` samples; one that names none decodes
        as the model's own config says. `max_new_tokens` is None where the request leaves the length open.

        Raises:
            HTTPException: 400 for a bias of a token that the model does not have.
        """
        defaults = defaults_of(self.model_manager.model, self.model_manager.tokenizer)
        asked = {name: value for name, value in body.items() if name != "seed"}
        config: GenerationConfig = super()._build_generation_config(asked, defaults)  # type: ignore[misc]
        if not {"max_tokens", "max_completion_tokens", "max_output_tokens"} & body.keys():
            config.max_new_tokens = None
        if "logit_bias" in body:
            tokens = self.model_manager.model.config.get_text_config(decoder=True).vocab_size
            if max(map(int, body["logit_bias"]), default=0) >= tokens:
                raise HTTPException(400, f"logit_bias names a token that the model does not have; it has {tokens}.")
            config.sequence_bias = [[[int(token)], float(bias)] for token, bias in body["logit_bias"].items()] or None
        if "temperature" in body or "top_p" in body:
            config.do_sample = body.get("temperature", 1) >= LOWEST_TEMPERATURE
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        config.max_length, config.num_beams, config.num_return_sequences = None, None, None
        config.seed, config.body = body.get("seed"), body
        return config


class Completions(CheckedHandler, CompletionHandler):
    """/v1/completions."""

    required = ("prompt",)


class Chats(CheckedHandler, ChatCompletionHandler):
    """/v1/chat/completions."""

    required = ("messages",)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Check a request and answer it; see `CheckedHandler`."""
        _require_template(self.model_manager)
        return await super().handle_request(body, request_id)

    def _check_remote(self, body: dict[str, Any]) -> None:
        super()._check_remote(body)
        if self.model_manager.cascades[self.model_manager.route(body["model"]).adapter].takeover == "token":
            raise HTTPException(400, "Another server cannot go on within a chat: use /v1/completions for this cascade.")


class Responses(CheckedHandler, ResponseHandler):
    """/v1/responses."""

    required = ("input",)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Check a request and answer it; see `CheckedHandler`."""
        _require_template(self.model_manager)
        if isinstance(body.get("input"), list) and not all(map(_is_message, body["input"])):
            raise HTTPException(400, "input must be a text or a list of messages with role and text.")
        return await super().handle_request(body, request_id)

    def _check_remote(self, body: dict[str, Any]) -> None:
        raise HTTPException(400, "A cascade that asks another server answers completions and chat completions.")


def check_fields(body: dict[str, Any], required: tuple[str, ...]) -> None:
    """Check the fields of a request; the handler refuses those that another endpoint has.

    Raises:
        HTTPException: 400, also for a field that nothing here honours.
    """
    for name in required:
        if name not in body:
            raise HTTPException(400, f"{name} is missing: it must be {FIELDS[name][1]}.")
    for name, value in body.items():
        if name not in FIELDS and name not in NEUTRAL:
            raise HTTPException(400, f"{name[:100]} is not supported.")
        if name in FIELDS and not FIELDS[name][0](value):
            raise HTTPException(400, f"{name} must be {FIELDS[name][1]}.")
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise HTTPException(400, f"{name} is supported only as {' or '.join(map(repr, NEUTRAL[name]))}.")


def _require_template(served: ServedModels) -> None:
    if served.tokenizer.chat_template is None:
        raise HTTPException(400, "This model has no chat template; use /v1/completions.")


def _is_message(value: Any) -> bool:
    """Whether a value is a message with texts alone."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    if content is None:
        return _are_calls(value.get("tool_calls"))
    if isinstance(content, str):
        return True
    texts = ("text", "input_text", "output_text")
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") in texts and isinstance(part.get("text"), str) for part in content
    )


def _are_calls(calls: Any) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) and "arguments" in call["function"]
        for call in calls
    )
