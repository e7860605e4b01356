"""Malformed requests, limits, keys, overload, clients that hang up, and the end of the server."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serving.conftest import base, chat_tokenizer, eventually, running

pytest.importorskip("fastapi")
from shadow_peft.serving import decoding
from shadow_peft.serving.app import build_app
from shadow_peft.serving.batcher import Batcher
from shadow_peft.serving.limits import Limits
from shadow_peft.serving.routes import ServedModels, load_served

SMALL = Limits(prompt_tokens=20, new_tokens=40, queue=2, batch=2, body_bytes=2000, window=0)
GOOD = {"model": "one", "prompt": "go", "max_tokens": 3, "temperature": 0}
TALK = {"model": "one", "messages": [{"role": "user", "content": "go"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def served(stored: dict[str, Path]) -> ServedModels:
    return load_served(base(), chat_tokenizer(), stored)


@contextmanager
def serving(served: ServedModels, limits: Limits = SMALL, **settings: Any) -> Iterator[httpx2.Client]:
    with running(build_app(served, limits, **settings)) as url, httpx2.Client(base_url=url, timeout=30) as http:
        yield http


@pytest.fixture(scope="module")
def http(served: ServedModels) -> Iterator[httpx2.Client]:
    with serving(served) as client:
        yield client


class Gate:
    """Holds every batch before each of its tokens, until it is opened; counts the tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.steps = threading.Event(), 0
        take = decoding.RowEnds.__call__

        def held(criterion: Any, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            assert self.opened.wait(30)
            return take(criterion, *args, **kwargs)

        monkeypatch.setattr(decoding.RowEnds, "__call__", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def metric(http: httpx2.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"shadow_peft_{name}(\{{| )", line))


# ---------------------------------------------------------------- malformed

BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"model": None}, 400, "model is missing"),
    ({"model": 3}, 400, "model must be"),
    ({"model": "one:cascade"}, 404, "no model"),
    ({"prompt": None}, 400, "prompt is missing"),
    ({"prompt": ""}, 400, "empty"),
    ({"prompt": ["a", "b"]}, 400, "prompt must be a text"),
    ({"prompt": "x" * 21}, 400, "21 tokens, and 20"),
    ({"max_tokens": 41}, 400, "41 tokens are asked for, and 40"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": "3"}, 400, "max_tokens"),
    ({"temperature": 2.5}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"frequency_penalty": -1}, 400, "frequency_penalty"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": 1 << 70}, 400, "seed"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": 5}, 400, "stop"),
    ({"stream": "yes"}, 400, "stream"),
    ({"n": 2}, 400, "n is supported only as 1"),
    ({"echo": True}, 400, "echo"),
    ({"logprobs": 3}, 400, "logprobs"),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"5": 1, "99999999": 1}}, 400, "logit_bias names a token that the model does not have; it has 96"),
    ({"generation_config": "{}"}, 400, "generation_config"),
    ({"no_such_field": 1}, 400, "no_such_field"),
    ({"instructions": "x"}, 422, "instructions"),
    ({"reasoning_effort": "low"}, 400, "reasoning_effort is not supported"),
]


@pytest.mark.parametrize(("change", "status", "said"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_be_honoured_is_refused(change: dict[str, Any], status: int, said: str, http: httpx2.Client) -> None:
    response = http.post("/v1/completions", json={**GOOD, **change})
    assert response.status_code == status
    assert said in response.json()["error"]["message"]


def test_what_changes_nothing_is_taken(http: httpx2.Client) -> None:
    plain = http.post("/v1/completions", json=GOOD).json()["choices"][0]["text"]
    for change in ({"logit_bias": {}}, {"temperature": 1e-40}, {"temperature": 1e-5}):
        response = http.post("/v1/completions", json={**GOOD, **change})
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == plain
    said = [http.post("/v1/chat/completions", json={**TALK, **change}) for change in ({}, {"logit_bias": {}})]
    assert [response.status_code for response in said] == [200, 200]
    assert said[0].json()["choices"] == said[1].json()["choices"]


@pytest.mark.parametrize(
    "messages", [[], "hi", [{}], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]]
)
def test_malformed_messages_are_refused(messages: Any, http: httpx2.Client) -> None:
    assert http.post("/v1/chat/completions", json={**TALK, "messages": messages}).status_code == 400
    body = {"model": "one", "input": messages, "max_output_tokens": 3}
    assert http.post("/v1/responses", json=body).status_code == (200 if messages == "hi" else 400)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"null"])
