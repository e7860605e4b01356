"""Every recipe runs as it stands, on a tiny random model and on a tiny dataset with the columns of the one it names.

Every command in a header or in recipes/README.md is parsed and checked as the command line does it, short of loading.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from shadow_peft.cli import main
from shadow_peft.cli.classify import make_classify_parser
from shadow_peft.cli.options import OPTIONS
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.refusals import check_options
from shadow_peft.cli.train import make_train_parser
from shadow_peft.training.labelled import LabelledTexts, load_labelled
from shadow_peft.training.sources import load_examples
from shadow_peft.training.templates import PromptTemplate
from tests.cli.stand_ins import STAND_INS, stand_in
from tests.quantized_bases import need
from tests.tiny_models import llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(path for place in (FOLDER, FOLDER / "paper") for path in place.glob("*.yaml"))
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
PAPER = ("gsm8k", "squad_v2", "mmlu", "amazon_reviews", "20_newsgroups")
CLASSES: dict[str, tuple[str, str, int]] = {
    "paper/amazon_reviews": ("Broke on day 1.", "two", 5),
    "paper/20_newsgroups": ("About comp.graphics", "comp.graphics", 3),
}
"""Recipe that trains a classification head -> text and class of the second row of its data, and the number of classes."""
FIRST |= {f"paper/{name}": FIRST[name] for name in PAPER if f"paper/{name}" not in CLASSES}

#: Recipe of the paper -> size -> learning rate, batch, epochs, warmup, k, heads, alpha, shadow loss weight, dropout, as in
#: the folder `experiment` of the sdist of shadow-peft 0.1.1; None where it keeps the base's heads.
PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "paper/gsm8k": {
        "0.6B": (3e-3, 32, 4, 0.01, 10, None, 0.1, 0.05, 0.2),
        "4B": (3e-3, 16, 4, 0.01, 8, 16, 0.1, 0.05, 0.2),
        "8B": (3e-3, 16, 4, 0.01, 8, 8, 0.1, 0.05, 0.2),
    },
    "paper/squad_v2": {
        "0.6B": (1e-3, 32, 2, 0.01, 10, None, 0.5, 0.05, 0.2),
        "4B": (1e-3, 16, 2, 0.01, 8, 16, 0.1, 0.05, 0.2),
        "8B": (1e-3, 16, 2, 0.01, 8, 8, 0.1, 0.05, 0.2),
    },
    "paper/mmlu": {
        "0.6B": (2e-4, 32, 2, 0.01, 10, None, 1.5, 0.15, 0.1),
        "4B": (2e-4, 16, 2, 0.01, 8, 16, 0.1, 0.1, 0.1),
        "8B": (2e-4, 16, 1, 0.01, 8, 8, 0.1, 0.05, 0.2),
    },
    "paper/amazon_reviews": {
        "0.6B": (2e-4, 128, 2, 0.1, 10, None, 4.0, 0.05, 0.2),
        "4B": (5e-5, 32, 2, 0.01, 8, 16, 4.0, 0.05, 0.1),
        "8B": (2e-5, 16, 2, 0.01, 8, 8, 4.0, 0.05, 0.1),
    },
    "paper/20_newsgroups": {"0.6B": (2e-4, 64, 2, 0.01, 10, None, 2.0, 0.05, 0.2)},  # alpha of the task, rest of AG News
}


WEIGHTS = {
    "readout": "shadow_adapter_readout.safetensors",
    "published": "shadow_adapter.safetensors",
    None: "adapter_model.safetensors",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def commands(text: str, verb: str) -> list[list[str]]:
    """The arguments of every `shadow-peft VERB` command in a text, continued lines joined."""
    joined = re.sub(r"\\\n#? *", "", text)
    return [shlex.split(line)[2:] for line in re.findall(rf"^(?:# )?(shadow-peft {verb} .*)$", joined, re.MULTILINE)]


def parsed(arguments: list[str]) -> tuple[Any, ...]:
    """The options of a `train` command, checked, with recipes found from the repository's root."""
    at_root = [str(ROOT / a) if a.startswith("recipes/") else a for a in arguments]
    options, templates, shadow, sft, peft, _ = parse(make_train_parser(), [*at_root, "--bf16", "False"])
    check_options(options, shadow, sft, peft)
    return options, templates, shadow, sft, peft


