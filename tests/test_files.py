"""Checkpoints: written all or none, read with errors that name the key, and nothing changed by a failed load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shadow_peft import (
    AutoModelForCausalLMWithHiddenProjection,
    ShadowConfig,
    ShadowForCausalLM,
    ShadowForSequenceClassification,
    ShadowPeftModel,
    get_shadow_model,
    prepare_shadow_model,
)
from shadow_peft.checkpoint import store
from shadow_peft.storage import files
from tests.tiny_models import INTEROP, adapted, causal_lm, classifier, gpt2, llama, qwen3, qwen3_classifier, tokens

ADAPTER, CONFIG, HEADS = "shadow_adapter.safetensors", "shadow_config.json", "shadow_modules.safetensors"
NEW_ADAPTER = "shadow_adapter_readout.safetensors"


@pytest.mark.parametrize(("variant", "file"), [("readout", NEW_ADAPTER), ("published", ADAPTER)])
def test_round_trip(variant: str, file: str, tmp_path: Path) -> None:
    model, ids = causal_lm(llama(), modules_to_save=["lm_head", "shadow_lm_head"], variant=variant), tokens()
    with torch.no_grad():
        for head in model.peft_model.task_heads.values():
            head.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert {file, CONFIG, HEADS} == set(os.listdir(tmp_path))
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(loaded(ids).shadow_logits, model(ids).shadow_logits, rtol=0, atol=0)
    assert loaded.peft_model.shadow_config == model.peft_model.shadow_config
    assert not any(p.requires_grad for p in loaded.parameters())
    again = ShadowForCausalLM.from_pretrained(llama(), tmp_path, is_trainable=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in again.named_parameters() if p.requires_grad] == names


def test_round_trip_of_a_classifier(tmp_path: Path) -> None:
    model, ids = classifier(qwen3_classifier(), modules_to_save=["classifier_head"]), tokens()
    model.save_pretrained(tmp_path)
    loaded = ShadowForSequenceClassification.from_pretrained(qwen3_classifier(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(loaded(ids).shadow_logits, model(ids).shadow_logits, rtol=0, atol=0)


def test_heads_that_a_checkpoint_lacks_are_fresh_and_frozen_with_the_rest(tmp_path: Path) -> None:
    adapted(qwen3_classifier()).save_pretrained(tmp_path)
    loaded = ShadowForSequenceClassification.from_pretrained(qwen3_classifier(), tmp_path)
    assert torch.equal(loaded.classifier_head.weight, qwen3_classifier().score.weight)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = ShadowForSequenceClassification.from_pretrained(qwen3_classifier(), tmp_path, is_trainable=True)
    assert trainable.classifier_head.weight.requires_grad


def test_an_explicit_shadow_is_rebuilt_from_the_checkpoint(tmp_path: Path) -> None:
    model, ids = ShadowForCausalLM(adapted(llama(), shadow_model=qwen3(4, hidden_size=16, num_hidden_layers=2))), tokens()
    model.save_pretrained(tmp_path)
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    given = ShadowForCausalLM.from_pretrained(llama(), tmp_path, shadow_model=qwen3(9, hidden_size=16, num_hidden_layers=2))
    torch.testing.assert_close(given(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_an_explicit_shadow_without_a_table_is_rebuilt_without_one(tmp_path: Path) -> None:
    backbone = prepare_shadow_model(qwen3(4, num_hidden_layers=2), remove_embed_tokens=True)
    model, ids = ShadowForCausalLM(adapted(llama(), shadow_model=backbone)), tokens()
    model.save_pretrained(tmp_path)
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(loaded(ids).shadow_logits, model(ids).shadow_logits, rtol=0, atol=0)


def test_the_peft_variant_round_trips_in_pefts_dialect(tmp_path: Path) -> None:
    model, ids = causal_lm(llama(), variant="peft"), tokens()
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} == set(os.listdir(tmp_path))
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match='dialect="peft"'):
        model.save_pretrained(tmp_path, dialect="native")
    with pytest.raises(ValueError, match="peft's dialect"):
        causal_lm(llama()).save_pretrained(tmp_path, dialect="peft")


def test_provenance(tmp_path: Path) -> None:
    torch.manual_seed(11)
    get_shadow_model(llama(seed=11), ShadowConfig()).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG).read_text())
    provenance = stored["provenance"]
    assert provenance["versions"].keys() == {"shadow-peft", "torch", "transformers", "safetensors", "python"}
    assert provenance["base_sizes"] == {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 96}
    assert provenance["base_model_type"] == "llama"
    assert provenance["seed"] == 11
    assert ShadowConfig.from_dict(stored) == ShadowConfig()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("where", ["write_json", "write_tensors", "second write_tensors", "os.replace"])
def test_an_interrupted_save_leaves_the_old_checkpoint(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm(llama(), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    before = contents(tmp_path)
    with torch.no_grad():
        model.peft_model.shadow_injection_model.injection_ups.add_(1)
        model.peft_model.task_heads["lm_head"].weight.add_(1)
    target, name = (files.os, "replace") if where == "os.replace" else (store, where.split()[-1])
    original, calls = getattr(target, name), []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == (2 if where in ("os.replace", "second write_tensors") else 1):
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(target, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert set(os.listdir(tmp_path)) == set(before)
    model.save_pretrained(tmp_path)
    assert contents(tmp_path) != before


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / ADAPTER)
        change(tensors)
        save_file(tensors, directory / ADAPTER)

    return apply


UPS = "shadow_injection_model.injection_ups"
GATE = "shadow_update_model.update_gates.1.2.weight"

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (change_tensors(lambda t: t.pop(GATE)), f"missing {GATE}"),
    "extra tensor": (change_tensors(lambda t: t.update(nonsense=torch.zeros(1))), "unknown nonsense"),
    "wrong shape": (
        change_tensors(lambda t: t.update({UPS: t[UPS][:, :4].clone()})),
        rf"{UPS} has shape \(3, 4, 32\) instead of \(3, 8, 32\)",
    ),
    "truncated": (lambda d: os.truncate(d / ADAPTER, 5000), "damaged or truncated"),
    "empty": (lambda d: os.truncate(d / ADAPTER, 0), "damaged or truncated"),
    "no tensors": (lambda d: (d / ADAPTER).unlink(), f"no {ADAPTER}"),
    "broken config": (lambda d: (d / CONFIG).write_text("{"), "damaged"),
    "config of another kind": (lambda d: (d / CONFIG).write_text("[]"), "JSON object"),
    "no config": (lambda d: (d / CONFIG).unlink(), "no shadow adapter"),
    "another tuner": (
        lambda d: ((d / CONFIG).unlink(), (d / "adapter_config.json").write_text('{"peft_type": "LORA"}')),
        "peft_type 'LORA'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_does_not_fit_is_one_clear_error(damage: str, tmp_path: Path) -> None:
    causal_lm(llama(), variant="published").save_pretrained(tmp_path)
    apply, message = DAMAGE[damage]
    apply(tmp_path)
    base, ids = llama(), tokens()
    before, trainable = base(ids).logits, [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=message):
        ShadowForCausalLM.from_pretrained(base, tmp_path)
    assert torch.equal(base(ids).logits, before)
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules())


def test_a_failed_load_into_a_model_changes_nothing() -> None:
    model, ids = causal_lm(llama(), variant="published"), tokens()
    before, state = model(ids).logits, {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="missing"):
        model.load_state_dict({k: v for k, v in state.items() if k != GATE})
    with pytest.raises(ValueError, match="has shape"):
        model.peft_model.load_adapter_state_dict({**state, GATE: torch.zeros(1)})
    with pytest.raises(ValueError, match="unknown other"):
        model.load_state_dict({"other": torch.zeros(1)}, strict=False)
    assert torch.equal(model(ids).logits, before)
    assert model.load_state_dict({GATE: state[GATE]}, strict=False).missing_keys
    assert not torch.equal(model(ids).logits, before)


def test_another_base_is_named(tmp_path: Path) -> None:
    causal_lm(llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another base: num_hidden_layers 4 \(here 5\)"):
        ShadowForCausalLM.from_pretrained(llama(num_hidden_layers=5), tmp_path)
    with pytest.raises(ValueError, match="vocab_size 96"):
        ShadowForCausalLM.from_pretrained(llama(vocab_size=128), tmp_path)


def test_heads_of_another_task_are_refused(tmp_path: Path) -> None:
    classifier(qwen3_classifier()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classifier_head"):
        ShadowForCausalLM.from_pretrained(qwen3(), tmp_path)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.path}",))


def test_legacy_files_load_without_running_code(tmp_path: Path) -> None:
    model, ids = causal_lm(llama(), variant="published"), tokens()
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / ADAPTER), tmp_path / "shadow_adapter.pt")
    (tmp_path / ADAPTER).unlink()
    torch.testing.assert_close(ShadowForCausalLM.from_pretrained(llama(), tmp_path)(ids).logits, model(ids).logits)
    torch.save(Evil(tmp_path / "ran"), tmp_path / "shadow_adapter.pt")
    with pytest.raises(ValueError, match=r"more than tensors|damaged"):
        ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_no_class_is_imported_because_a_file_names_it(tmp_path: Path) -> None:
    source = INTEROP / "qwen3_projected" / "exported"
    config = json.loads((source / "config.json").read_text())
    for name in ("shadow_model_class", "shadow_model_config_class"):
        config[name] = "antigravity:Class"
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoModelForCausalLMWithHiddenProjection.from_pretrained(tmp_path).shadow_model.config.model_type == "qwen3"
    config["shadow_model_config"]["model_type"] = "os"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model_type 'os'"):
        AutoModelForCausalLMWithHiddenProjection.from_pretrained(tmp_path)


def test_unknown_keys_of_a_config_are_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    causal_lm(llama()).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**stored, "from_the_future": 1}))
    config = ShadowPeftModel.from_pretrained(llama(), tmp_path).shadow_config
    assert config.injection_hidden_size == 8
    assert "from_the_future" in caplog.text


def test_shared_tables_are_stored_on_request_and_ignored_when_read(tmp_path: Path) -> None:
    model, ids = causal_lm(gpt2(), variant="published"), tokens()
    model.save_pretrained(tmp_path, include_shared_embeddings=True)
    assert torch.equal(load_file(tmp_path / ADAPTER)["shadow_model.wte.weight"], model.get_input_embeddings().weight)
    torch.testing.assert_close(ShadowForCausalLM.from_pretrained(gpt2(), tmp_path)(ids).logits, model(ids).logits)


def test_saving_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        causal_lm(llama()).save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="pass the directory"):
        ShadowForCausalLM.from_pretrained(llama(), tmp_path / "file")


def test_a_save_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    """shadow-peft 0.1.x would find the old tensors beside a config that no longer means them."""
    (tmp_path / "notes.txt").write_text("mine")
    causal_lm(llama(), variant="published", modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model, ids = causal_lm(llama(), variant="readout"), tokens()
    model.save_pretrained(tmp_path)
    assert not {ADAPTER, HEADS} & set(os.listdir(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    causal_lm(llama(), variant="peft").save_pretrained(tmp_path)
    assert ShadowForCausalLM.from_pretrained(llama(), tmp_path).peft_model.shadow_config.variant == "peft"
    assert torch.isfinite(model(ids).logits).all()
