"""`shadow-peft generate`: the base that an adapter names, core dependencies alone, and a line for every mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig

from shadow_peft import ShadowConfig, get_shadow_model
from shadow_peft.cli import main
from shadow_peft.cli.errors import UserError
from shadow_peft.cli.generate import continuation
from shadow_peft.cli.loading import load_tokenizer, named_base
from shadow_peft.cli.prompts import read_prompts
from tests.cli.conftest import write_lines
from tests.tiny_models import llama

EXTRAS = ("accelerate", "datasets", "trl", "matplotlib", "peft", "rich", "lm_eval")
SHORT = ["--max_new_tokens", "3"]


@pytest.fixture(scope="session")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shadow adapter, saved without a tokenizer, that names its base by an absolute path."""
    folder = tmp_path_factory.mktemp("named") / "adapter"
    torch.manual_seed(0)
    get_shadow_model(AutoModelForCausalLM.from_pretrained(model_folder), ShadowConfig()).save_pretrained(folder)
    return folder


def renamed(adapter: Path, base: object, folder: Path) -> Path:
    """A copy of an adapter that names another base."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "shadow_config.json").read_text())
    config["provenance"]["base_model_name_or_path"] = base
    (folder / "shadow_config.json").write_text(json.dumps(config))
    return folder


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `generate` says where it refuses: one or two lines, status 1."""
    assert main(["generate", *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert 1 <= len(shown.err.splitlines()) <= 2
    assert shown.err.startswith("shadow-peft generate: ")
    return shown.err


# ---------------------------------------------------------------- the base that an adapter names


def test_the_adapter_names_its_base(adapter: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--adapter", str(adapter), "say 1:", *SHORT]) == 0
    named = capsys.readouterr().out
    assert main(["generate", "--adapter", str(adapter), "--model", str(model_folder), "say 1:", *SHORT]) == 0
    assert capsys.readouterr().out == named


def test_a_base_named_by_a_relative_path_is_found_from_where_it_was_trained(
    adapter: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "bases" / "tiny")
    renamed(adapter, "./bases/tiny", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--adapter", "adapter", "x", *SHORT]) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path / "bases")
    said = mistake(capsys, "--adapter", "../adapter", "x")
    assert "was made for './bases/tiny', and no such folder is here; give its base as --model" in said


@pytest.mark.parametrize("base", ["/gone/base", "../base", "~/base", "a/b/c", "C:\\base"])
def test_a_base_that_is_not_there_is_asked_for(
    base: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="no such folder is here; give its base as --model"):
        named_base(str(renamed(adapter, base, tmp_path / "adapter")))


@pytest.mark.parametrize("base", [None, 3, ""])
def test_an_adapter_without_a_base_asks_for_one(base: object, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say which base it was made for; give it as --model"):
        named_base(str(renamed(adapter, base, tmp_path / "adapter")))


def test_a_hub_id_is_named_as_it_is(adapter: Path, tmp_path: Path) -> None:
    assert named_base(str(renamed(adapter, "Qwen/Qwen3-0.6B", tmp_path / "adapter"))) == "Qwen/Qwen3-0.6B"


def test_adapters_of_the_other_dialect_name_theirs(model_folder: Path, tmp_path: Path) -> None:
    model = get_shadow_model(AutoModelForCausalLM.from_pretrained(model_folder), ShadowConfig(variant="peft"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert named_base(str(tmp_path)) == str(model_folder)


def test_a_hub_base_that_cannot_be_reached_says_that_the_adapter_named_it(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(name: str, **_: object) -> None:
        raise OSError(f"We couldn't connect to the hub\nto load {name}.")

    monkeypatch.setattr("shadow_peft.cli.loading.AutoTokenizer.from_pretrained", unreachable)
    said = mistake(capsys, "--adapter", str(renamed(adapter, "some/model", tmp_path / "adapter")), "x")
    assert "couldn't connect to the hub to load some/model" in said
    assert "the adapter names it as its base, --model gives another place" in said


# ---------------------------------------------------------------- core dependencies


def test_it_runs_with_the_core_dependencies_alone(adapter: Path) -> None:
    """A process in which every package of the extras is missing."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r})); from shadow_peft.cli import main; "
        f"sys.exit(main(['generate', '--adapter', {str(adapter)!r}, '--chat=no', 'say 1:', '--max_new_tokens', '3']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.strip()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([""], "the text is empty"),
        (["x", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (["x", "--max_new_tokens", "-4"], "--max_new_tokens must be at least 1, got -4"),
        (["x", "--seed", "-1"], "--seed must be 0 to 4294967295, got -1"),
        (["x", "--seed", "99999999999"], "--seed must be 0 to 4294967295"),
        (["x", "--temperature", "0.7"], "--temperature does nothing for the likeliest tokens; add --do_sample"),
        (["x", "--do_sample", "--temperature", "-1"], "--temperature must be above 0, got -1.0"),
        (["x", "--do_sample", "--temperature", "nan"], "--temperature must be above 0, got nan"),
        (["x", "--do_sample", "--top_p", "3"], "--top_p must be 0 to 1, got 3.0"),
        (["x", "--do_sample", "--top_k", "-3"], "--top_k must be at least 0, got -3"),
        (["x", "--num_beams", "0"], "--num_beams must be at least 1"),
        (["x", "--repetition_penalty", "0"], "--repetition_penalty must be above 0"),
        (["x", "--chat"], "--chat needs a tokenizer with a chat template"),
        (["x", "--num_beams", "2", "--draft"], "--draft goes with greedy decoding and sampling"),
        (["x", "--draft", "--shadow_only"], "--shadow_only switches it off"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], said: str, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in mistake(capsys, "--adapter", str(adapter), *options)


def test_something_must_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --model, or an --adapter that names its base, or both" in mistake(capsys, "x")
    assert "need --adapter: a bare model has no shadow" in mistake(capsys, "x", "--model", "m", "--draft")


def test_folders_that_are_something_else(
    adapter: Path, model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    empty, model = str(tmp_path / "empty"), str(model_folder)
    assert "it has no config.json" in mistake(capsys, "x", "--model", empty)
    assert "it is a file; give the folder" in mistake(capsys, "x", "--model", str(data_file))
    assert "there is no such folder" in mistake(capsys, "x", "--model", "./nowhere")
    assert "is a shadow adapter and no model; generate and eval take it as --adapter" in mistake(
        capsys, "x", "--model", str(adapter)
    )
    assert "it has neither shadow_config.json nor adapter_config.json" in mistake(capsys, "x", "--adapter", model)
    assert "holds no shadow adapter" in mistake(capsys, "x", "--adapter", model, "--model", model)
    assert "is a file" in mistake(capsys, "x", "--adapter", str(data_file))


def test_damaged_weights_are_named(
    model_folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    for folder, name in (("base", "model.safetensors"), ("adapter", "shadow_adapter.safetensors")):
        (tmp_path / folder / name).write_bytes((tmp_path / folder / name).read_bytes()[:500])
    assert "cannot load a causal language model from" in mistake(capsys, "x", "--model", str(tmp_path / "base"))
    said = mistake(capsys, "x", "--model", str(model_folder), "--adapter", str(tmp_path / "adapter"))
    assert "cannot attach the adapter" in said


def test_an_adapter_of_another_base_is_refused(
    adapter: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "small")
    llama(vocab_size=300, num_hidden_layers=3).save_pretrained(tmp_path / "small")
    said = mistake(capsys, "x", "--adapter", str(adapter), "--model", str(tmp_path / "small"))
    assert "was made for another base" in said


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shadow_peft.cli.generate.load_answering", interrupted)
    assert main(["generate", "x", "--model", "m"]) == 130
    assert capsys.readouterr().err == "shadow-peft generate: interrupted\n"


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADOW_PEFT_TRACEBACK", "1")
    with pytest.raises(UserError):
        main(["generate", "x"])


def test_a_chat_template_writes_the_special_tokens_itself(chat_folder: Path, tmp_path: Path) -> None:
    """A tokenizer that begins every text with a token, as Llama's does, must not do so before a formatted chat too."""
    tokenizer = load_tokenizer(str(chat_folder))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    model, config = llama(vocab_size=300), GenerationConfig(max_new_tokens=1, pad_token_id=0)
    model.generate = Mock(wraps=model.generate)
    for chat in (True, False):
        continuation(model, tokenizer, "user: hello", config, chat)
    read = [call.kwargs["input_ids"][0].tolist() for call in model.generate.call_args_list]
    assert read[1] == [1, *read[0]]
    path = write_lines(tmp_path / "check.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}, {"prompt": "hello"}])
    formatted, plain = read_prompts(str(path), tokenizer, 2)
    assert 1 not in formatted
    assert plain[0] == 1
