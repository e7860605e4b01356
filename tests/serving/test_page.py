"""What docs/serving.md says: its tables are those of the results, its limits those of the code, its snippet runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import openai
import pytest

from benchmarks.serving import page_tables
from tests.serving.conftest import base, chat_tokenizer, running

pytest.importorskip("fastapi")
from shadow_peft.serving.app import PATHS, build_app
from shadow_peft.serving.limits import Limits
from shadow_peft.serving.routes import load_served

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "serving.json").read_text(encoding="utf-8"))
    for table in page_tables(results):
        assert table in PAGE
    assert "WRONG" not in json.dumps(results)
    assert "LOST" not in json.dumps(results)
    assert results["speed"]["not right"] == {}


def test_the_limits_are_those_of_the_code() -> None:
    limits = Limits()
    assert f"arrive in {limits.body_seconds:g} s" in PAGE
    assert limits.body_bytes == 1 << 20
    assert {"/health", "/metrics"} < set(PATHS)


def test_the_snippet_runs(
    stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    served = load_served(base(), chat_tokenizer(), {"robot": stored["one"]})
    with running(build_app(served)) as url:
        known: dict[str, openai.OpenAI] = {}
        exec(snippet.replace("http://127.0.0.1:8000", url), known)
        known["client"].close()
    assert capsys.readouterr().out
