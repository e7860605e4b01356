"""Every recipe runs as it stands, on a tiny random model and on a tiny dataset with the columns of the one it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from shadow_peft.cli import main
from shadow_peft.training.sources import load_examples
from shadow_peft.training.templates import PromptTemplate
from tests.cli.stand_ins import STAND_INS, stand_in
from tests.quantized_bases import need
from tests.tiny_models import llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--use_cpu"]
QUIET = ["--disable_tqdm", "True", "--bf16", "False", "--dtype", "float32"]

#: Recipe -> the first example that it makes of its dataset.
FIRST = {
    "gsm8k": ("Question: What is 0 + 1?\nAnswer:", " 0 + 1 = 1\n#### 1"),
    "gsm8k_4bit": ("Question: What is 0 + 1?\nAnswer:", " 0 + 1 = 1\n#### 1"),
    "gsm8k_lora": ("Question: What is 0 + 1?\nAnswer:", " 0 + 1 = 1\n#### 1"),
    "gsm8k_pretrained_shadow": ("Question: What is 0 + 1?\nAnswer:", " 0 + 1 = 1\n#### 1"),
    "gsm8k_dora": ("Question: What is 0 + 1?\nAnswer:", " 0 + 1 = 1\n#### 1"),
    "mmlu": ("Pick 0\nA. zero\nB. one\nC. two\nD. three\nAnswer:", " A"),
    "squad_v2": (
        "Title: Normans\n\nBackground: In Normandy they lived.\n\nQuestion: Where did they live?\n\nAnswer:",
        " Normandy",
    ),
    "amazon_reviews": ("Review: Broke on day 0.\nStars from one to five:", " one"),
    "20_newsgroups": ("Newsgroup of a posting.\n\nPosting: About alt.atheism\n\nNewsgroup:", " alt.atheism"),
    "chat": ([{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "hello to you"}]),
}


def recipe(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    return loaded


def form_of(settings: dict[str, Any]) -> PromptTemplate:
    return PromptTemplate(**{name: settings[name] for name in PromptTemplate.__dataclass_fields__ if name in settings})


def test_every_recipe_is_known_here() -> None:
    assert {path.stem for path in RECIPES} == set(FIRST)


@pytest.mark.parametrize("name", FIRST)
def test_recipe_makes_the_examples_it_means(name: str, tmp_path: Path) -> None:
    settings = recipe(name)
    folder = stand_in(settings["data"], tmp_path)
    split = settings.get("data_split", "train")
    examples = load_examples(str(folder), form_of(settings), name=settings.get("data_name"), split=split)
    assert (examples[0]["prompt"], examples[0]["completion"]) == FIRST[name]
    if name == "squad_v2":
        assert examples[1]["completion"] == " unanswerable"


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes")
def test_recipe_runs_unchanged_on_stand_ins(name: str, tmp_path: Path, model_folder: Path, chat_folder: Path) -> None:
    settings, out = recipe(name), tmp_path / "out"
    if settings.get("load_in_4bit"):
        need("bitsandbytes 4")
    model = chat_folder if name == "chat" else model_folder
    data = stand_in(settings["data"], tmp_path, rows=100 if name == "chat" else 12)
    places = ["--model", str(model), "--data", str(data), "--output", str(out)]
    if "shadow_model" in settings:
        small = llama(5, vocab_size=300, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
        small.save_pretrained(tmp_path / "small")
        places += ["--shadow_model", str(tmp_path / "small")]
    assert main(["train", "--config", str(ROOT / "recipes" / f"{name}.yaml"), *places, *SMALL, *QUIET]) == 0
    weights = "adapter_model.safetensors" if settings.get("use_peft") else "shadow_adapter_readout.safetensors"
    assert (out / weights).is_file()
    results = json.loads((out / "all_results.json").read_text(encoding="utf-8"))
    assert results["train_loss"] > 0
    assert results["eval_loss"] > 0
    assert {"README.md", "losses.png", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert (out / "shadow").is_dir() == settings.get("export", False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_its_command(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# shadow-peft train --config recipes/{path.name}")
    assert path.name in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


def test_baselines_differ_from_their_recipe_in_the_method_alone() -> None:
    ours = {key: value for key, value in recipe("gsm8k").items() if key != "output"}
    for name, extra in (("gsm8k_lora", set()), ("gsm8k_dora", {"use_dora"})):
        baseline = recipe(name)
        method = {"use_peft", "lora_r", "lora_alpha", "lora_target_modules", "output"} | extra
        assert {key: value for key, value in baseline.items() if key not in method} == ours
        assert method <= set(baseline)


def test_stand_ins_are_of_datasets_that_recipes_name() -> None:
    assert {recipe(name)["data"] for name in FIRST} == set(STAND_INS)
