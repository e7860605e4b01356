"""`shadow-peft train --task classification` and `shadow-peft classify`: labels, heads, accuracy, export, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shadow_peft import AutoShadowModelForSequenceClassification
from shadow_peft.cli import main
from shadow_peft.training.examples import BadDataError
from shadow_peft.training.labelled import LabelledTexts, load_labelled
from tests.cli.conftest import write_lines

ROWS: list[Any] = [
    {"text": f"{'open the door' if i % 2 else 'a red apple'} {i}", "label": "order" if i % 2 else "thing"} for i in range(24)
]
QUIET = ["--disable_tqdm", "True", "--use_cpu", "--per_device_train_batch_size", "8"]


def train(model: Path, data: Path, output: Path, *options: str) -> int:
    places = ["--model", str(model), "--data", str(data), "--output", str(output)]
    return main(["train", "--task", "classification", *places, *QUIET, *options])


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an exported shadow."""
    folder = tmp_path_factory.mktemp("classifier")
    data = write_lines(folder / "data.jsonl", ROWS)
    options = ["--eval_fraction", "0.25", "--max_steps", "30", "--learning_rate", "1e-2", "--export"]
    assert train(model_folder, data, folder / "out", *options, "--shadow_loss_weight", "1") == 0
    return folder / "out"


def test_both_networks_learn_and_both_accuracies_are_reported(run: Path) -> None:
    results = json.loads((run / "all_results.json").read_text(encoding="utf-8"))
    assert results["eval_accuracy"] == 1.0
    assert results["eval_shadow_accuracy"] == 1.0


def test_loads_with_the_names_of_its_classes(run: Path) -> None:
    model = AutoShadowModelForSequenceClassification.from_pretrained(run)
    assert model.config.id2label == {0: "order", 1: "thing"}


@pytest.mark.parametrize("options", [[], ["--shadow_only"]])
def test_classify_answers_as_the_model_does(run: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "--adapter", str(run), *options, "open the door 5", "a red apple 4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["order", "thing"]
    model = AutoShadowModelForSequenceClassification.from_pretrained(
        run, inference_mode="shadow_only" if options else "base_shadow"
    ).eval()
    with torch.no_grad():
        logits = model(**AutoTokenizer.from_pretrained(run)("a red apple 4", return_tensors="pt")).logits
    assert lines[1] == f"thing  {float(logits.softmax(-1).max()):.1%}"


def test_the_exported_shadow_is_a_stock_classifier(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shadow = AutoModelForSequenceClassification.from_pretrained(run / "shadow")
    assert shadow.config.id2label == {0: "order", 1: "thing"}
    assert main(["classify", "--model", str(run / "shadow"), "open the door 7"]) == 0
    assert capsys.readouterr().out.startswith("order")


def test_card_says_what_it_is_and_how_it_is_used(run: Path) -> None:
    card = ModelCard.load(run / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "to tell the classes `order`, `thing` apart" in card.text
    code = card.text.split("```python\n")[1].split("```")[0].replace('"out"', repr(str(run)))
    exec(code, {})


def test_lora_is_trained_on_the_same_texts(model_folder: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", ROWS)
    options = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--eval_fraction", "0.25", "--max_steps", "2"]
    assert train(model_folder, data, tmp_path / "out", *options) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8"))
    assert 0 <= results["eval_accuracy"] <= 1
    assert "eval_shadow_accuracy" not in results


# ---------------------------------------------------------------- labels


def test_declared_classes_keep_their_order(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ant"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(tmp_path / "d.parquet")
    rows, names = load_labelled(str(tmp_path / "d.parquet"), LabelledTexts())
    assert names == ["zebra", "ant"]
    assert rows["labels"][:] == [1, 0]


def test_indices_are_named_by_the_user(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"a": "x", "b": "y", "stars": 2}, {"a": "z", "b": "w", "stars": 0}])
    rows, names = load_labelled(str(path), LabelledTexts("{a} {b}", label_column="stars"), classes=["one", "two", "three"])
    assert rows.to_list() == [{"text": "x y", "labels": 2}, {"text": "z w", "labels": 0}]
    assert names == ["one", "two", "three"]


def test_truth_values_and_floats_of_a_gappy_column_are_labels(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": "a", "label": True}, {"text": "b", "label": False}])
    rows, names = load_labelled(str(path), LabelledTexts())
    assert (rows["labels"][:], names) == ([1, 0], ["false", "true"])
    (tmp_path / "d.csv").write_text("text,label\na,1\nb,\nc,0\n")
    with pytest.raises(BadDataError) as caught:
        load_labelled(str(tmp_path / "d.csv"), LabelledTexts())
    assert [problem.split(": ")[1] for problem in caught.value.problems] == ["row 2"]


def test_every_bad_row_is_named(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "a", "label": "x"}, {"text": " ", "label": "x"}, {"text": "b", "label": None}]
    path = write_lines(tmp_path / "d.jsonl", rows)
    with pytest.raises(BadDataError) as caught:
        load_labelled(str(path), LabelledTexts())
    assert [problem.split(": ")[1] for problem in caught.value.problems] == ["row 2", "row 3"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--completion", " {x}"], "--completion belongs to the learning of texts"),
        (["--packing"], "--packing belongs to the learning of texts"),
        (["--distillation_weight", "1"], "--distillation_weight belongs to the learning of texts"),
        (["--class_names", "only", "--class_column", "label"], "one class"),
        (["--class_column", "missing"], "no column missing"),
    ],
)
def test_refused(
    options: list[str], said: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "label": "only"} for row in ROWS] if "only" in options else ROWS
    assert train(model_folder, write_lines(tmp_path / "d.jsonl", rows), tmp_path / "out", *options) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
