"""What stands before everything else: the key, the size of the body, and clients that hang up."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from shadow_peft.serving.limits import Limits
from shadow_peft.serving.metrics import Metrics

OPEN_PATHS = ("/health",)
"""Paths that need no key."""


class Guard:
    """ASGI middleware. A request whose client hangs up is cancelled, which frees its row.

    Args:
        app: what it stands before.
        limits: of the body.
        keys: API keys, one of which a request must bring; none lets everybody in.
        metrics: are told every response.
        paths: that are counted by name.
    """

    def __init__(self, app: Any, limits: Limits, keys: Collection[str], metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._limits, self._metrics, self._paths = app, limits, metrics, frozenset(paths)
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.responses.labels(path, str(message["status"])).inc()
            await send(message)

        headers = dict(scope["headers"])
        if not self._admits(scope, headers):
            await refusal(401, "The API key is missing or wrong.")(scope, receive, counted)
            return
        body = await self._body(headers, receive)
        if body is None:
            return
        if isinstance(body, JSONResponse):
            await body(scope, receive, counted)
            return
        await self._until_hung_up(scope, body, receive, counted)

    def _admits(self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes]) -> bool:
        if not self._keys or scope["path"] in OPEN_PATHS:
            return True
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and any([hmac.compare_digest(given.strip(), key) for key in self._keys])

    async def _body(self, headers: dict[bytes, bytes], receive: Any) -> bytes | JSONResponse | None:
        """The whole body; or a refusal; or None where the client has gone."""
        most = self._limits.body_bytes
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            return refusal(413, f"The body may have {most} bytes.")
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        return refusal(413, f"The body may have {most} bytes.")
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            return refusal(408, f"The body did not arrive in {self._limits.body_seconds:g} s.")

    async def _until_hung_up(self, scope: MutableMapping[str, Any], body: bytes, receive: Any, send: Any) -> None:
        """Answer a request; stop when its client hangs up."""
        unread = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def replay() -> MutableMapping[str, Any]:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        answering = asyncio.ensure_future(self._app(scope, replay, send))
        watching = asyncio.ensure_future(watch())
        try:
            await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()
            await asyncio.gather(answering, return_exceptions=gone.is_set())
        finally:
            watching.cancel()
            answering.cancel()


def refusal(status: int, message: str) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)
