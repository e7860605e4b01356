"""Tiny models with a tokenizer of one token a character, and a server that plays an endpoint of any kind."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shadow_peft.cascade.outcomes import Outcome
from shadow_peft.cascade.trace import Trace

PROMPTS = ["say one:", "a much longer prompt than the first", "x", "and the last one"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of 90 printable characters, after padding, begin and end."""
    names = ["<pad>", "<bos>", "<eos>", *map(chr, range(33, 125)), " "]
    characters = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def ids_of(text: str) -> torch.Tensor:
    """Token ids `[1, T]`."""
    return torch.tensor([tokenizer()(text)["input_ids"]])


def simulated(count: int, rng: np.random.Generator, attached: float = 0.92, graded: bool = False) -> list[Outcome]:
    """Outcomes whose shadow is right the more often the surer it is, and whose attached model mostly is."""
    found = []
    for _ in range(count):
        p = np.clip(rng.beta(8, 1.2, rng.integers(2, 9)), 0.02, 0.999)
        margins = np.clip(2 * p - 1, 0, 1)
        qualities = np.array([rng.random() < p.min() ** 1.5, rng.random() < attached], dtype=float)
        if graded:
            qualities = np.clip(qualities * rng.uniform(0.6, 1, 2), 0, 1)
        trace = Trace(tuple(np.log(p)), tuple(p), tuple(margins), tuple(np.sqrt(margins)))
        found.append(Outcome(trace, float(qualities[0]), {0: float(qualities[1])}))
    return found


# ---------------------------------------------------------------- an endpoint


class FakeEndpoint:
    """What a server of the tests is told, and what it was asked.

    Attributes:
        kind: "good", "slow", "dripping", "broken off", "error", "garbage", "no text", "not json".
        text: what it answers.
        requests: path and body of every request.
        keys: what authorized them.
    """

    def __init__(self, kind: str, text: str) -> None:
        self.kind, self.text = kind, text
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.base_url = ""
        self.stopped = threading.Event()


@contextmanager
def endpoint(kind: str = "good", text: str = " from afar") -> Iterator[FakeEndpoint]:
    """A server on a free port of this machine."""
    told = FakeEndpoint(kind, text)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.requests.append((self.path, body))
            told.keys.append(self.headers["Authorization"])
            try:
                _respond(self, told, body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    told.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield told
    finally:
        told.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _respond(handler: BaseHTTPRequestHandler, told: FakeEndpoint, body: dict[str, Any]) -> None:
    if told.kind == "slow":
        told.stopped.wait(20)
        return
    if told.kind == "error":
        _send(handler, 500, "application/json", b'{"error": {"message": "out of memory"}}')
    elif told.kind == "not json":
        _send(handler, 200, "text/html", b"<html>a login page</html>")
    elif told.kind == "garbage":
        _send(handler, 200, "application/json", b'{"answer": 42}')
    elif body["stream"]:
        _stream(handler, told, chat=handler.path.endswith("/chat/completions"))
    else:
        text = 42 if told.kind == "no text" else told.text
        chat = handler.path.endswith("/chat/completions")
        part = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, "finish_reason": "stop", **part}
        _send(handler, 200, "application/json", json.dumps({"id": "1", "choices": [choice]}).encode())


def _stream(handler: BaseHTTPRequestHandler, told: FakeEndpoint, chat: bool) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    for character in told.text:
        text: Any = 42 if told.kind == "no text" else character
        part = {"delta": {"content": text}} if chat else {"text": text}
        _event(handler, {"index": 0, "finish_reason": None, **part})
        if told.kind == "dripping" and told.stopped.wait(0.3):
            return
    if told.kind != "broken off":
        _event(handler, {"index": 0, "finish_reason": "stop", **({"delta": {}} if chat else {"text": ""})})
        handler.wfile.write(b"data: [DONE]\n\n")


def _event(handler: BaseHTTPRequestHandler, choice: dict[str, Any]) -> None:
    handler.wfile.write(b"data: " + json.dumps({"id": "1", "choices": [choice]}).encode() + b"\n\n")
    handler.wfile.flush()


def _send(handler: BaseHTTPRequestHandler, status: int, kind: str, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
