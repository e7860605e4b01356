"""`shadow-peft cascade`: calibrating, scoring and answering, and a line for every mistake."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowForCausalLM, get_shadow_model
from shadow_peft.cascade.storage import FILE, load_calibration
from shadow_peft.cli import main
from shadow_peft.cli.cascade import EXAMPLES
from shadow_peft.cli.options import OPTIONS
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.config import ShadowConfig
from tests.cascade.worlds import endpoint
from tests.cli.conftest import model_folder, write_lines  # noqa: F401
from tests.tiny_models import with_nonzero_weights

SHORT = ["--max_new_tokens", "4"]


@pytest.fixture(scope="session")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """An adapter with its tokenizer, its exported shadow in `shadow`, and rows to calibrate on in `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("cascade") / "out"
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = ShadowForCausalLM(with_nonzero_weights(get_shadow_model(base, ShadowConfig()))).eval()
    model.save_pretrained(folder)
    model.export_shadow().save_pretrained(folder / "shadow")
    for place in (folder, folder / "shadow"):
        tokenizer.save_pretrained(place)
    rows: list[object] = []
    for i in range(80):
        ids = tokenizer(f"say {i}:", return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        rows.append({"prompt": f"say {i}:", "completion": text if i % 4 and text.strip() else "no"})
    write_lines(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that may be written into."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `cascade` says where it refuses."""
    assert main(["cascade", *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert 1 <= len(shown.err.splitlines()) <= 2
    assert shown.err.startswith("shadow-peft cascade: ")
    return shown.err


def test_a_threshold_decides_who_answers(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {}
    for threshold in ("-inf", "inf"):
        assert main(["cascade", "--adapter", str(trained), f"--threshold={threshold}", "say 1:", *SHORT]) == 0
        answers[threshold] = capsys.readouterr()
    for threshold, options in (("-inf", ["--shadow_only"]), ("inf", [])):
        assert main(["generate", "--adapter", str(trained), "say 1:", *options, *SHORT]) == 0
        assert capsys.readouterr().out == answers[threshold].out
    assert "answered by shadow, confidence 0." in answers["-inf"].err
    assert "answered by attached, confidence 0." in answers["inf"].err


def test_calibrate_then_answer_and_score(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(out / "rows.jsonl")
    asked = ["--promise", "escalations", "--target", "0.4"]
    assert main(["cascade", "--adapter", str(out), "--calibrate", rows, *asked, *SHORT]) == 0
    shown = capsys.readouterr().out
    assert "calibrated:\n" in shown
    assert "promise      escalations <= 0.4 with confidence 0.95" in shown
    assert f"shadow-peft cascade --adapter {out} 'say 0:'" in shown
    found = load_calibration(out)
    curve = json.loads((out / "cascade_curve.json").read_text())
    assert curve["area"] == found.report["area"]
    assert curve["shares"][0] == 0.0
    assert (out / "cascade.png").read_bytes().startswith(b"\x89PNG")
    assert main(["cascade", "--adapter", str(out), "--data", rows, "say 1:", *SHORT]) == 0
    shown = capsys.readouterr()
    assert "scored:\n" in shown.out
    assert "80 rows" in shown.out
    assert "answered by shadow: " in " ".join(shown.out.split())
    assert "answered by" in shown.err


def test_a_promise_that_cannot_be_kept_writes_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(out / "rows.jsonl")
    said = mistake(capsys, "--adapter", str(out), "--calibrate", rows, "--target", "0.99", *SHORT)
    assert "cannot carry quality 0.99 with confidence 0.95: the best that can be promised is 0." in said
    assert not (out / FILE).exists()


def test_calibrated_for_the_edge(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shadow, rows = out / "shadow", str(out / "rows.jsonl")
    asked = ["--promise", "escalations", "--target", "0.4", "--output", str(shadow)]
    assert main(["cascade", "--adapter", str(out), "--calibrate", rows, *asked, *SHORT]) == 0
    capsys.readouterr()
    with endpoint(text=" from afar") as told:
        place = ["--model", str(shadow), "--remote_url", told.base_url, "--remote_model", "big"]
        assert main(["cascade", *place, "--data", rows, *SHORT]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"remote: {len(told.requests)}" in shown
        assert 0 < len(told.requests) < 80
        told.kind = "error"
        assert main(["cascade", *place, "--threshold", "inf", "say 1:", *SHORT]) == 0
        assert "answered by shadow (remote failed), confidence" in capsys.readouterr().err


def test_the_edge_needs_no_trainer_and_no_scikit_learn(out: Path) -> None:
    shadow = out / "shadow"
    command = ["cascade", "--model", str(shadow), "--remote_url", "http://127.0.0.1:9/v1", "--remote_model", "big"]
    missing = ("accelerate", "datasets", "trl", "peft", "sklearn", "scipy", "matplotlib", "lm_eval")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r})); from shadow_peft.cli import main; "
        f"sys.exit(main({[*command, '--threshold=-inf', 'say 1:', *SHORT]!r}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "answered by shadow, confidence" in run.stderr


def shown_commands() -> list[str]:
    """The commands in the help of the verb, and on the pages."""
    docs = Path(__file__).parents[2] / "docs"
    text = EXAMPLES + "".join((docs / page).read_text(encoding="utf-8") for page in ("cli.md", "cascade.md"))
    return [line.strip() for line in text.splitlines() if line.strip().startswith("shadow-peft cascade ")]


@pytest.mark.parametrize("command", shown_commands())
def test_every_command_that_is_shown_is_accepted(command: str) -> None:
    parser = VerbParser("cascade", OPTIONS["cascade"], "", "")
    parser.add_argument("text", nargs="*")
    options, *_ = parse(parser, shlex.split(command)[2:])
    assert options.adapter or options.remote_url


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x"], "give --adapter; or an exported shadow as --model, and who it asks as --remote_url"),
        (["--model", "m", "x"], "give --adapter; or an exported shadow"),
        (["--adapter", "a", "--remote_url", "http://x", "x"], "--remote_url and --remote_model go together"),
        (["--adapter", "a", "--calibrate", "d.jsonl"], "--calibrate and --target go together"),
        (["--adapter", "a", "--target", "0.5", "x"], "--calibrate and --target go together"),
        (["--adapter", "a", "--calibrate", "d", "--target", "0.5", "--threshold", "0.1"], "drop --threshold"),
        (["--adapter", "a", "--calibrate", "d", "--target", "1.5"], "--target must lie between 0 and 1, got 1.5"),
        (["--adapter", "a", "--confidence", "1", "x"], "--confidence must be 0, or lie between 0 and 1, got 1.0"),
        (["--adapter", "a", "--output", "o", "x"], "--output is where --calibrate writes"),
        (["--adapter", "a", "--threshold", "nan", "x"], "--threshold is not a number"),
        (["--adapter", "a", "--timeout", "0", "x"], "--timeout must be above 0"),
        (["--adapter", "a", "--threshold", "0.5"], "nothing to do: give a text"),
        (["--adapter", "a/b/c", "--calibrate", "d.jsonl", "--target", "0.5"], "a/b/c is no folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_found_before_anything_is_loaded(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in mistake(capsys, *arguments)


def test_mistakes_in_files(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = ["--adapter", str(out)]
    assert f"there is no cascade.json in {out}; give --threshold" in mistake(capsys, *adapter, "x")
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "once upon a time"}])
    target = ["--target", "0.5", *SHORT]
    assert "rows of plain text have no right answer" in mistake(capsys, *adapter, "--calibrate", str(texts), *target)
    assert "none.jsonl" in mistake(capsys, *adapter, "--data", str(tmp_path / "none.jsonl"), "--threshold", "0.5")
    (out / FILE).write_text("{}")
    assert "is no calibration of a cascade: it has no 'format'" in mistake(capsys, *adapter, "x")
    few = write_lines(tmp_path / "few.jsonl", [{"prompt": "say 1:", "completion": "x"}] * 3)
    assert "needs 40 examples or more, got 3" in mistake(capsys, *adapter, "--calibrate", str(few), *target)
