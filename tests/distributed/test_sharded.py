"""A sharded model's state dict, files and refusals, in one process that is a group of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shadow_peft import ShadowForCausalLM
from tests.tiny_models import causal_lm, llama, tokens

WHOLE = StateDictOptions(full_state_dict=True)


@pytest.fixture
def sharded() -> Iterator[ShadowForCausalLM]:
    """A model with trained heads, wrapped as accelerate wraps it."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    model = causal_lm(llama(), modules_to_save=["lm_head", "shadow_lm_head"])
    mesh = init_device_mesh("cpu", (1,))
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    yield fully_shard(model, mesh=mesh)
    distributed.destroy_process_group()


def test_layers_of_base_and_backbone_are_what_fsdp_wraps() -> None:
    assert set(causal_lm(llama())._no_split_modules) == {"LlamaDecoderLayer"}


def test_sharded_names_are_those_of_the_parameters(sharded: ShadowForCausalLM) -> None:
    sharded(input_ids=tokens())  # leaves the outermost parameters whole
    state, parameters = sharded.state_dict(), dict(sharded.named_parameters())
    assert set(state) == {name for name in parameters if not name.startswith("peft_model.base_model.")}
    assert all(isinstance(tensor, DTensor) for tensor in state.values())


def test_gathered_state_is_saved_as_without_shards(sharded: ShadowForCausalLM, tmp_path: Path) -> None:
    whole = causal_lm(llama(), modules_to_save=["lm_head", "shadow_lm_head"])
    sharded.save_pretrained(tmp_path / "sharded" / "checkpoint-1", state_dict=get_model_state_dict(sharded, options=WHOLE))
    whole.save_pretrained(tmp_path / "whole" / "checkpoint-1")
    for file in ("shadow_adapter.safetensors", "shadow_modules.safetensors", "model.safetensors.index.json"):
        assert (tmp_path / "sharded" / "checkpoint-1" / file).read_bytes() == (
            tmp_path / "whole" / "checkpoint-1" / file
        ).read_bytes()
    logits = [model.eval()(input_ids=tokens()).logits for model in (sharded, whole)]  # shards are back in their places
    torch.testing.assert_close(*logits)


def test_state_goes_back_where_it_came_from(sharded: ShadowForCausalLM) -> None:
    state = {name: tensor.clone() for name, tensor in get_model_state_dict(sharded, options=WHOLE).items()}
    before = sharded.eval()(input_ids=tokens()).logits
    with torch.no_grad():
        for parameter in sharded.peft_model.shadow_injection_model.parameters():
            parameter.add_(1.0)
    assert not torch.allclose(sharded(input_ids=tokens()).logits, before)
    set_model_state_dict(sharded, state, options=WHOLE)
    torch.testing.assert_close(sharded(input_ids=tokens()).logits, before, rtol=0, atol=0)


def test_what_needs_whole_parameters_says_so(sharded: ShadowForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"accelerator\.get_state_dict\(model\)"):
        sharded.save_pretrained(tmp_path)
    state = get_model_state_dict(sharded, options=WHOLE)
    state.popitem()
    with pytest.raises(ValueError, match="lacks 1 of its tensors"):
        sharded.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="sharded over processes"):
        sharded.peft_model.adapter_state_dict()
    with pytest.raises(ValueError, match="export it from one process"):
        sharded.export_shadow()
    with pytest.raises(ValueError, match="include_shared_embeddings"):
        sharded.save_pretrained(tmp_path, state_dict=state, include_shared_embeddings=True)
    assert not list(tmp_path.iterdir())
