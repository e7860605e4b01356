"""`shadow-peft train` and `shadow-peft generate` from end to end on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowForCausalLM
from shadow_peft.cli import main
from tests.cli.conftest import write_lines

QUICK = [
    "--max_steps",
    "2",
    "--per_device_train_batch_size",
    "4",
    "--save_strategy",
    "no",
    "--disable_tqdm",
    "True",
    "--use_cpu",
]
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello to you"}]}


@pytest.fixture(scope="session")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter and an exported shadow, made by the command."""
    folder = tmp_path_factory.mktemp("trained")
    rows: list[object] = [{"prompt": f"say {i}:", "completion": f" {i} {i}"} for i in range(8)]
    data = write_lines(folder / "data.jsonl", rows)
    arguments = ["--model", str(model_folder), "--data", str(data), "--eval_data", str(data), "--eval_strategy", "steps"]
    options = ["--eval_steps", "2", "--learning_rate", "0.05", "--export", "--injection_hidden_size", "4"]
    assert main(["train", *arguments, "--output", str(folder / "out"), *options, *QUICK]) == 0
    return folder / "out"


def greedy(model: torch.nn.Module, folder: Path, text: str) -> str:
    """Five greedy tokens by the library's own means."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    return str(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))


def test_train_writes_adapter_tokenizer_and_export(trained: Path) -> None:
    config = json.loads((trained / "shadow_config.json").read_text())
    assert config["injection_hidden_size"] == 4
    names = {path.name for path in trained.iterdir()}
    assert {"shadow_adapter_readout.safetensors", "tokenizer.json", "tokenizer_config.json", "shadow"} <= names
    assert AutoModelForCausalLM.from_pretrained(trained / "shadow").num_parameters() > 0


def test_generate_with_adapter(trained: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["generate", "say 1:", "--model", str(model_folder), "--adapter", str(trained), "--max_new_tokens", "5"])
    model = ShadowForCausalLM.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), trained)
    assert status == 0
    assert capsys.readouterr().out == greedy(model, model_folder, "say 1:") + "\n"


def test_shadow_only_is_the_exported_shadow(trained: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--max_new_tokens", "5"]
    adapted = ["--model", str(model_folder), "--adapter", str(trained), "--shadow_only"]
    assert main(["generate", "say 1:", *adapted, *short]) == 0
    alone = capsys.readouterr().out
    assert main(["generate", "say 1:", "--model", str(trained / "shadow"), *short]) == 0
    assert capsys.readouterr().out == alone


def test_drafting_gives_the_same_answer_and_says_what_it_won(
    trained: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = ["generate", "say 1:", "--model", str(model_folder), "--adapter", str(trained), "--max_new_tokens", "12"]
    assert main(adapted) == 0
    plain = capsys.readouterr()
    assert main([*adapted, "--draft"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out
    assert "tokens per base pass" in drafted.err
    assert "tokens per base pass" not in plain.err


def test_sampling_is_seeded(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(seed: str) -> str:
        sampling = ["--do_sample", "True", "--temperature", "2.0", "--top_k", "50", "--max_new_tokens", "8", "--seed", seed]
        assert main(["generate", "say 1:", "say 2:", "--model", str(model_folder), *sampling]) == 0
        return capsys.readouterr().out

    assert drawn("1") == drawn("1")
    assert drawn("1") != drawn("2")


def test_messages_are_learned_with_a_template(chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "chat.jsonl", [TALK] * 8)
    out = tmp_path / "out"
    assert main(["train", "--model", str(chat_folder), "--data", str(data), "--output", str(out), *QUICK]) == 0
    capsys.readouterr()
    chat = ["--chat", "--max_new_tokens", "3"]
    assert main(["generate", "hi", "--model", str(chat_folder), "--adapter", str(out), *chat]) == 0
    assert capsys.readouterr().out


def test_messages_without_a_template_are_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_lines(tmp_path / "chat.jsonl", [TALK]), tmp_path / "out"
    assert main(["train", "--model", str(model_folder), "--data", str(data), "--output", str(out), *QUICK]) == 1
    assert "no chat template" in capsys.readouterr().err
    assert not out.exists()


def test_bad_line_is_named_before_anything_is_trained(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[object] = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}, "nonsense"]
    data, out = write_lines(tmp_path / "mine.jsonl", rows), tmp_path / "out"
    assert main(["train", "--model", str(model_folder), "--data", str(data), "--output", str(out), *QUICK]) == 1
    said = capsys.readouterr().err
    assert f"{data}:2: no 'completion'" in said
    assert f"{data}:3: not JSON" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--model", "m", "--data", "/nowhere.jsonl", "--output", "o"], "/nowhere.jsonl"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--dropout", "7"], "dropout must lie in"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--output_dir", "p"], "--output, not as --output_dir"),
        (["generate", "x", "--model", "m", "--shadow_only"], "need --adapter"),
        (["generate", "x", "--model", "m", "--draft"], "need --adapter"),
        (["generate", "x", "--model", "m", "--adapter", "a", "--draft", "--shadow_only"], "switches it off"),
        (["generate", "x", "--model", "/nowhere/model"], "/nowhere/model"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_adapter_that_is_none_is_named(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--model", str(model_folder), "--adapter", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_chat_needs_a_template(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--model", str(model_folder), "--chat"]) == 1
    assert "chat template" in capsys.readouterr().err


def test_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("demo", "train", "generate"))
    assert main(["dance"]) == 2
    assert "no verb 'dance'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["demo", "train", "generate"])
def test_help_shows_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert f"shadow-peft {verb} " in shown.split("examples:")[1]
