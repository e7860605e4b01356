"""`shadow-peft export`: a folder that transformers loads alone, compared with the attached shadow; lines for mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from shadow_peft import ShadowForCausalLM, ShadowForSequenceClassification
from shadow_peft.cli import main
from tests.cli.conftest import TEMPLATE, tiny_tokenizer, write_lines
from tests.tiny_models import adapted, llama_classifier

STANDALONE = """
import sys
from transformers import pipeline
generate = pipeline("text-generation", sys.argv[1])
print(generate("say 1:", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"])
assert "shadow_peft" not in sys.modules
"""


def narrow_adapter(base: Path, folder: Path) -> Path:
    """An adapter of half the base's width, saved with its tokenizer; greedy answers of random weights, not constant."""
    model = ShadowForCausalLM(adapted(AutoModelForCausalLM.from_pretrained(base), shadow_hidden_size=16))
    with torch.no_grad():
        model.peft_model.shadow_hidden_projection.weight.mul_(20)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(chat_folder: Path, tmp_path: Path) -> Path:
    return narrow_adapter(chat_folder, tmp_path / "adapter")


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["export", *map(str, arguments)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    return shown.err.removeprefix("shadow-peft export: ")


def test_a_folder_for_transformers_alone(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "say 1:"}, {"text": "bring the red cup"}, {"messages": [{"role": "user", "content": "hello"}]}]
    data = write_lines(tmp_path / "data.jsonl", [*rows, "", {"prompt": "not read"}])
    assert main(["export", str(adapter), "--check", str(data), "--check_prompts", "3"]) == 0
    shown = capsys.readouterr().out.splitlines()
    folder = adapter / "hf"
    assert shown[0].startswith(f"{folder}: LlamaForCausalLM, ")
    assert shown[1:] == ["loaded again, 3 of 3 answers are those of the attached shadow"]
    run = subprocess.run([sys.executable, "-c", STANDALONE, folder], capture_output=True, text=True, check=True)
    settings = ["--shadow_only", "--max_new_tokens", "5"]
    assert main(["generate", "--adapter", str(adapter), "say 1:", *settings]) == 0
    answer = capsys.readouterr().out
    assert len(answer) > 3
    assert run.stdout == answer
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "`shadow-peft export adapter`" in card


def test_the_usage_on_the_card_runs(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", str(adapter)]) == 0
    capsys.readouterr()
    usage = (adapter / "hf" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(adapter)
    exec(usage, {})
    assert capsys.readouterr().out.startswith("Hello")


def test_dtype_and_projection(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(adapter), "--output", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    kept, folded = tmp_path / "kept", tmp_path / "folded"
    assert main(["export", str(adapter), "--output", str(kept), "--no_fold"]) == 0
    assert type(AutoModelForCausalLM.from_pretrained(kept)).__name__ == "AutoModelForCausalLMWithHiddenProjection"
    card = (kept / "README.md").read_text()
    assert "an `AutoModelForCausalLMWithHiddenProjection`; loading it needs `shadow-peft`." in card
    usage = card.partition("```python\n")[2].partition("```")[0].replace('"kept"', f'"{kept}"')
    ran = subprocess.run([sys.executable, "-c", usage], capture_output=True, text=True, check=False)
    assert ran.stdout.startswith("Hello"), ran.stderr
    capsys.readouterr()
    assert main(["export", str(kept), "--output", str(folded)]) == 0
    assert "4 of 4 answers are those of the attached shadow" in capsys.readouterr().out
    assert main(["export", str(adapter)]) == 0
    ids = torch.tensor([[5, 6, 7]])
    one, other = (AutoModelForCausalLM.from_pretrained(place)(ids).logits for place in (folded, adapter / "hf"))
    torch.testing.assert_close(one, other)
    capsys.readouterr()
    assert "a stock LlamaForCausalLM already" in mistake(capsys, folded, "--output", tmp_path / "again")


def test_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    names = dict(enumerate("abcde"))
    llama_classifier(vocab_size=300, num_labels=5, id2label=names).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model = ShadowForSequenceClassification(
        adapted(AutoModelForSequenceClassification.from_pretrained(base, num_labels=5), shadow_hidden_size=16)
    )
    model.save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter")]) == 0
    assert "4 of 4 answers" in capsys.readouterr().out
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter" / "hf")
    ids = torch.tensor([[5, 6, 7]])
    assert loaded.config.id2label == names
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).shadow_logits)


def test_folders_are_not_mixed(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(adapter)]) == 0
    capsys.readouterr()
    assert "--overwrite replaces it" in mistake(capsys, adapter)
    assert main(["export", str(adapter), "--overwrite"]) == 0
    capsys.readouterr()
    chats = adapter / "hf" / "additional_chat_templates"
    chats.mkdir()
    (chats / "tools.jinja").write_text("{{ messages }}")
    assert main(["export", str(adapter), "--overwrite"]) == 0
    capsys.readouterr()
    assert not chats.exists()
    (adapter / "hf" / "notes").write_text("mine")
    assert "holds notes, which is of no export" in mistake(capsys, adapter, "--overwrite")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    assert "holds config.json, which is of no export" in mistake(capsys, adapter, "--overwrite", "--output", other)
    assert "which is never written into" in mistake(capsys, adapter, "--output", adapter)
    assert "give --output" in mistake(capsys, "nobody/nothing")
    assert (other / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("row", "said"),
    [("{", "not JSON"), ({"x": 1}, "a row needs 'prompt', 'messages' or 'text'"), ("", "has no row")],
)
def test_prompts_that_cannot_be_read(
    row: object, said: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [row])
    assert said in mistake(capsys, adapter, "--check", data)
    assert not (adapter / "hf").exists()


def test_what_cannot_be_folded_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny_models import SIZES, Gemma2Config, Gemma2ForCausalLM, llama

    base = tmp_path / "base"
    Gemma2ForCausalLM(Gemma2Config(**{**SIZES, "vocab_size": 300})).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    shadow = llama(3, hidden_size=16, vocab_size=300)
    ShadowForCausalLM(adapted(AutoModelForCausalLM.from_pretrained(base), shadow_model=shadow)).save_pretrained(
        tmp_path / "adapter"
    )
    said = mistake(capsys, tmp_path / "adapter")
    assert "the logits are capped at 30.0, and LlamaForCausalLM caps none; --no_fold keeps the projection apart" in said
    assert main(["export", str(tmp_path / "adapter"), "--no_fold"]) == 0
    assert "4 of 4 answers" in capsys.readouterr().out
