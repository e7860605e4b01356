"""Adapters for peft's Shadow tuner and of it, checked against peft itself: same logits, and a clear no where it is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft import ShadowConfig as PeftShadowConfig
from torch import nn

from shadow_peft import AutoModelForCausalLMWithHiddenProjection, ShadowForCausalLM, ShadowPeftModel
from shadow_peft.cli import main
from shadow_peft.conversion import SHADOW_FOLDER, to_native, to_peft
from tests.test_base_adapters import shadowed, with_lora
from tests.tiny_models import adapted, causal_lm, gemma3, gpt2, llama, qwen3, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore:.*Unexpected keyword arguments.*"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),  # of embeddings: not read, or read already
]
SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}

#: Sizes of a shadow -> whether peft rebuilds it from the base.
SIZES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "two layers, fewer neurons": ({"num_shadow_layers": 2, "shadow_intermediate_size": 24}, True),
    "another width": ({"shadow_hidden_size": 16}, True),
    "key/value heads": ({"shadow_num_key_value_heads": 1, "num_shadow_layers": 2}, False),
    "narrow heads": ({"shadow_head_dim": 4}, False),
}


def trained(model: nn.Module) -> Any:
    """With weights that make every part count."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3 if "norm" not in name else 0.1)
    return model.eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(tokens()).logits


def by_peft(folder: Path, base: Any) -> torch.Tensor:
    return logits_of(PeftModel.from_pretrained(base, folder))


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", SIZES)
def test_peft_computes_the_same(what: str, tmp_path: Path) -> None:
    sizes, is_mirror = SIZES[what]
    model = trained(adapted(llama(), variant="peft", dropout=0.0, **sizes))
    expected = logits_of(model)
    assert not torch.equal(expected, logits_of(llama()))
    model.save_pretrained(tmp_path / "ours")
    to_peft(llama(), tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "theirs" / SHADOW_FOLDER).is_dir() is not is_mirror
    same(by_peft(tmp_path / "theirs", llama()), expected)
    same(logits_of(ShadowPeftModel.from_pretrained(llama(), tmp_path / "theirs")), expected)


@pytest.mark.parametrize("layers", ["even", "2,3"])
def test_a_mirror_of_other_kinds_of_layers_is_written_beside(layers: str, tmp_path: Path) -> None:
    chosen = {"num_shadow_layers": 2, "shadow_init_layers": layers}
    model = trained(adapted(gemma3(), variant="peft", dropout=0.0, **chosen))
    model.save_pretrained(tmp_path / "ours")
    to_peft(gemma3(), tmp_path / "ours", tmp_path / "theirs")
    same(by_peft(tmp_path / "theirs", gemma3()), logits_of(model))


