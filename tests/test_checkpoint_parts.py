"""What a config says must be there: missing files, malformed provenance and broken numbers are one clear error."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shadow_peft import ShadowForCausalLM, ShadowForSequenceClassification, ShadowPeftModel
from tests.test_base_adapters import shadowed, with_lora
from tests.tiny_models import INTEROP, adapted, causal_lm, classifier, llama, qwen3, qwen3_classifier, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
VARIANTS = ("published", "peft", "readout")
HEADS, BASE = "shadow_modules.safetensors", "base_adapter.safetensors"


def config_file(folder: Path) -> Path:
    (found,) = (folder / name for name in ("shadow_config.json", "adapter_config.json") if (folder / name).exists())
    return found


def adapter_file(folder: Path) -> Path:
    (found,) = (path for path in folder.glob("*adapter*.safetensors") if path.name != BASE)
    return found


def change_config(folder: Path, **changes: Any) -> None:
    stored = json.loads(config_file(folder).read_text())
    config_file(folder).write_text(json.dumps({**stored, **changes}))


def with_heads(variant: str) -> ShadowForCausalLM:
    model = causal_lm(llama(), variant=variant, modules_to_save=["lm_head", "shadow_lm_head"])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    return model


def refused(base: Any, folder: Path, match: str, load: Callable[..., Any] = ShadowForCausalLM.from_pretrained) -> None:
    """The load fails with this message, and the base stays as it was."""
    before, trainable = base(tokens()).logits, [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=match) as caught:
        load(base, folder)
    assert len(str(caught.value)) < 1000
    assert torch.equal(base(tokens()).logits, before)
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules())


# ---------------------------------------------------------------- missing files


@pytest.mark.parametrize("load", [ShadowForCausalLM.from_pretrained, ShadowPeftModel.from_pretrained])
@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_that_were_saved_must_be_there(variant: str, load: Callable[..., Any], tmp_path: Path) -> None:
    with_heads(variant).save_pretrained(tmp_path)
    (tmp_path / HEADS).unlink()
    refused(llama(), tmp_path, HEADS, load)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_head_that_was_saved_must_be_there(variant: str, tmp_path: Path) -> None:
    with_heads(variant).save_pretrained(tmp_path)
    save_file({"lm_head.weight": load_file(tmp_path / HEADS)["lm_head.weight"]}, tmp_path / HEADS)
    refused(llama(), tmp_path, f"{HEADS} with shadow_lm_head is not there")


def test_both_heads_of_a_classifier_must_be_there(tmp_path: Path) -> None:
    classifier(qwen3_classifier()).save_pretrained(tmp_path)
    kept = {name: t for name, t in load_file(tmp_path / HEADS).items() if name.startswith("classifier_head")}
    save_file(kept, tmp_path / HEADS)
    refused(qwen3_classifier(), tmp_path, "shadow_classifier_head", ShadowForSequenceClassification.from_pretrained)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_adapters_of_the_base_must_be_there(variant: str, tmp_path: Path) -> None:
    shadowed(with_lora(), variant=variant).save_pretrained(tmp_path)
    (tmp_path / BASE).unlink()
    refused(llama(), tmp_path, f"no {BASE}")
    stored = json.loads(config_file(tmp_path).read_text())["provenance"]
    change_config(tmp_path, provenance={name: value for name, value in stored.items() if name != "files"})
    refused(llama(), tmp_path, f"no {BASE}")


def test_heads_of_0_1_must_be_there_for_a_task_model(tmp_path: Path) -> None:
    shutil.copytree(INTEROP / "qwen3_lm_heads_saved" / "adapter", tmp_path, dirs_exist_ok=True)
    base = type(qwen3()).from_pretrained(INTEROP / "qwen3_lm_heads_saved" / "base").eval()
    assert "provenance" not in json.loads((tmp_path / "shadow_config.json").read_text())
    (tmp_path / HEADS).unlink()
    refused(base, tmp_path, HEADS)
    ShadowPeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_belong_to_a_task_model(variant: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = with_heads(variant)
    model.save_pretrained(tmp_path)
    with caplog.at_level("INFO", "shadow_peft"):
        loaded = ShadowPeftModel.from_pretrained(llama(), tmp_path)
    assert "also holds lm_head and shadow_lm_head" in caplog.text
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_that_were_never_saved_are_fresh(variant: str, tmp_path: Path) -> None:
    adapted(llama(), variant=variant, modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded.lm_head.weight, llama().lm_head.weight)


def test_files_that_a_config_does_not_name_are_left_alone(tmp_path: Path) -> None:
    with_heads("published").save_pretrained(tmp_path / "old")
    model = causal_lm(llama(), variant="published")
    model.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "old" / HEADS, tmp_path / "new")  # as an upload over an older one leaves it
    assert torch.equal(ShadowForCausalLM.from_pretrained(llama(), tmp_path / "new")(tokens()).logits, model(tokens()).logits)


# ---------------------------------------------------------------- malformed provenance

MALFORMED: dict[str, Any] = {
    "a list": [],
    "a text": "made at home",
    "sizes of text": {"base_sizes": {"hidden_size": "32"}},
    "negative sizes": {"base_sizes": {"hidden_size": -1}},
    "sizes as a list": {"base_sizes": [32]},
    "base adapters as a list": {"base_adapters": ["default"]},
    "base adapters of numbers": {"base_adapters": {"default": 3}},
    "a base adapter without a type": {"base_adapters": {"default": {}}},
    "a base adapter of no known type": {"base_adapters": {"default": {"peft_type": "ANTIGRAVITY"}}},
    "a base adapter with absurd values": {"base_adapters": {"default": {"peft_type": "LORA", "r": -3}}},
    "a base adapter of text": {
        "base_adapters": {"default": {"peft_type": "LORA", "r": "many", "target_modules": ["q_proj"]}}
    },
    "training as a number": {"training": 0.5},
    "training of text": {"training": {"shadow_loss_weight": "high"}},
    "a negative weight": {"training": {"shadow_loss_weight": -1}},
    "a weight that is no number": {"training": {"shadow_loss_weight": float("nan")}},
    "a ratio out of range": {"training": {"distillation_warmup_ratio": 7}},
    "files as text": {"files": HEADS},
    "files elsewhere": {"files": ["../../secrets.safetensors"]},
    "files of numbers": {"files": [1]},
    "heads as text": {"heads": "lm_head"},
    "a shadow that is no config": {"shadow_model_config": [1]},
    "a shadow of no known type": {"shadow_model_config": {"model_type": "antigravity"}},
    "a shadow without a type": {"shadow_model_config": {}},
    "a shadow whose type is a list": {"shadow_model_config": {"model_type": ["llama"]}},
    "a shadow of text": {"shadow_model_config": {"model_type": "llama", "hidden_size": "wide"}},
    "a shadow of negative width": {"shadow_model_config": {"model_type": "llama", "hidden_size": -8}},
    "a shadow too large for any machine": {"shadow_model_config": {"model_type": "llama", "vocab_size": 10**15}},
    "an embedding table of text": {"shadow_model_has_embeddings": "yes"},
}


@pytest.mark.parametrize("what", MALFORMED)
@pytest.mark.parametrize("variant", ["published", "peft"])
def test_malformed_provenance_is_one_clear_error(variant: str, what: str, tmp_path: Path) -> None:
    if "base adapter" in what:
        shadowed(with_lora(), variant=variant).save_pretrained(tmp_path)
    else:
        causal_lm(llama(), variant=variant).save_pretrained(tmp_path)
    change_config(tmp_path, provenance=MALFORMED[what])
    refused(llama(), tmp_path, f"{tmp_path}|distillation_warmup_ratio must lie in")


FUZZ = (None, True, -1, 0, 10**30, 0.5, float("inf"), "", "text", [], [None], {}, {"": None}, {"hidden_size": {}}, [[]])


@pytest.mark.parametrize("variant", ["published", "peft"])
@pytest.mark.parametrize("part", ["provenance", "config"])
def test_whatever_a_config_says_loads_or_is_one_clear_error(variant: str, part: str, tmp_path: Path) -> None:
    causal_lm(llama(), variant=variant, modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    stored = json.loads(config_file(tmp_path).read_text())
    fields = stored["provenance"] if part == "provenance" else {n: v for n, v in stored.items() if n != "provenance"}
    draw = random.Random(0)
    for name in fields:
        for value in draw.sample(FUZZ, 4):
            changed = {name: value}
            change_config(
                tmp_path, **({"provenance": {**stored["provenance"], **changed}} if part == "provenance" else changed)
            )
            base = llama()
            try:
                ShadowForCausalLM.from_pretrained(base, tmp_path)
            except ValueError:
                assert all(p.requires_grad for p in base.parameters()), (name, value)
            change_config(tmp_path, **stored)


# ---------------------------------------------------------------- broken numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("file", ["adapter", "heads", "base adapter"])
def test_broken_numbers_are_named(file: str, value: float, tmp_path: Path) -> None:
    model = shadowed(with_lora(), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    path = {"adapter": adapter_file(tmp_path), "heads": tmp_path / HEADS, "base adapter": tmp_path / BASE}[file]
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    refused(llama(), tmp_path, rf"{path.name} holds NaN or infinite values in {name}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_broken_numbers_of_any_precision_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    causal_lm(llama(), variant="published").save_pretrained(tmp_path)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(adapter_file(tmp_path)).items()}
    save_file(tensors, adapter_file(tmp_path))
    ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    tensors["shadow_injection_model.injection_ups"][0] = float("nan")
    save_file(tensors, adapter_file(tmp_path))
    refused(llama(), tmp_path, "injection_ups")


def test_broken_numbers_of_an_old_file_are_named(tmp_path: Path) -> None:
    causal_lm(llama(), variant="published").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "shadow_adapter.safetensors")
    tensors["shadow_injection_model.injection_ups"][0] = float("nan")
    torch.save(tensors, tmp_path / "shadow_adapter.pt")
    (tmp_path / "shadow_adapter.safetensors").unlink()
    refused(llama(), tmp_path, r"shadow_adapter\.pt holds NaN")
