"""Variant "peft" in peft's dialect: heads, base adapters and the whole config travel with it, and Trainers load it back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from shadow_peft import ShadowForCausalLM, ShadowForSequenceClassification
from tests.test_base_adapters import shadowed, train_a_little, with_lora
from tests.test_trainer import arguments, collate, rows
from tests.tiny_models import INTEROP, adapted, causal_lm, classifier, llama, qwen3, qwen3_classifier, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
FILES = {"adapter_config.json", "adapter_model.safetensors"}

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads": {"modules_to_save": ["lm_head", "shadow_lm_head"]},
    "key/value heads": {"shadow_num_key_value_heads": 1},
    "head width": {"shadow_head_dim": 4},
    "all sizes": {
        "num_shadow_layers": 2,
        "shadow_intermediate_size": 24,
        "shadow_num_attention_heads": 2,
        "shadow_num_key_value_heads": 1,
        "shadow_head_dim": 8,
    },
    "another width": {"shadow_hidden_size": 16},
    "start from the base": {"shadow_init": "base", "shadow_init_layers": "even", "num_shadow_layers": 2},
    "random start": {"shadow_init": "random"},
    "odd numbers": {"alpha": 0.1 + 0.2, "dropout": 1 / 3},
}


def same_outputs(one: Any, other: Any) -> None:
    for name in ("logits", "shadow_logits"):
        assert torch.equal(one.eval()(tokens())[name], other.eval()(tokens())[name]), name


@pytest.mark.parametrize("what", CONFIGS)
def test_everything_comes_back(what: str, tmp_path: Path) -> None:
    model = causal_lm(llama(), variant="peft", **CONFIGS[what])
    train_a_little(model)
    model.save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == FILES | ({"shadow_modules.safetensors"} if what == "heads" else set())
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    assert loaded.peft_model.shadow_config == model.peft_model.shadow_config
    same_outputs(loaded, model)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    for name in os.listdir(tmp_path / "again"):
        if name.endswith(".safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("chosen", [[], ["classifier_head"]])
def test_a_classifier_comes_back(chosen: list[str], tmp_path: Path) -> None:
    model = classifier(qwen3_classifier(), variant="peft", modules_to_save=chosen)
    model.save_pretrained(tmp_path)
    loaded = ShadowForSequenceClassification.from_pretrained(qwen3_classifier(), tmp_path, is_trainable=True)
    same_outputs(loaded, model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == trained


@pytest.mark.parametrize("train", [True, False])
def test_adapters_of_the_base_come_back(train: bool, tmp_path: Path) -> None:
    model = shadowed(with_lora(), train, variant="peft")
    train_a_little(model)
    model.save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == FILES | {"base_adapter.safetensors"}
    same_outputs(ShadowForCausalLM.from_pretrained(llama(), tmp_path), model)
    same_outputs(ShadowForCausalLM.from_pretrained(with_lora(), tmp_path), model)


def test_an_explicit_shadow_comes_back(tmp_path: Path) -> None:
    shadow = qwen3(4, hidden_size=16, num_hidden_layers=2)
    model = ShadowForCausalLM(adapted(llama(), variant="peft", shadow_model=shadow))
    model.save_pretrained(tmp_path)
    same_outputs(ShadowForCausalLM.from_pretrained(llama(), tmp_path), model)


@pytest.mark.filterwarnings("ignore:.*Unexpected keyword arguments.*")
@pytest.mark.parametrize("what", ["plain", "heads", "start from the base"])
def test_peft_reads_the_adapter_and_ignores_the_rest(what: str, tmp_path: Path) -> None:
    model = adapted(llama(), variant="peft", **CONFIGS[what])
    ShadowForCausalLM(model).save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-5)


def test_a_config_that_peft_wrote_again_is_still_read(tmp_path: Path) -> None:
    model = causal_lm(llama(), variant="peft")
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    del stored["provenance"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    assert loaded.peft_model.shadow_config.shadow_init == "random"
    same_outputs(loaded, model)


def test_a_file_of_pefts_own_is_loaded_and_saved_again(tmp_path: Path) -> None:
    base = llama().from_pretrained(INTEROP / "peft_llama_mirror" / "base")
    loaded = ShadowForCausalLM.from_pretrained(base, INTEROP / "peft_llama_mirror" / "adapter")
    loaded.save_pretrained(tmp_path)
    again = ShadowForCausalLM.from_pretrained(base.from_pretrained(INTEROP / "peft_llama_mirror" / "base"), tmp_path)
    same_outputs(again, loaded)


# ---------------------------------------------------------------- under a Trainer


def trainer(model: ShadowForCausalLM, folder: Path, **settings: Any) -> Trainer:
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    args = arguments(folder, **{"max_steps": 3, "learning_rate": 10.0, **saving, **settings})
    return Trainer(model, args, train_dataset=rows(), eval_dataset=rows(8), data_collator=collate)


@pytest.mark.parametrize("heads", [[], ["lm_head"]])
@pytest.mark.parametrize("variant", ["published", "peft", "readout"])
def test_the_best_checkpoint_is_loaded_at_the_end(variant: str, heads: list[str], tmp_path: Path) -> None:
    running = trainer(causal_lm(llama(), variant=variant, modules_to_save=heads), tmp_path, load_best_model_at_end=True)
    running.train()
    losses = [entry["eval_loss"] for entry in running.state.log_history if "eval_loss" in entry]
    assert running.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    best = ShadowForCausalLM.from_pretrained(llama(), running.state.best_model_checkpoint)
    assert all(torch.equal(best.state_dict()[name], t) for name, t in running.model.state_dict().items())


@pytest.mark.parametrize("base", ["plain", "LoRA"])
def test_a_run_resumes(base: str, tmp_path: Path) -> None:
    def run(folder: Path, resume: bool) -> ShadowForCausalLM:
        on = with_lora() if base == "LoRA" else llama()
        model = shadowed(on, base == "LoRA", variant="peft", modules_to_save=["lm_head"])
        trainer(model, folder, max_steps=4, save_steps=2, learning_rate=1e-2).train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole", resume=False)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    resumed = run(tmp_path / "cut", resume=True)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, msg=name)
