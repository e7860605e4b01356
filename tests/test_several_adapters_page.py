"""What docs/several_adapters.md says: its snippets run one after the other, and its numbers are those of the results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.mixed_adapters import page_table
from tests.tiny_models import qwen3

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "several_adapters.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "mixed_adapters.json"


def test_the_snippets_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    qwen3().save_pretrained(tmp_path / "Qwen" / "Qwen3-0.6B")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    known: dict[str, Any] = {}
    *snippets, unloading = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for snippet in snippets:
        exec(snippet, known)
    model = known["model"]
    assert set(model.peft_model.adapter_configs) == {"robot", "default", "poems", "tea", "ode", "second"}
    assert torch.equal(known["drafted"], model.generate(known["ids"], adapter_names=known["names"], max_new_tokens=8))
    assert known["output"].loss.isfinite()
    exec(unloading, known)
    reason = "No weighted sum of these adapters is an adapter: their shadows differ, and a sum has one shadow."
    assert reason in capsys.readouterr().out
    assert reason in PAGE.replace("\n", " ")


def test_the_numbers_are_those_of_the_results() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert page_table(results) in PAGE
    eight = results["rows"]["decode, published, 8"]
    assert eight["mixed to separate"] < 0.5