@pytest.mark.parametrize("width", [16, 32])
def test_an_explicit_shadow_is_written_beside(width: int, tmp_path: Path) -> None:
    shadow = qwen3(4, **{**SMALL, "hidden_size": width})
    model = trained(adapted(llama(), variant="peft", dropout=0.0, shadow_model=shadow))
    model.save_pretrained(tmp_path / "ours")
    to_peft(llama(), tmp_path / "ours", tmp_path / "theirs")
    same(by_peft(tmp_path / "theirs", llama()), logits_of(model))
    for place in ("ours", "theirs"):
        loaded = ShadowPeftModel.from_pretrained(llama(), tmp_path / place, is_trainable=True)
        assert loaded.shadow_config == model.shadow_config
        assert not loaded.shadow_model.get_input_embeddings().weight.requires_grad
        same(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("sizes", [{}, {"shadow_num_hidden_layers": 2}, {"shadow_hidden_size": 16}], ids=str)
@pytest.mark.parametrize("shares", [True, False])
def test_what_peft_saved_is_converted(shares: bool, sizes: dict[str, Any], tmp_path: Path) -> None:
    settings = {"share_embeddings": shares, "shadow_dropout": 0.0, "task_type": "CAUSAL_LM", **sizes}
    theirs = trained(get_peft_model(llama(), PeftShadowConfig(**settings)))
    theirs.save_pretrained(tmp_path / "theirs")
    model = to_native(llama(), tmp_path / "theirs", tmp_path / "ours")
    same(logits_of(model), logits_of(theirs))
    loaded = ShadowPeftModel.from_pretrained(llama(), tmp_path / "ours", is_trainable=True)
    same(logits_of(loaded), logits_of(theirs))
    same(by_peft(tmp_path / "ours", llama()), logits_of(theirs))
    own = [p for name, p in loaded.named_parameters() if "embed_tokens" in name and name.startswith("shadow_model")]
    assert [p.requires_grad for p in own] == ([] if shares and "shadow_hidden_size" not in sizes else [True])
    stored = [json.loads((tmp_path / place / "adapter_config.json").read_text()) for place in ("theirs", "ours")]
    if "shadow_hidden_size" not in sizes:
        assert [config["share_embeddings"] for config in stored] == [shares, shares]


def test_a_shadow_with_its_own_table_reads_embeddings_too(tmp_path: Path) -> None:
    settings = {"share_embeddings": False, "shadow_dropout": 0.0, "task_type": "CAUSAL_LM"}
    theirs = trained(get_peft_model(llama(), PeftShadowConfig(**settings)))
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        ours = ShadowForCausalLM.from_pretrained(llama(), tmp_path).eval()
        backbone, head = theirs.base_model.shadow_backbone["default"], theirs.get_output_embeddings()
        same(ours(tokens()).shadow_logits, head(backbone(input_ids=tokens())[0]))


@pytest.mark.parametrize("projected", [True, False])
def test_a_shadow_that_peft_names_by_its_place_is_found(projected: bool, tmp_path: Path) -> None:
    small = qwen3(4, **SMALL)
    if projected:
        projection, head = nn.Linear(16, 32, bias=False), llama().lm_head
        small = AutoModelForCausalLMWithHiddenProjection.wrap(
            shadow_model=small, shadow_hidden_projection=projection, lm_head=head
        )
    small.save_pretrained(tmp_path / "small")
    settings = {"shadow_model": str(tmp_path / "small"), "shadow_dropout": 0.0, "task_type": "CAUSAL_LM"}
    theirs = trained(get_peft_model(llama(), PeftShadowConfig(**settings)))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="pass it as shadow_model"):
        ShadowPeftModel.from_pretrained(llama(), tmp_path / "theirs")
    to_native(llama(), tmp_path / "theirs", tmp_path / "ours")
    same(logits_of(ShadowPeftModel.from_pretrained(llama(), tmp_path / "ours")), logits_of(theirs))


@pytest.mark.parametrize("variant", ["published", "readout"])
def test_other_mathematics_are_refused(variant: str, tmp_path: Path) -> None:
    causal_lm(llama(), variant=variant).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=f"variant '{variant}' has no equal in peft: it "):
        to_peft(llama(), tmp_path / "ours", tmp_path / "theirs")
    with pytest.raises(ValueError, match="was written by this library already"):
        to_native(llama(), tmp_path / "ours", tmp_path / "again")
    assert not (tmp_path / "theirs").exists()


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    causal_lm(llama(), variant="peft", modules_to_save=["lm_head"]).save_pretrained(tmp_path / "heads")
    with pytest.raises(ValueError, match="trained heads"):
        to_peft(llama(), tmp_path / "heads", tmp_path / "theirs")
    shadowed(with_lora(), True, variant="peft").save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="adapters of the base"):
        to_peft(llama(), tmp_path / "lora", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_absolute_positions(tmp_path: Path) -> None:
    model = trained(adapted(gpt2(), variant="peft", dropout=0.0))
    model.save_pretrained(tmp_path / "ours")
    to_peft(gpt2(), tmp_path / "ours", tmp_path / "theirs")
    same(by_peft(tmp_path / "theirs", gpt2()), logits_of(model))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = llama().from_pretrained(tmp_path / "base")
    model = trained(adapted(base, variant="peft", dropout=0.0, shadow_head_dim=4))
    model.save_pretrained(tmp_path / "ours")
    theirs = str(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "ours"), "--to", "peft", "--output", theirs]) == 0
    said = capsys.readouterr().out
    assert "adapter_config.json, adapter_model.safetensors, shadow_model" in said
    assert "leave it there" in said
    same(by_peft(tmp_path / "theirs", llama()), logits_of(model))
    assert main(["convert", str(tmp_path / "ours"), "--to", "peft", "--output", theirs]) == 1
    assert "is not empty" in capsys.readouterr().err
    causal_lm(base, variant="readout").save_pretrained(tmp_path / "readout")
    assert main(["convert", str(tmp_path / "readout"), "--to", "peft", "--output", str(tmp_path / "no")]) == 1
    assert "has no equal in peft: it takes the injected correction back" in capsys.readouterr().err
