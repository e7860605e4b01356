"""`shadow-peft export --to html` with an endpoint to ask: when the page asks, from a calibration or an option."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from shadow_peft.cascade.calibration import Calibration, Promise
from shadow_peft.cascade.cascade import fingerprint
from shadow_peft.cascade.scorer import Scorer
from shadow_peft.cascade.storage import save_calibration
from shadow_peft.cli import main
from shadow_peft.cli.errors import UserError
from shadow_peft.cli.export_options import ExportOptions, is_endpoint
from shadow_peft.cli.export_page import page_of
from shadow_peft.export import hf
from shadow_peft.export.runtimes import Ask, Page
from tests.tiny_models import llama

URL, NAME = "http://127.0.0.1:8000/v1", "robot"
SCORER = Scorer("mean_margin", (0.0, 0.5, 1.0), (0.1, 0.4, 0.9))


def page(adapter: Path, **options: Any) -> Page:
    given = {"to": "html", "remote_url": URL, "remote_model": NAME, **options}
    return page_of(llama(), hf.Origin(str(adapter), None), ExportOptions(**given))


def calibrated(folder: Path, threshold: float = 0.62, takeover: Any = "answer", **provenance: Any) -> Path:
    given = {"fingerprint": fingerprint(llama()), "generation": {"max_new_tokens": 17}} | provenance
    promise = Promise("regret", 0.1)
    save_calibration(Calibration(SCORER, threshold, takeover, promise, 0.05, {}, None, given), folder)
    return folder


def test_without_an_endpoint_it_asks_nobody(tmp_path: Path) -> None:
    found = page(calibrated(tmp_path), remote_url=None, remote_model=None)
    assert found.ask is None
    assert found.max_tokens == ExportOptions().check_tokens
    assert "asks where it is unsure" not in found.facts


def test_a_calibration_says_when_and_how_long_answers_are(tmp_path: Path) -> None:
    found = page(calibrated(tmp_path), timeout=7)
    assert found.ask == Ask(URL, NAME, SCORER.to_dict(), 0.62, "answer", 7)
    assert found.max_tokens == 17
    said = "robot at http://127.0.0.1:8000, where the confidence in an answer of up to 17 tokens is below 0.62"
    assert found.facts["asks where it is unsure"] == said
    other = page(tmp_path, threshold=-math.inf).ask
    assert other is not None
    assert (other.threshold, other.scorer) == (-math.inf, SCORER.to_dict())


def test_a_threshold_is_enough(tmp_path: Path) -> None:
    found = page(tmp_path, threshold=0.3, check_tokens=9)
    assert found.ask == Ask(URL, NAME, Scorer().to_dict(), 0.3)
    assert found.max_tokens == 9


def test_what_says_nothing_of_this_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the adapter has no cascade\.json, so give --threshold"):
        page(tmp_path)
    with pytest.raises(UserError, match="made for another shadow"):
        page(calibrated(tmp_path, fingerprint=[-9.0] * 8))
    with pytest.raises(UserError, match="made for sampled answers"):
        page(calibrated(tmp_path, generation={"do_sample": True, "max_new_tokens": 3}))
    (tmp_path / "cascade.json").write_text("{}")
    with pytest.raises(UserError, match="is no calibration of a cascade"):
        page(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "html", "--remote_url", URL], "--remote_url and --remote_model go together"),
        (["--to", "html", "--threshold", "0.5"], "--threshold says when the page asks; add --remote_url"),
        (["--to", "gguf", "--remote_url", URL, "--remote_model", NAME], "--remote_url is for --to html, got --to gguf"),
        (
            ["--to", "html", "--remote_url", "robot", "--remote_model", NAME],
            "is an address such as http://127.0.0.1:8000/v1",
        ),
        (["--to", "html", "--remote_url", URL, "--remote_model", NAME, "--timeout", "inf"], "up to 3600, got inf"),
        (["--to", "html", "--remote_url", URL, "--remote_model", NAME, "--threshold", "nan"], "--threshold is not a number"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "/nowhere", *options]) == 1
    assert said in capsys.readouterr().err


def test_an_address_cannot_carry_a_policy_of_its_own() -> None:
    good = ["http://127.0.0.1:8000/v1", "https://example.org/a/v1", "http://host"]
    bad = [
        "ftp://x",
        "http://",
        "http://a b/",
        "http://x; script-src *",
        "http://u:p@x/",
        'http://x/"',
        "http://x/?q",
        "x/v1",
    ]
    bad.append("http://[::1]:80/v1")  # which no content security policy can name
    assert [url for url in (*good, *bad) if is_endpoint(url)] == good


def test_rows_that_are_no_examples_are_left_out(tmp_path: Path) -> None:
    rows = ['{"prompt": "a: one"}', "not JSON", "[1]", '{"prompt": 3}', '{"text": "a: two"}', '{"prompt": "b"}']
    (tmp_path / "check.jsonl").write_text("\n".join(rows))
    assert page(tmp_path, check=str(tmp_path / "check.jsonl"), page_prompt="a: {}", threshold=0.5).examples == ("one", "two")
