"""What docs/quantized.md says: snippets and commands run, with another model; its numbers are what they are said to be."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from shadow_peft import ShadowConfig, get_shadow_model
from shadow_peft.cli import main
from shadow_peft.demo.robot_commands import commands
from tests.cli.conftest import tiny_tokenizer, write_lines
from tests.quantized_bases import need, save_base
from tests.training.test_quantized import tolerance

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "quantized.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with a model and data."""
    save_base(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", [c.row() for c in commands("train", 16)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_the_snippets_run_one_after_the_other(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("bitsandbytes 4")
    train, use, other = blocks("python")
    names: dict[str, Any] = {}
    exec(train.replace("Qwen/Qwen3-8B", str(place / "model")), names)
    assert "Trainable params" in capsys.readouterr().out
    assert {path.suffix for path in (place / "adapter").iterdir()} >= {".safetensors", ".json"}
    exec(use, names)
    assert "41 plus one is" in capsys.readouterr().out
    assert "quantization_config" not in (place / "small" / "config.json").read_text(encoding="utf-8")
    need("torchao 8")
    exec(other, names)
    assert names["eight_bits"].load_in_8bit


@pytest.mark.filterwarnings("ignore")
def test_the_commands_run(place: Path) -> None:
    need("bitsandbytes 4")
    lines = blocks("bash")[1].strip().splitlines()
    assert lines[0] == "shadow-peft train --config recipes/gsm8k_4bit.yaml"  # tests/cli/test_recipes.py runs it
    small = {"train": ["--max_steps", "1", "--use_cpu", "--disable_tqdm", "True"], "generate": ["--max_new_tokens", "2"]}
    for line in lines[1:]:
        program, verb, *options = shlex.split(line.replace("Qwen/Qwen3-8B", str(place / "model")))
        assert program == "shadow-peft"
        assert main([verb, *options, *small[verb]]) == 0, line


@pytest.fixture(scope="module")
def eight_billion() -> Qwen3ForCausalLM:
    """Qwen3 8B without weights."""
    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    with torch.device("meta"):
        return Qwen3ForCausalLM(Qwen3Config(vocab_size=151936, tie_word_embeddings=False, **sizes, **heads))


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def test_the_arithmetic_of_the_base(eight_billion: Qwen3ForCausalLM) -> None:
    maps = [module for module in eight_billion.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    layers, rows = sum(m.weight.numel() for m in maps), sum(m.weight.shape[0] for m in maps)
    rest = sum(p.numel() for p in eight_billion.parameters()) - layers
    for name, size, each in (
        ("bfloat16", 2 * layers, "2"),
        ("8 bit", layers + 4 * rows, None),
        ("4 bit", layers / 2 + 4 * layers / 64, None),
        ("4 bit, double quantization", layers / 2 + layers / 64 + 4 * layers / 64 / 256, None),
    ):
        per_weight = each or f"{size / layers:.4g}"
        row = f"| {name} | {per_weight} | {gigabytes(size)} | {gigabytes(2 * rest)} | {gigabytes(size + 2 * rest)} |"
        assert row in PAGE, row
    assert f"has {layers / 1e9:.2f} billion weights" in PAGE
    assert f"{eight_billion.lm_head.weight.numel() / 1e9:.2f} billion each" in PAGE


def test_the_arithmetic_of_the_shadow(eight_billion: Qwen3ForCausalLM) -> None:
    with torch.device("meta"):
        model = get_shadow_model(eight_billion, ShadowConfig(variant="readout", shadow_init="random"))
    trained, _ = model.get_nb_trainable_parameters()
    model.unload()
    assert f"trains {trained / 1e6:.0f} million parameters" in PAGE
    for name, optimizer in (("AdamW", 8), ('`optim="paged_adamw_8bit"`', 2)):
        parts = [gigabytes(size * trained) for size in (4, 4, optimizer, 8 + optimizer)]
        row = f"| float32, {name} | {' | '.join(parts)} |"
        assert row in PAGE, row


def test_the_tolerances_are_those_of_the_tests() -> None:
    assert f"the tests allow a part {tolerance(torch.float32):.0e} (float32)".replace("e-0", "e-") in " ".join(PAGE.split())
    assert f"and {tolerance(torch.bfloat16):.2f} (bfloat16)" in " ".join(PAGE.split())
