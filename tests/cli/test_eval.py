"""`shadow-peft eval`: the harness scores our model objects as the logits say, in both inference modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.cli import main
from tests.cli.conftest import write_lines
from tests.cli.stand_ins import GROUPS, stand_in
from tests.tiny_models import with_nonzero_weights

TaskManager = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed").TaskManager
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval"),
]

ROOT = Path(__file__).parents[2]
CHOICES = ["red", "green and blue", "1"]
DOCS = [{"question": f"colour {i}?", "answer": i % 3} for i in range(5)]


@pytest.fixture(scope="session")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stirred adapter, whose shadow and base disagree."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    with_nonzero_weights(get_shadow_model(base, ShadowConfig(alpha=0.7))).save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task of multiple choice and one of generation."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    files = {"test": str(write_lines(tmp_path / "docs.jsonl", DOCS))}
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    choice = {"task": "colours", "output_type": "multiple_choice", "doc_to_choice": CHOICES, "doc_to_target": "answer"}
    until = {"task": "say_on", "output_type": "generate_until", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    text = {"doc_to_text": "What {{question}}"}
    (folder / "colours.yaml").write_text(yaml.safe_dump({**common, **choice, **text, "metric_list": [{"metric": "acc"}]}))
    exact = {"doc_to_target": "red", "metric_list": [{"metric": "exact_match"}]}
    (folder / "say_on.yaml").write_text(yaml.safe_dump({**common, **until, **text, **exact}))
    return folder


def scored(output: Path, *arguments: str) -> dict[str, Any]:
    assert main(["eval", *arguments, "--output", str(output), "--log_samples", "--device", "cpu"]) == 0
    results: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return results


@torch.no_grad()
def by_hand(model: torch.nn.Module, tokenizer: Any, prompt: str, answer: str) -> float:
    """Sum of the log-probabilities of an answer's tokens after a prompt."""
    whole, start = tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])
    logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, whole[i]]) for i in range(start, len(whole)))


def test_loglikelihoods_are_those_of_the_logits(model_folder: Path, adapter: Path, tasks: Path, tmp_path: Path) -> None:
    places = ["--model", str(model_folder), "--adapter", str(adapter), "--include_path", str(tasks), "--tasks", "colours"]
    results = scored(tmp_path / "both.json", *places, "--inference_mode", "both", "--batch_size", "4")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = ShadowForCausalLM.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter)
    seen = {}
    for mode in ("base_shadow", "shadow_only"):
        model.set_inference_mode(mode)
        samples = results["modes"][mode]["samples"]["colours"]
        measured = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
        expected = [[by_hand(model, tokenizer, f"What {d['question']}", f" {c}") for c in CHOICES] for d in DOCS]
        torch.testing.assert_close(torch.tensor(measured), torch.tensor(expected), rtol=1e-4, atol=1e-4)
        right = [max(range(3), key=row.__getitem__) == d["answer"] for row, d in zip(expected, DOCS, strict=True)]
        assert results["modes"][mode]["results"]["colours"]["acc,none"] == pytest.approx(sum(right) / len(right))
        seen[mode] = expected
    assert not torch.allclose(torch.tensor(seen["base_shadow"]), torch.tensor(seen["shadow_only"]), atol=1e-2)
    assert results["provenance"]["command"].startswith("shadow-peft eval --model")


def test_generation_is_the_models_own(model_folder: Path, adapter: Path, tasks: Path, tmp_path: Path) -> None:
    places = ["--model", str(model_folder), "--adapter", str(adapter), "--include_path", str(tasks), "--tasks", "say_on"]
    results = scored(tmp_path / "said.json", *places, "--limit", "2", "--inference_mode", "shadow_only")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = ShadowForCausalLM.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter)
    model.set_inference_mode("shadow_only")
    samples = results["modes"]["shadow_only"]["samples"]["say_on"]
    assert len(samples) == 2
    for sample in samples:
        ids = tokenizer(f"What {sample['doc']['question']}", return_tensors="pt")["input_ids"]
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        said = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == said.split("\n")[0]


def test_bare_model_is_scored_as_it_is(
    model_folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = scored(
        tmp_path / "bare.json", "--model", str(model_folder), "--include_path", str(tasks), "--tasks", "colours"
    )
    assert list(results["modes"]) == ["bare"]
    assert "colours" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["amazon_reviews", "20_newsgroups"])
def test_shipped_tasks_ask_what_their_recipe_taught(name: str, model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    task = yaml.safe_load((ROOT / "recipes" / "tasks" / f"{name}.yaml").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert task["dataset_path"] == recipe["data"]
    task["dataset_path"] = str(stand_in(recipe["data"], tmp_path))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    places = ["--model", str(model_folder), "--adapter", str(adapter), "--include_path", str(tmp_path / "tasks")]
    results = scored(tmp_path / "scores.json", *places, "--tasks", name, "--limit", "1")
    sample = results["modes"]["base_shadow"]["samples"][name][0]
    prompt, answer = sample["arguments"][0]
    assert prompt == recipe["prompt"].format(text=sample["doc"]["text"])
    assert answer == recipe["completion"].format(label=recipe.get("class_names", [""])[0], label_text=GROUPS[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "gsm8k", "--inference_mode", "both"], "needs --adapter"),
        (["--tasks", "gsm8k", "--batch_size", "0"], "--batch_size is a number or auto, got '0'"),
        (["--tasks", "gsm8k", "--limit", "-1"], "--limit must be above 0, got -1"),
        (["--tasks", "x", "--include_path", "/nowhere"], "is no folder"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "m", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_task_that_nobody_knows_is_named(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_defaults(include_path: str, include_defaults: bool) -> Any:
        return TaskManager(include_path=include_path, include_defaults=False)  # the whole catalogue takes seconds to read

    monkeypatch.setattr("shadow_peft.cli.eval.TaskManager", without_defaults)
    assert main(["eval", "--model", "m", "--include_path", str(tasks), "--tasks", "colours", "sounds"]) == 1
    assert "there is no task sounds in lm-evaluation-harness" in capsys.readouterr().err
