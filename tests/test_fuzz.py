"""Random configurations, folders and command lines: what comes out is success, or an error with a message, nothing else.

The examples are the same in every run (`derandomize`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.cli import main
from shadow_peft.cli.dispatch import VERBS
from shadow_peft.cli.errors import UserError
from shadow_peft.cli.folders import checkpoint_to_resume, clear, old_run
from shadow_peft.cli.loading import load_answering, named_base
from shadow_peft.cli.spelling import declared_fields
from tests.tiny_models import llama

ALLOWED = (ValueError, TypeError, UserError)


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Settings of every test here; fixtures may be shared by its examples."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


def outcome(action: Callable[[], Any]) -> Any:
    """What an action gives; None where it fails in an allowed way, with a message."""
    try:
        return action()
    except ALLOWED as caught:
        message = str(caught)
    assert message.strip()
    return None


# ---------------------------------------------------------------- configurations

numbers = st.one_of(st.integers(-3, 70), st.integers(), st.floats())
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5), st.binary(max_size=3))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
words = st.sampled_from(["published", "peft", "readout", "auto", "base", "random", "first", "even", "lm_head", "nothing"])
NAMES = [field.name for field in dataclasses.fields(ShadowConfig)]


@fuzz(400)
@given(st.dictionaries(st.sampled_from(NAMES), values | words | st.lists(words, max_size=2), max_size=5))
def test_configurations(fields: dict[str, Any]) -> None:
    config = outcome(lambda: ShadowConfig(**fields))
    if config is not None:
        stored = json.loads(json.dumps(config.to_dict()))
        assert ShadowConfig.from_dict(stored) == config


@fuzz(200)
@given(st.dictionaries(st.sampled_from([*NAMES, "provenance", "unknown"]), values | words, max_size=6) | values)
def test_stored_configurations(data: Any) -> None:
    outcome(lambda: ShadowConfig.from_dict(data))


@fuzz(40)
@given(st.binary(max_size=40) | st.builds(lambda v: json.dumps(v, default=str).encode(), values))
def test_files_of_a_configuration(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "shadow_config.json").write_bytes(content)
    outcome(lambda: ShadowConfig.from_pretrained(folder))


@fuzz(60)
@given(st.fixed_dictionaries({}, optional={
    "num_shadow_layers": st.integers(1, 6), "injection_hidden_size": st.integers(1, 80), "alpha": st.floats(-2, 2),
    "shadow_hidden_size": st.integers(1, 40), "shadow_intermediate_size": st.integers(1, 9), "dropout": st.floats(0, 1),
    "modules_to_save": st.lists(words, max_size=2), "variant": words, "shadow_init": words,
}))  # fmt: skip
def test_adapters_of_any_sizes(fields: dict[str, Any]) -> None:
    """What a config accepts and a base cannot have is refused, and the base stays what it was."""
    base, expected = shared_base("sizes")
    model = outcome(lambda: ShadowForCausalLM(get_shadow_model(base, ShadowConfig(**fields))))
    if model is not None:
        with torch.no_grad():
            assert model(IDS).logits.isfinite().all()
        model.unload()
    assert_is(base, expected)


IDS = torch.arange(2, 8)[None]
BASES: dict[str, tuple[Any, torch.Tensor]] = {}


@torch.no_grad()
def shared_base(name: str) -> tuple[Any, torch.Tensor]:
    """A base that all examples of a test share, and its logits."""
    if name not in BASES:
        base = llama()
        BASES[name] = base, base(IDS).logits
    return BASES[name]


@torch.no_grad()
def assert_is(base: Any, expected: torch.Tensor) -> None:
    """The base answers as it did, bit for bit."""
    assert torch.equal(base(IDS).logits, expected)


# ---------------------------------------------------------------- folders


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a tokenizer, and adapters of it in both dialects."""
    root = tmp_path_factory.mktemp("folders")
    llama().save_pretrained(root / "base")
    for variant in ("readout", "peft"):
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        get_shadow_model(base, ShadowConfig(variant=variant)).save_pretrained(root / variant)  # type: ignore[arg-type]
    return root


READ_UNCHECKED = {"provenance"}
"""Of a stored adapter, what `checkpoint.store` takes for an object without asking: null there is an AttributeError."""


def damaged_json(draw: st.DrawFn, path: Path) -> None:
    """One entry of a file, or of an object in it, becomes something else."""
    data = json.loads(path.read_text())
    inner = data
    key = draw(st.sampled_from(sorted(set(data) - READ_UNCHECKED)))
    if isinstance(data[key], dict) and data[key] and draw(st.booleans()):
        inner = data[key]
        key = draw(st.sampled_from(sorted(inner)))
    if draw(st.booleans()):
        del inner[key]
    else:
        inner[key] = draw(values)
    path.write_text(json.dumps(data, default=str))


def damage(draw: st.DrawFn, folder: Path) -> None:
    path = folder / draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
    how = draw(st.sampled_from(["json", "cut", "bytes", "empty", "gone", "folder", "foreign"]))
    content = path.read_bytes()
    if how == "json" and path.suffix == ".json":
        damaged_json(draw, path)
    elif how == "cut":
        path.write_bytes(content[: draw(st.integers(0, len(content)))])
    elif how == "bytes":
        at = draw(st.integers(0, min(len(content) - 1, 400)))
        path.write_bytes(content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :])
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "foreign":
        (folder / draw(st.sampled_from(["config.json", "notes", "shadow_config.json", "trainer_state.json"]))).write_bytes(
            draw(st.binary(max_size=10))
        )
    else:
        path.unlink()
        if how == "empty":
            path.touch()