def recipe(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return loaded


def form_of(settings: dict[str, Any]) -> PromptTemplate:
    return PromptTemplate(**{name: settings[name] for name in PromptTemplate.__dataclass_fields__ if name in settings})


def test_every_recipe_is_known_here() -> None:
    assert {name_of(path) for path in RECIPES} == {*FIRST, *CLASSES}


@pytest.mark.parametrize("name", FIRST)
def test_recipe_makes_the_examples_it_means(name: str, tmp_path: Path) -> None:
    settings = recipe(name)
    folder = stand_in(settings["data"], tmp_path)
    split = settings.get("data_split", "train")
    examples = load_examples(str(folder), form_of(settings), name=settings.get("data_name"), split=split)
    assert (examples[0]["prompt"], examples[0]["completion"]) == FIRST[name]
    if name.endswith("squad_v2"):
        assert examples[1]["completion"] == " unanswerable"


@pytest.mark.parametrize("name", CLASSES)
def test_recipe_of_a_classifier_reads_the_classes_it_means(name: str, tmp_path: Path) -> None:
    settings = recipe(name)
    columns = LabelledTexts(label_column=settings["class_column"])
    rows, names = load_labelled(str(stand_in(settings["data"], tmp_path)), columns, classes=settings.get("class_names"))
    assert (rows[1]["text"], names[rows[1]["labels"]], len(names)) == CLASSES[name]


@pytest.mark.parametrize("name", [*FIRST, *CLASSES])
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
    assert main(["train", "--config", str(FOLDER / f"{name}.yaml"), *places, *SMALL, *QUIET]) == 0
    assert (out / WEIGHTS[settings.get("variant")]).is_file()
    results = json.loads((out / "all_results.json").read_text(encoding="utf-8"))
    assert results["train_loss"] > 0
    assert results["eval_loss"] > 0
    assert {"README.md", "losses.png", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert (out / "shadow").is_dir() == settings.get("export", False)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_opens_with_its_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0].startswith(f"# shadow-peft train --config recipes/{name_of(path)}.yaml")
    assert f"`{name_of(path)}.yaml`" in README
    for arguments in commands(text, "train"):
        assert arguments[:2] == ["--config", f"recipes/{name_of(path)}.yaml"]
        parsed(arguments)
    if name_of(path) in CLASSES:
        ((options, _, _),) = (parse(make_classify_parser(), arguments) for arguments in commands(text, "classify"))
        assert options.adapter == recipe(name_of(path))["output"]
        return
    for arguments in commands(text, "eval"):
        options, _, _ = parse(VerbParser("eval", OPTIONS["eval"], "", ""), arguments)
        assert recipe(name_of(path))["output"] in (options.model, options.adapter)
    assert len(commands(text, "eval")) == (name_of(path) != "chat")


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_that_trains_a_shadow_names_its_variant(path: Path) -> None:
    settings = recipe(name_of(path))
    expected = "published" if path.parent.name == "paper" else "readout"
    assert settings.get("variant") == (None if settings.get("use_peft") else expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_paper_recipes_have_the_published_settings(name: str) -> None:
    found = {}
    for arguments in commands((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), "train"):
        options, _, shadow, sft, _ = parsed(arguments)
        batch = sft.per_device_train_batch_size * sft.gradient_accumulation_steps
        found[options.model.removeprefix("Qwen/Qwen3-")] = (
            *(sft.learning_rate, batch, sft.num_train_epochs, sft.warmup_steps, shadow.gate_hidden_size),
            *(shadow.shadow_num_attention_heads, shadow.alpha, options.shadow_loss_weight, shadow.dropout),
        )
        assert (shadow.variant, shadow.injection_hidden_size, shadow.num_shadow_layers) == ("published", 16, 1)
        assert (shadow.shadow_init, shadow.shadow_intermediate_size) == ("random", 256)
        assert (sft.lr_scheduler_type, sft.weight_decay, sft.seed, sft.max_grad_norm) == ("linear", 0.01, 42, 1.0)
        assert options.shadow_learning_rate_scale == 1
    assert found == PUBLISHED[name]


def test_commands_of_the_readme_are_valid() -> None:
    found = [parsed(arguments) for arguments in commands(README, "train")]
    assert len(found) == 2


def test_baselines_differ_from_their_recipe_in_the_method_alone() -> None:
    ours = {key: value for key, value in recipe("gsm8k").items() if key not in ("output", "variant")}
    for name, extra in (("gsm8k_lora", set()), ("gsm8k_dora", {"use_dora"})):
        baseline = recipe(name)
        method = {"use_peft", "lora_r", "lora_alpha", "lora_target_modules", "output"} | extra
        assert {key: value for key, value in baseline.items() if key not in method} == ours
        assert method <= set(baseline)


def test_stand_ins_are_of_datasets_that_recipes_name() -> None:
    assert {recipe(name)["data"] for name in (*FIRST, *CLASSES)} == set(STAND_INS)
