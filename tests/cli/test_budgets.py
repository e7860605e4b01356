"""Recipes that claim equal sizes: parameters are counted at the real sizes, on the meta device, without weights."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from trl import get_peft_config

from shadow_peft import ShadowConfig, ShadowPeftModel, get_shadow_model
from shadow_peft.cli.options import DEFAULT_SHADOW
from tests.cli.test_recipes import FOLDER, PUBLISHED, README, parsed

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft

QWEN3: dict[str, dict[str, Any]] = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
"""What differs between the sizes of Qwen3."""

BASELINE = "--use_peft --lora_target_modules q_proj v_proj o_proj gate_proj up_proj down_proj"


def base(size: str) -> PreTrainedModel:
    """Qwen3 of a real size, without weights."""
    config = Qwen3Config(
        **QWEN3[size], num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=size != "8B"
    )
    with torch.device("meta"):
        return Qwen3ForCausalLM(config)


def with_shadow(size: str, config: ShadowConfig) -> ShadowPeftModel:
    with torch.device("meta"):
        return get_shadow_model(base(size), config)


def trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def trained_by(command: list[str]) -> int:
    """Parameters that a `train` command would train."""
    options, _, shadow, _, peft = parsed(command)
    size = options.model.removeprefix("Qwen/Qwen3-")
    if not peft.use_peft:
        return trained(with_shadow(size, shadow))
    return trained(get_peft_model(base(size), get_peft_config(peft), low_cpu_mem_usage=True))


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_gsm8k_and_its_baselines_train_as_many_parameters_as_their_headers_say() -> None:
    counts = {name: trained_by(["--config", f"recipes/{name}.yaml"]) for name in ("gsm8k", "gsm8k_lora", "gsm8k_dora")}
    for name, count in counts.items():
        header = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("model:")[0]
        stated = [number(n) for n in re.findall(r"\d+,\d{3},\d{3}", header)]
        assert stated == ([count] if name == "gsm8k" else [count, counts["gsm8k"]])
        assert count == pytest.approx(counts["gsm8k"], rel=0.01)


@pytest.mark.parametrize("size", QWEN3)
def test_the_sizes_in_the_readme_are_counted(size: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| Qwen3 {size} |"))
    shadow, lora, dora = re.search(r"\| ([\d,]+) \| .*?: ([\d,]+) \| .*?: ([\d,]+) \|", row).groups()
    model = ["--config", "recipes/gsm8k.yaml", "--model", f"Qwen/Qwen3-{size}"]
    expected = trained_by(model)
    assert number(shadow) == expected == trained(with_shadow(size, DEFAULT_SHADOW))
    assert f"`{BASELINE}`" in README
    for rank, stated, more in zip(re.findall(r"--lora_r (\d+)", row), (lora, dora), ([], ["--use_dora"]), strict=True):
        found = trained_by([*model, *BASELINE.split(), "--lora_r", rank, *more])
        assert number(stated) == found == pytest.approx(expected, rel=0.01)


def test_the_published_configuration() -> None:
    """shadow-peft 0.1.x counts 17,724,672: the update behind the last layer too, 4 x 1024 x 10, which no loss reads."""
    model = with_shadow("0.6B", ShadowConfig(num_shadow_layers=1))
    parts = [p for part in model.parts().values() for p in part.parameters()]
    assert model.get_nb_trainable_parameters()[0] == 17_683_712
    assert sum(p.numel() for p in parts if not p.requires_grad) == 40_960
    assert sum(p.numel() for p in parts) == 17_724_672


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_paper_recipes_train_what_the_readme_says(name: str) -> None:
    count = trained_by(["--config", f"recipes/{name}.yaml"])
    assert (count, count + 40_960) == (9_032_960, 9_073_920)
    assert "9,032,960" in README
    assert "9,073,920" in README
