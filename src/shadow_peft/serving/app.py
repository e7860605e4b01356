"""The application, and the process that serves it."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler

from shadow_peft.serving.batcher import Batcher
from shadow_peft.serving.decoding import Decoder
from shadow_peft.serving.guard import Guard, refusal
from shadow_peft.serving.handlers import ANSWERED_BY, Chats, Completions, Responses
from shadow_peft.serving.limits import Limits
from shadow_peft.serving.manager import BatchedState
from shadow_peft.serving.metrics import Metrics
from shadow_peft.serving.routes import ServedModels

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health", "/metrics")
"""What is served; transformers' server has more, which needs other models or loads them on request."""

DRAIN_SECONDS = 5.0
"""Seconds behind the time limit of a request in which a server that is told to stop sends its last answers."""


def build_app(
    served: ServedModels,
    limits: Limits | None = None,
    *,
    draft: bool = False,
    keys: Collection[str] = (),
    allowed_origins: Collection[str] = (),
) -> FastAPI:
    """The application of ASGI.

    Args:
        served: the models.
        limits: None takes the defaults.
        draft: let the shadows draft for greedy requests that are not streamed.
        keys: API keys, one of which a request must bring; none lets everybody in.
        allowed_origins: origins of web pages that may call the server; "null" is that of pages opened from a file, and of
            any page that hides its own, "*" is all.
    """
    limits, metrics = limits or Limits(), Metrics()
    decoder = Decoder(served, draft)
    batcher = Batcher(decoder.kind, decoder.together, decoder.answer, limits, metrics)
    state = BatchedState(served, batcher, limits, metrics)
    handlers = [kind(served, state) for kind in (Chats, Completions, Responses, TranscriptionHandler, SystemOneHandler)]
    app: FastAPI = build_server(served, *handlers, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]
    app.router.lifespan_context = _closing(batcher, decoder)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)

    @app.get("/metrics")
    def metrics_text() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(Guard, limits=limits, keys=keys, metrics=metrics, paths=PATHS)
    if allowed_origins:  # before the guard, so that a page can read its refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=[ANSWERED_BY, "Retry-After"],
        )
    return app


def serve(app: FastAPI, host: str, port: int, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT; requests that were taken are answered first, new connections are refused."""
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # it warns of every request that it gets
    seconds = int(limits.timeout + DRAIN_SECONDS)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=seconds)
    uvicorn.Server(config).run()


def _closing(batcher: Batcher, decoder: Decoder) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        yield
        batcher.close()
        decoder.close()

    context: AbstractAsyncContextManager[Any] | Any = lifespan
    return context


async def _refused(_: Any, error: Any) -> JSONResponse:
    response = refusal(error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response


async def _malformed(_: Any, error: Any) -> JSONResponse:
    return refusal(400, "The body must be a JSON object: " + "; ".join(str(e.get("msg")) for e in error.errors()[:3]))
