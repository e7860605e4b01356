"""A save writes into folders of its own, empty ones and those with a trainer's files, never into another model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer

from shadow_peft import ShadowForCausalLM, ShadowForSequenceClassification
from tests.test_trainer import arguments, collate, rows
from tests.tiny_models import INTEROP, causal_lm, classifier, llama, qwen3_classifier, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
VARIANTS = ("published", "peft", "readout")


def sharded_base(folder: Path) -> None:
    llama().save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()


def base(folder: Path) -> None:
    llama().save_pretrained(folder)


def lora(folder: Path) -> None:
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)


def detached_shadow(folder: Path) -> None:
    causal_lm(llama(), shadow_hidden_size=16).export_shadow().save_pretrained(folder)


def file(name: str, content: bytes = b"weights") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return make


def config_of_others(folder: Path) -> None:
    file("shadow_config.json", b'{"lamp": "warm"}')(folder)


FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "sharded base": (sharded_base, r"a model \(config.json, model-00001-of"),
    "base": (base, r"a model \(config.json, model.safetensors\)"),
    "LoRA": (lora, "peft_type 'LORA'"),
    "broken adapter config": (file("adapter_config.json", b"{"), "adapter_config.json"),
    "detached shadow": (detached_shadow, "a model"),
    "pickled model": (file("pytorch_model.bin"), "pytorch_model.bin"),
    "gguf": (file("model-q4.gguf"), "model-q4.gguf"),
    "index alone": (file("model.safetensors.index.json", b"{}"), "index.json"),
    "heads of others": (file("shadow_modules.safetensors"), "shadow_modules.safetensors"),
    "base adapter of others": (file("base_adapter.safetensors"), "base_adapter.safetensors"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["folder", "checkpoint-3"])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_of_something_else_is_refused_and_stays(what: str, name: str, tmp_path: Path) -> None:
    make, message = FOREIGN[what]
    make(tmp_path / name)
    before = contents(tmp_path)
    for variant in VARIANTS:
        with pytest.raises(ValueError, match=rf"{message}.*overwrite=True"):
            causal_lm(llama(), variant=variant).save_pretrained(tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("variant", VARIANTS)
def test_overwrite_replaces_files_of_the_same_name_alone(variant: str, what: str, tmp_path: Path) -> None:
    FOREIGN[what][0](tmp_path)
    before, model = contents(tmp_path), causal_lm(llama(), variant=variant)
    model.save_pretrained(tmp_path, overwrite=True)
    model.save_pretrained(tmp_path)  # the folder holds an adapter of ours now
    assert torch.equal(ShadowForCausalLM.from_pretrained(llama(), tmp_path)(tokens()).logits, model(tokens()).logits)
    model.save_pretrained(tmp_path / "fresh")
    written = set(os.listdir(tmp_path / "fresh"))
    after = contents(tmp_path)
    assert {name: after[name] for name in before.keys() - written} == {n: before[n] for n in before.keys() - written}


def test_a_base_keeps_its_weights_beside_an_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    sharded_base(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json would be replaced"):
        causal_lm(llama(), variant="published").save_pretrained(folder)
    expected = llama()(tokens()).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).eval()(tokens()).logits, expected)


def test_an_adapter_of_ours_beside_a_foreign_file_of_a_name_that_is_needed(tmp_path: Path) -> None:
    causal_lm(llama(), variant="published").save_pretrained(tmp_path)
    lora(tmp_path / "lora")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / "lora" / name).read_bytes())
    before = contents(tmp_path)
    causal_lm(llama(), seed=5, variant="readout").save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == before["adapter_config.json"]
    with pytest.raises(ValueError, match=r"adapter_config\.json, adapter_model\.safetensors would be replaced"):
        causal_lm(llama(), variant="peft").save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before["adapter_model.safetensors"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_trainers_and_users_put_there_first_is_no_obstacle(variant: str, tmp_path: Path) -> None:
    names = ["README.md", "tokenizer.json", "tokenizer.model", "training_args.bin", "optimizer.pt", "rng_state.pth"]
    names += [
        "optimizer.bin",
        "scheduler.bin",
        "optimizer_1.bin",
        "pytorch_model_fsdp.bin",
        "trainer_state.json",
        "config.json",
    ]
    for name in names:
        (tmp_path / name).write_text(name)
    base(tmp_path / "checkpoint-2")  # of an earlier full fine-tuning
    before, model = contents(tmp_path), causal_lm(llama(), variant=variant)
    model.save_pretrained(tmp_path)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("interop", ["llama_implicit", "peft_llama_mirror"])
def test_adapters_of_the_published_packages_are_ours(interop: str, tmp_path: Path) -> None:
    for path in (INTEROP / interop / "adapter").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = causal_lm(llama(), variant="readout")
    model.save_pretrained(tmp_path)
    kept = {path.name for path in (INTEROP / interop / "adapter").iterdir() if path.suffix == ".md"}
    assert set(os.listdir(tmp_path)) == {"shadow_config.json", "shadow_adapter_readout.safetensors"} | kept


@pytest.mark.parametrize("old", VARIANTS)
@pytest.mark.parametrize("new", VARIANTS)
def test_a_trainers_folder_holds_one_checkpoint(old: str, new: str, tmp_path: Path) -> None:
    causal_lm(llama(), variant=old).save_pretrained(tmp_path / "checkpoint-1")
    model = causal_lm(llama(), seed=5, variant=new)
    model.save_pretrained(tmp_path / "checkpoint-1")
    model.save_pretrained(tmp_path / "fresh" / "checkpoint-1")
    assert contents(tmp_path / "checkpoint-1").keys() == contents(tmp_path / "fresh" / "checkpoint-1").keys()


def test_a_state_of_accelerate_stays_beside_the_adapter(tmp_path: Path) -> None:
    model = causal_lm(llama(), variant="published")
    Accelerator(cpu=True).save_model(model, tmp_path)
    state = (tmp_path / "model.safetensors").read_bytes()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == state


def test_a_trainer_saves_over_its_own_run(tmp_path: Path) -> None:
    for seed in (1, 5):
        model = causal_lm(llama(), seed=seed)
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=rows(8), data_collator=collate)
        trainer.train()
        trainer.save_model()
    loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["overwrit", "max_shards", "from_the_future"])
def test_unknown_arguments_are_refused(name: str, tmp_path: Path) -> None:
    for model in (causal_lm(llama()), causal_lm(llama()).peft_model, classifier(qwen3_classifier())):
        with pytest.raises(TypeError, match=name):
            model.save_pretrained(tmp_path / "out", **{name: True})
        with pytest.raises(TypeError, match=name):
            model.save_pretrained(tmp_path / "out", is_main_process=False, **{name: True})
    assert not (tmp_path / "out").exists()


HABITS: dict[str, Any] = {
    "is_main_process": True,
    "state_dict": None,
    "save_function": torch.save,
    "push_to_hub": False,
    "max_shard_size": "5GB",
    "safe_serialization": True,
    "variant": None,
    "token": "hf_x",
    "save_peft_format": True,
    "save_original_format": True,
    "distributed_checkpoint": False,
    "selected_adapters": ["default"],
    "save_embedding_layers": "auto",
    "path_initial_model_for_weight_conversion": None,
}

IMPOSSIBLE: dict[str, Any] = {
    "safe_serialization": False,
    "push_to_hub": True,
    "variant": "fp16",
    "distributed_checkpoint": True,
    "save_peft_format": False,
    "selected_adapters": ["other"],
    "save_embedding_layers": True,
    "path_initial_model_for_weight_conversion": "somewhere",
}


def test_what_trainers_pass_is_known(tmp_path: Path) -> None:
    model = causal_lm(llama())
    model.save_pretrained(tmp_path, **HABITS)
    assert torch.equal(ShadowForCausalLM.from_pretrained(llama(), tmp_path)(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_done_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.* is not possible"):
        causal_lm(llama()).save_pretrained(tmp_path / "out", **{name: IMPOSSIBLE[name]})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_given_state_dict_is_what_is_saved(variant: str, tmp_path: Path) -> None:
    model = causal_lm(llama(), variant=variant, modules_to_save=["lm_head"])
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
    for prefix in ("", "module.", "peft_model."):
        model.save_pretrained(tmp_path / "out", state_dict={prefix + name: tensor for name, tensor in state.items()})
        loaded = ShadowForCausalLM.from_pretrained(llama(), tmp_path / "out")
        assert all((tensor == 0.5).all() for tensor in loaded.state_dict().values())
    name, _ = state.popitem()
    with pytest.raises(ValueError, match=rf"state_dict lacks 1 tensors of the adapter; {name}"):
        model.save_pretrained(tmp_path / "out", state_dict=state)


def test_a_classifier_saves_over_itself(tmp_path: Path) -> None:
    classifier(qwen3_classifier()).save_pretrained(tmp_path)
    model = classifier(qwen3_classifier(), seed=5)
    model.save_pretrained(tmp_path)
    loaded = ShadowForSequenceClassification.from_pretrained(qwen3_classifier(), tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_weight_file_of_ours_that_was_replaced_is_no_longer_ours(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    causal_lm(llama(), variant="peft").save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["provenance"]["trainer_files"] == ["model.safetensors"]
    save_file({"theirs": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors would be replaced"):
        causal_lm(llama(), variant="peft").save_pretrained(folder)
    causal_lm(llama(), variant="published").save_pretrained(folder)
    assert load_file(folder / "model.safetensors").keys() == {"theirs"}