def test_a_body_that_is_no_object_is_refused(body: bytes, http: httpx2.Client) -> None:
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "JSON object" in response.json()["error"]["message"]


def test_a_large_body_is_refused_unread(http: httpx2.Client) -> None:
    assert http.post("/v1/completions", json={**GOOD, "prompt": "x" * 3000}).status_code == 413
    chunks = (b"x" * 500 for _ in range(10))
    assert http.post("/v1/completions", content=chunks).status_code == 413


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/systemone", "/v1/audio/transcriptions"])
def test_what_loads_or_unloads_models_is_not_there(path: str, http: httpx2.Client) -> None:
    assert http.post(path, json={"model": "one"}).status_code == 404


def test_the_server_still_answers_after_all_that(http: httpx2.Client) -> None:
    assert http.post("/v1/completions", json=GOOD).json()["usage"]["completion_tokens"] == 3
    assert http.get("/health").json() == {"status": "ok"}


def test_without_a_length_the_answer_fills_the_context(served: ServedModels) -> None:
    with serving(served, Limits(new_tokens=1000, prompt_tokens=1000)) as http:
        body = {"model": "base", "prompt": "go " * 40, "temperature": 0}
        assert http.post("/v1/completions", json=body).json()["usage"]["total_tokens"] == 128
        said = http.post("/v1/completions", json={**body, "max_tokens": 9}).json()["error"]["message"]
        assert said == "Prompt and answer have 120 + 9 tokens, and the model reads 128."


def test_a_key_is_asked_for(served: ServedModels) -> None:
    with serving(served, keys=["first", "second"]) as http:
        for header in ({}, {"authorization": "Bearer third"}, {"authorization": "first"}):
            refused = http.post("/v1/completions", json=GOOD, headers=header)
            assert (refused.status_code, http.get("/metrics", headers=header).status_code) == (401, 401)
        for key in ("first", "second"):
            header = {"authorization": f"Bearer {key}"}
            assert http.post("/v1/completions", json=GOOD, headers=header).status_code == 200
        assert http.get("/health").status_code == 200


# ---------------------------------------------------------------- overload and time


