"""`shadow-peft cascade` on what `train --task classification` leaves: the shadow's classes, and the attached model's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shadow_peft import ShadowForSequenceClassification
from shadow_peft.cascade.storage import FILE, load_calibration
from shadow_peft.cli import main
from tests.cascade.test_cli import mistake
from tests.cascade.worlds import endpoint
from tests.cli.conftest import tiny_tokenizer, write_lines
from tests.tiny_models import adapted, llama_classifier

NAMES = ["door", "apple", "other"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a classifier whose two networks differ, its exported shadow in `shadow`, and rows in `rows.jsonl`.

    The right class is the attached model's in three rows of four.
    """
    root = tmp_path_factory.mktemp("classes")
    out, tokenizer = root / "out", tiny_tokenizer()
    llama_classifier(vocab_size=300).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    base = AutoModelForSequenceClassification.from_pretrained(root / "base", **names)
    base.config.pad_token_id = tokenizer.pad_token_id
    model = ShadowForSequenceClassification(adapted(base)).eval()
    with torch.no_grad():
        for parameter in model.peft_model.shadow_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(out)
    model.export_shadow().save_pretrained(out / "shadow")
    for place in (out, out / "shadow"):
        tokenizer.save_pretrained(place)
    rows: list[object] = []
    for i in range(80):
        with torch.no_grad():
            found = model(**tokenizer(f"text {i * 7919}", return_tensors="pt")).logits[0].argsort(descending=True).tolist()
        rows.append({"mail": f"{i * 7919}", "text": f"text {i * 7919}", "label": NAMES[found[0 if i % 4 else 1]]})
    write_lines(out / "rows.jsonl", rows)
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that may be written into."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


def test_a_threshold_decides_who_tells_the_class(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"text {i}" for i in range(12)]
    classes = {}
    for threshold, who, options in (("-inf", "shadow", ["--shadow_only"]), ("inf", "attached", [])):
        assert main(["cascade", "--adapter", str(trained), f"--threshold={threshold}", *texts]) == 0
        shown = capsys.readouterr()
        assert shown.err.count(f"answered by {who}, confidence 0.") == len(texts)
        classes[who] = shown.out.splitlines()
        assert main(["classify", "--adapter", str(trained), *options, *texts]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == classes[who]
    assert classes["shadow"] != classes["attached"], "the test could not fail"


def test_calibrate_then_answer_and_score(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, adapter = str(out / "rows.jsonl"), ["--adapter", str(out)]
    assert main(["cascade", *adapter, "--calibrate", rows, "--promise", "escalations", "--target", "0.6"]) == 0
    shown = capsys.readouterr().out
    assert "promise      escalations <= 0.6 with confidence 0.95" in shown
    found = load_calibration(out)
    assert found.takeover == "answer"
    assert 0 < found.report["escalated"] <= 0.6
    assert found.report["attached_quality"] == pytest.approx(0.75, abs=0.15)
    assert (out / "cascade.png").read_bytes().startswith(b"\x89PNG")
    assert "areas" not in (out / "cascade_curve.json").read_text()
    assert main(["cascade", *adapter, "--data", rows, "--batch_size", "7", "--threshold", "inf"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "quality 0.7500 (exact_match)" in shown
    assert "answered by attached: 80" in shown
    assert main(["cascade", *adapter, "text 1"]) == 0
    assert capsys.readouterr().out.strip() in NAMES


def test_rows_are_read_as_they_were_trained(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--adapter", str(out), "--data", str(out / "rows.jsonl"), "--threshold", "inf"]
    assert main(["cascade", *arguments, "--prompt", "text {mail}", "--class_column", "label"]) == 0
    assert "0.7500 (exact_match)" in " ".join(capsys.readouterr().out.split())


def test_calibrated_for_the_edge(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shadow, rows = out / "shadow", str(out / "rows.jsonl")
    asked = ["--promise", "escalations", "--target", "0.6", "--output", str(shadow)]
    assert main(["cascade", "--adapter", str(out), "--calibrate", rows, *asked]) == 0
    capsys.readouterr()
    with endpoint(text=" apple\n") as told:
        place = ["--model", str(shadow), "--remote_url", told.base_url, "--remote_model", "big"]
        assert main(["cascade", *place, "--data", rows]) == 0
        assert f"remote: {len(told.requests)}" in " ".join(capsys.readouterr().out.split())
        assert 0 < len(told.requests) < 80
        assert main(["cascade", *place, "--threshold", "inf", "text 1"]) == 0
        assert capsys.readouterr().out == "apple\n"
        told.text = "pear"
        assert main(["cascade", *place, "--threshold", "inf", "text 1"]) == 0
        shown = capsys.readouterr()
        assert shown.out.strip() in NAMES
        assert "answered by shadow (remote failed), confidence" in shown.err
        assert "the answer 'pear' is no class" in shown.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max_new_tokens", "4"], "--max_new_tokens belongs to models that write texts"),
        (["--do_sample"], "--do_sample belongs to models that write texts"),
        (["--chat"], "--chat belongs to models that write texts"),
        (["--takeover", "token"], "a class is decided at once"),
        (["--quality", "word_overlap"], "a class is right or wrong, which is exact_match"),
        (["--data", "rows", "--prompt", "{x}", "--completion", "{y}"], "--completion belongs to models that write texts"),
        (["--data", "rows", "--class_column", "klass"], "no column klass"),
        (["--prompt", "{x}"], "--prompt and --class_column say how data are read"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_a_classifier_cannot_do_is_refused(
    options: list[str], said: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(trained / "rows.jsonl") if word == "rows" else word for word in options]
    assert said in mistake(capsys, "--adapter", str(trained), "--threshold", "0.5", "text", *options)


def test_foreign_classes_and_plain_answers_are_named(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"text": "a", "label": "door"}, {"text": "b", "label": "pear"}])
    said = mistake(capsys, "--adapter", str(out), "--data", str(rows), "--threshold", "0.5")
    assert "row 2: the label 'pear' is no class among door, apple, other" in said
    assert "there is no cascade.json" in mistake(capsys, "--adapter", str(out), "a")
    assert not (out / FILE).exists()


def test_a_calibration_of_another_classifier_is_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["--calibrate", str(out / "rows.jsonl"), "--promise", "escalations", "--target", "0.6"]
    assert main(["cascade", "--adapter", str(out), *rows]) == 0
    capsys.readouterr()
    model = AutoModelForSequenceClassification.from_pretrained(out / "shadow")
    with torch.no_grad():
        model.score.weight.mul_(-3)
    model.save_pretrained(out / "other")
    AutoTokenizer.from_pretrained(out).save_pretrained(out / "other")
    shutil.copy(out / FILE, out / "other")
    said = mistake(
        capsys, "--model", str(out / "other"), "--remote_url", "http://127.0.0.1:9/v1", "--remote_model", "b", "a"
    )
    assert "made for another shadow" in said