@fuzz(120)
@given(st.data())
def test_damaged_adapters(folders: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    draw: Any = data.draw
    folder = tmp_path_factory.mktemp("damaged") / "adapter"
    shutil.copytree(folders / draw(st.sampled_from(["readout", "peft"])), folder)
    damage(draw, folder)
    base, expected = shared_base("damaged")
    model = outcome(lambda: ShadowForCausalLM.from_pretrained(base, folder))
    if model is not None:
        model.unload()
    assert_is(base, expected)
    outcome(lambda: named_base(str(folder)))


@fuzz(40)
@given(st.data())
def test_damaged_models(folders: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "base"
    shutil.copytree(folders / "base", folder)
    damage(data.draw, folder)  # type: ignore[arg-type]
    with pytest.raises(UserError):  # at the latest since it has no tokenizer
        load_answering(str(folder), None)


@fuzz(60)
@given(st.lists(st.sampled_from([
    "shadow_config.json", "shadow_adapter.safetensors", "adapter_model.safetensors", "trainer_state.json", "README.md",
    "checkpoint-1/trainer_state.json", "checkpoint-2/shadow_config.json", "checkpoint-x/a", "checkpoint-3",
    "shadow/config.json", "shadow/notes", "shadow", "config.json", "notes/a", "tokenizer.json", ".saving-x/a",
]), max_size=6, unique=True), st.binary(max_size=4))  # fmt: skip
def test_output_folders(tmp_path_factory: pytest.TempPathFactory, names: list[str], content: bytes) -> None:
    folder = tmp_path_factory.mktemp("out")
    for name in names:
        if not (folder / name).exists() and not (folder / name).parent.is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    outcome(lambda: checkpoint_to_resume("last", str(folder)))
    before = {p for p in folder.rglob("*") if p.is_file()}
    ours = {p for top in old_run(folder) for p in [top, *top.rglob("*")]}
    clear(folder)
    left = {p for p in folder.rglob("*") if p.is_file()}
    assert before - ours <= left
    others = {p for p in before if p.name in ("notes", "a") and p.parent.name != ".saving-x"}
    assert others <= left


# ---------------------------------------------------------------- command lines

VALUES = ["-1", "0", "1", "2.5", "1e-3", "nan", "inf", "true", "no", "", "x", "{", '{"a": 1}', "[1]", "none", "auto",
          "steps", "9" * 30, "a/b", "/nowhere", "--", "é", "\n", "cuda:7", "{q}", "bfloat16", "last"]  # fmt: skip
REQUIRED = {
    "demo": [],
    "train": ["--model", "/nowhere", "--data", "/nowhere.jsonl", "--output", "/nowhere/out"],
    "pretrain": ["--model", "/nowhere", "--data", "/nowhere.jsonl", "--output", "/nowhere/out"],
    "generate": ["--model", "/nowhere", "a text"],
    "classify": ["--model", "/nowhere", "a text"],
    "eval": ["--model", "/nowhere", "--tasks", "none", "--include_path", "/nowhere"],
    "export": ["/nowhere"],
    "cascade": ["--adapter", "/nowhere", "a text"],
    "playground": ["--adapter", "/nowhere"],
    "serve": ["--adapter", "a=/nowhere"],
    "convert": ["/nowhere", "--to", "peft", "--output", "/nowhere/out"],
}
LEFT_ALONE = {"env", "push_to_hub", "deepspeed", "fsdp", "parallelism_config", "debug", "local_rank"}
"""Options that set up the process, or more than one."""


def command_lines(verb: str) -> st.SearchStrategy[list[str]]:
    """Options of a verb with any values, in any order, often without those that it requires."""
    names = [field.name for field in declared_fields(verb) if field.name not in LEFT_ALONE]
    spelled = st.one_of(st.sampled_from(names), st.sampled_from(names).map(lambda n: n.replace("_", "-")))
    option = spelled.map("--{}".format) | st.sampled_from(["--no_cache", "-x", "--config", "--help", "--help-all", "--"])
    value = st.sampled_from(VALUES) | st.text(max_size=4)
    pair = (
        st.tuples(option, value).map(list)
        | st.tuples(option, value).map(lambda p: ["=".join(p)])
        | option.map(lambda o: [o])
    )
    given_ = st.lists(pair, max_size=4).map(lambda pairs: [word for words in pairs for word in words])
    return st.tuples(given_, st.booleans()).map(lambda g: [*(REQUIRED[verb] if g[1] else []), *g[0]])


@pytest.mark.filterwarnings("ignore")  # of options that are deprecated
@pytest.mark.parametrize("verb", VERBS)
def test_command_lines(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Parsed in earnest, and refused, or as far as the first thing that is loaded."""
    if verb == "eval":
        pytest.importorskip("lm_eval")
    monkeypatch.setattr("shadow_peft.cli.demo.hold_race", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("shadow_peft.cli.spelling.declared_fields", cache(declared_fields))  # it reads TRL's source

    @fuzz(120)
    @given(command_lines(verb))
    def check(arguments: list[str]) -> None:
        capsys.readouterr()
        try:
            status = main([verb, *arguments])
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr()
        assert status in (0, 1, 2)
        if status == 1 or (status == 2 and not said.out):
            assert 1 <= len(said.err.splitlines()) <= 3, said.err
            assert said.err.startswith(f"shadow-peft {verb}: ")

    check()