def test_pages_may_ask_from_the_origins_that_are_named(served: ServedModels) -> None:
    named, other = {"Origin": "null"}, {"Origin": "https://example.org"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    allowed = "access-control-allow-origin"
    with serving(served, keys=["secret"], allowed_origins=["null", "http://127.0.0.1:9000"]) as http:
        preflight = http.options("/v1/completions", headers=named | asked)
        assert (preflight.status_code, preflight.headers[allowed]) == (200, "null")
        refused = http.post("/v1/completions", json=GOOD, headers=named)
        assert (refused.status_code, refused.headers[allowed]) == (401, "null")
        good = http.post("/v1/completions", json=GOOD, headers=named | {"Authorization": "Bearer secret"})
        assert (good.status_code, good.headers[allowed]) == (200, "null")
        assert "access-control-allow-credentials" not in good.headers
        assert http.options("/v1/completions", headers=other | asked).status_code == 400
        assert allowed not in http.get("/health", headers=other).headers
    with serving(served) as http:
        assert http.options("/v1/completions", headers=named | asked).status_code == 405
        assert allowed not in http.get("/health", headers=named).headers


def test_a_full_queue_is_429_with_retry_after(served: ServedModels, gate: Gate) -> None:
    with serving(served) as http, ThreadPoolExecutor(8) as pool:
        first = [pool.submit(http.post, "/v1/completions", json=GOOD)]
        eventually(lambda: gate.steps)
        first += [pool.submit(http.post, "/v1/completions", json=GOOD) for _ in range(2)]
        eventually(lambda: metric(http, "waiting_requests") == 2)
        for stream in (False, True):
            refused = http.post("/v1/completions", json={**GOOD, "stream": stream})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
        assert metric(http, "overloads_total") == 2
        gate.opened.set()
        assert [future.result().status_code for future in first] == [200] * 3


def test_time_that_runs_out_ends_answers_that_wait_and_those_that_are_written(served: ServedModels, gate: Gate) -> None:
    limits = Limits(timeout=0.5, batch=1, window=0)
    with serving(served, limits) as http, ThreadPoolExecutor(8) as pool:
        written = pool.submit(http.post, "/v1/completions", json=GOOD)
        eventually(lambda: gate.steps)
        waits = pool.submit(http.post, "/v1/completions", json=GOOD)
        streamed = http.post("/v1/completions", json={**GOOD, "stream": True})
        assert streamed.text == 'data: {"error": "There was no answer in 0.5 s."}\n\n'
        assert (written.result().status_code, waits.result().status_code) == (504, 504)
        gate.opened.set()
        eventually(lambda: metric(http, "running_rows") == 0)
        assert (gate.steps, metric(http, "timeouts_total"), metric(http, "answers_total")) == (1, 3, 0)


# ---------------------------------------------------------------- hanging up


def hang_up(http: httpx2.Client, body: dict[str, Any], sent: Callable[[], Any]) -> None:
    """Send a request, and close the connection once something holds."""
    data = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + data)
        eventually(sent)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(stream: bool, served: ServedModels, gate: Gate) -> None:
    with serving(served) as http:
        hang_up(http, {**GOOD, "max_tokens": 40, "stream": stream}, lambda: gate.steps)
        eventually(lambda: metric(http, "hang_ups_total") == 1)
        gate.opened.set()
        eventually(lambda: metric(http, "running_rows") == 0)
        assert gate.steps == 1
        assert http.post("/v1/completions", json=GOOD).status_code == 200


def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue(served: ServedModels, gate: Gate) -> None:
    with serving(served) as http, ThreadPoolExecutor(1) as pool:
        first = pool.submit(http.post, "/v1/completions", json=GOOD)
        eventually(lambda: gate.steps)
        for _ in range(4):  # more than the queue holds
            before = metric(http, "hang_ups_total")
            hang_up(http, GOOD, lambda: metric(http, "waiting_requests") >= 1)
            eventually(lambda before=before: metric(http, "hang_ups_total") > before)
        gate.opened.set()
        assert first.result().status_code == 200
        assert metric(http, "overloads_total") == 0


def test_half_a_request_is_no_request(http: httpx2.Client) -> None:
    for sent in (b"POST /v1/comple", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"):
        with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
            connection.sendall(sent)
    assert http.post("/v1/completions", json=GOOD).status_code == 200


# ---------------------------------------------------------------- failures and the end


def test_a_batch_that_fails_tells_its_clients_and_the_next_one_runs(
    served: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("secret of the inside")

    with serving(served) as http:
        with monkeypatch.context() as patch:
            patch.setattr(decoding.Decoder, "_answer_rows", broken)
            failed = http.post("/v1/completions", json=GOOD)
            assert (failed.status_code, "secret" in failed.text) == (500, False)
            assert "failed to answer" in http.post("/v1/completions", json={**GOOD, "stream": True}).text
        assert http.post("/v1/completions", json=GOOD).status_code == 200


def test_the_end_answers_what_was_taken(served: ServedModels, gate: Gate) -> None:
    with ThreadPoolExecutor(4) as pool:
        with serving(served) as http:
            url = http.base_url
            taken = [pool.submit(httpx2.post, f"{url}/v1/completions", json=GOOD, timeout=30)]
            eventually(lambda: gate.steps)  # the others must not come into the same window
            taken += [pool.submit(httpx2.post, f"{url}/v1/completions", json=GOOD, timeout=30) for _ in range(2)]
            eventually(lambda: metric(http, "running_rows") + metric(http, "waiting_requests") == 3)
            threading.Timer(0.3, gate.opened.set).start()
        assert [future.result().json()["usage"]["completion_tokens"] for future in taken] == [3] * 3
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/health")


def test_a_dead_worker_is_unhealthy(served: ServedModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batcher, "alive", property(lambda self: False))
    with serving(served) as http:
        assert http.get("/health").status_code == 503
