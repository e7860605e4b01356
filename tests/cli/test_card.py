"""The model card: its header, no folder of one machine, the variant, and a snippet that runs as it stands."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from shadow_peft.cli import main
from shadow_peft.training.card import RunFacts, portable, write_card
from tests.cli.conftest import write_lines

FACTS = RunFacts(
    name="me/robot",
    method="ShadowPEFT",
    variant="readout",
    base="Qwen/Qwen3-0.6B",
    data="openai/gsm8k",
    parts="split train",
    examples={"training": 7},
    trainable=12,
    seed=3,
    arguments=("--model", "Qwen/Qwen3-0.6B", "--data", "openai/gsm8k", "--output", "out"),
)
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello to you"}]}
ONE_STEP = ["--max_steps", "1", "--use_cpu", "--disable_tqdm", "--save_strategy", "no"]


def card(facts: RunFacts, folder: Path) -> ModelCard:
    write_card(folder, facts, [])
    return ModelCard.load(folder / "README.md")


def snippet(text: str, language: str) -> str:
    """The first code block of a language."""
    return text.partition(f"```{language}\n")[2].partition("```")[0]


def test_the_header_names_base_and_data_of_the_hub(tmp_path: Path) -> None:
    written = card(FACTS, tmp_path)
    assert written.data.base_model == "Qwen/Qwen3-0.6B"
    assert written.data.to_dict()["base_model_relation"] == "adapter"
    assert (written.data.datasets, written.data.library_name) == (["openai/gsm8k"], "shadow-peft")
    assert written.text.strip().startswith("# Qwen3-0.6B with a ShadowPEFT adapter\n")
    assert "ShadowPEFT, variant `readout`" in written.text
    assert 'ShadowForCausalLM.from_pretrained(base, "me/robot")' in written.text


def test_the_card_says_what_the_shadow_can_do(tmp_path: Path) -> None:
    exported = replace(FACTS, arguments=(*FACTS.arguments, "--export"))
    alone, with_export, lora = (
        card(facts, tmp_path).text for facts in (FACTS, exported, replace(FACTS, method="LoRA", variant=None))
    )
    assert ["--shadow_only" in text for text in (alone, with_export, lora)] == [True, True, False]
    assert ["The folder `shadow`" in text for text in (alone, with_export, lora)] == [False, True, False]


def test_lora_is_loaded_by_peft(tmp_path: Path) -> None:
    written = card(replace(FACTS, method="LoRA", variant=None), tmp_path)
    assert written.data.library_name == "peft"
    assert 'PeftModel.from_pretrained(base, "me/robot")' in written.text
    assert "variant" not in written.text


def test_folders_of_this_machine_stay_here(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "my data.jsonl").touch()
    places = {"base": str(tmp_path / "base"), "data": str(tmp_path / "my data.jsonl")}
    given = ("--model", places["base"], f"--data={places['data']}", "--prompt", "/think {q}", "--output", "out")
    written = card(replace(FACTS, **places, arguments=given), tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    assert "--model base '--data=my data.jsonl' --prompt '/think {q}' --output out" in written.text
    assert "base_model" not in written.data.to_dict()
    assert "datasets" not in written.data.to_dict()


@pytest.mark.parametrize("word", ["/think", "a=/b", "--x=/think", "out/gsm8k", "", "/", "--"])
def test_words_that_are_no_paths_stay(word: str) -> None:
    assert portable(word) == word


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft
@pytest.mark.parametrize("kind", ["shadow", "chat", "lora"])
def test_what_the_card_says_runs(
    kind: str,
    model_folder: Path,
    chat_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(chat_folder if kind == "chat" else model_folder, tmp_path / "base")
    data = write_lines(tmp_path / "talk.jsonl", [TALK] * 4) if kind == "chat" else data_file
    monkeypatch.chdir(tmp_path)
    method = ["--use_peft", "--lora_r", "2"] if kind == "lora" else []
    places = ["--model", "base", "--data", data.name, "--output", "runs/one"]
    assert main(["train", *places, *ONE_STEP, *method]) == 0
    capsys.readouterr()
    text = (tmp_path / "runs" / "one" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert ("apply_chat_template" in text) == (kind == "chat")
    code = snippet(text, "python")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    program, *arguments = shlex.split(snippet(text, "bash"))
    assert program == "shadow-peft"
    assert main([*arguments, "--max_new_tokens", "2"]) == 0
