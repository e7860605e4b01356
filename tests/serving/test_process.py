"""`shadow-peft serve` as a process: it starts, answers, and drains at SIGTERM."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from shadow_peft.cli import main
from tests.serving.conftest import base, chat_tokenizer, eventually
from tests.serving.test_answers import alone
from tests.serving.test_limits import metric

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    base().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def process(base_folder: Path, stored: dict[str, Path], port: int) -> Iterator[subprocess.Popen[bytes]]:
    adapters = [f"{name}={path}" for name, path in stored.items()]
    command = [sys.executable, "-m", "shadow_peft.cli", "serve", "--model", str(base_folder), "--adapter", *adapters]
    started = subprocess.Popen([*command, "--port", str(port), "--max_batch", "1"], stdout=subprocess.PIPE)
    assert started.stdout is not None
    assert f"on http://127.0.0.1:{port}/v1" in started.stdout.readline().decode()
    yield started
    started.kill()
    started.wait()
    started.stdout.close()


def test_sigterm_lets_all_that_was_taken_be_answered(
    process: subprocess.Popen[bytes], port: int, stored: dict[str, Path]
) -> None:
    names, tokens = ["base", *stored, *(f"{name}:shadow" for name in stored)], 60
    url = f"http://127.0.0.1:{port}"

    def ask(name: str) -> str:
        body = {"model": name, "prompt": "go", "max_tokens": tokens, "temperature": 0}
        return str(httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"])

    with httpx2.Client(base_url=url) as http, ThreadPoolExecutor(len(names)) as pool:
        eventually(lambda: listens(port))
        answers = [pool.submit(ask, name) for name in names]
        known = ("waiting_requests", "running_rows", "answers_total")
        eventually(lambda: sum(metric(http, name) for name in known) == len(names) and metric(http, "answers_total") < 5)
        process.send_signal(signal.SIGTERM)
        assert [answer.result() for answer in answers] == [alone(name, "go", stored, tokens) for name in names]
    assert process.wait(30) in (0, -signal.SIGTERM)
    assert not listens(port)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapter", "robot"], "NAME=PLACE"),
        (["--adapter", "a=x", "a=y"], "two of the name a"),
        (["--adapter", "base=x"], "--base_name base is the name of an adapter"),
        (["--adapter", "a=x", "--port", "70000"], "--port must be 0 to 65535"),
        (["--adapter", "a=x", "--adapters_in_memory", "1"], "--adapters_in_memory must be at least 2"),
        (["--adapter", "a=x", "--timeout", "0"], "--timeout must be above 0"),
        (["--adapter", "a=./nowhere"], "is no shadow adapter"),
        (["--adapter", "a=x", "--allowed_origins", "null", "example.org"], "or null, or *; got 'example.org'"),
        (["--model", "x"], "give --adapter; or an exported shadow as --model"),
        (["--adapter", "a=x", "--remote_url", "http://x/v1"], "--remote_url and --remote_model go together"),
        (
            ["--adapter", "a=x", "--remote_url", "http://x/v1", "--remote_model", "b", "--timeout", "9"],
            "--remote_timeout must be above 0 and below --timeout, got 30.0",
        ),
        (["--adapter", "a=x", "--api_key_file", "nowhere"], "--api_key_file nowhere"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("shadow-peft serve: ")
    assert said in line


def test_check_says_what_would_be_served(
    base_folder: Path, stored: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(base_folder), "--adapter", f"one={stored['one']}", "--check"]) == 0
    assert capsys.readouterr().out.split() == ["base", "one", "one:shadow"]


def test_an_adapter_that_does_not_fit_is_one_line(
    base_folder: Path, stored: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").mkdir()
    adapters = [f"one={stored['one']}", f"two={tmp_path / 'broken'}"]
    assert main(["serve", "--model", str(base_folder), "--adapter", *adapters, "--check"]) == 1
    assert "broken" in capsys.readouterr().err
