"""The backbone keeps its matrix products alone: same gradients, with and without chance, and behind a cached prefix."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import CTRLConfig, CTRLLMHeadModel, DynamicCache, Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel

from shadow_peft import ShadowForCausalLM
from tests.tiny_models import SIZES, adapted, gpt2, llama, qwen3, slopes, tokens


def ctrl() -> PreTrainedModel:
    """A base that changes its embeddings in place."""
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.1, "embd_pdrop": 0.1}
    return CTRLLMHeadModel(CTRLConfig(vocab_size=96, n_positions=64, n_embd=32, dff=64, n_layer=3, n_head=4, **off)).eval()


def dropping() -> PreTrainedModel:
    """A base whose attention drops."""
    return llama(attention_dropout=0.3)


def llama4() -> PreTrainedModel:
    """A base whose experts change the router's output in place, in every layer."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 2, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48}
    return Llama4ForCausalLM(Llama4TextConfig(**{**SIZES, **experts})).eval()


MODELS = {"llama": llama, "attention dropout": dropping, "gpt2": gpt2, "ctrl": ctrl, "llama4": llama4}


def step(model: ShadowForCausalLM, recompute: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step with a fixed seed, and bytes kept for it by the backbone."""
    model.peft_model.recompute_backbone = recompute
    ids, kept = tokens(), {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("name", MODELS)
def test_same_gradients(name: str) -> None:
    model = ShadowForCausalLM(adapted(MODELS[name](), num_shadow_layers=2, dropout=0.2)).train()
    (expected, whole), (found, little) = step(model, False), step(model, True)
    assert little < whole
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("reentrant", [True, False])
def test_llama4_under_gradient_checkpointing(reentrant: bool) -> None:
    model = ShadowForCausalLM(adapted(llama4(), num_shadow_layers=2), shadow_loss_weight=0.5).train()
    expected, _ = step(model, True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, _ = step(model, True)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


PREFIX = 6


def behind_a_prefix(model: ShadowForCausalLM, mask: Tensor | None = None) -> Tensor:
    """The loss of the last tokens behind a prefix that was computed without gradient."""
    ids, part = tokens(), None if mask is None else mask[:, :PREFIX]
    with torch.no_grad():
        prefix = model(ids[:, :PREFIX], attention_mask=part, use_cache=True)
    rest = ids[:, PREFIX:]
    return model(rest, attention_mask=mask, labels=rest, past_key_values=prefix.past_key_values).loss


@pytest.mark.parametrize("variant", ["readout", "published", "peft"])
@pytest.mark.parametrize("base", [llama, gpt2, qwen3])
def test_backward_behind_a_cached_prefix(base: Callable[[], PreTrainedModel], variant: str) -> None:
    """Autograd's gradient is the slope of the loss, for a prefix that stays what it was."""
    model = ShadowForCausalLM(adapted(base().double(), variant=variant, num_shadow_layers=2), shadow_loss_weight=0.5).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # GPT-2's
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        ids = tokens()
        prefix = model(ids[:, :PREFIX], attention_mask=mask[:, :PREFIX], use_cache=True).past_key_values

    def loss() -> Tensor:
        rest = ids[:, PREFIX:]
        return model(rest, attention_mask=mask, labels=rest, past_key_values=copy.deepcopy(prefix)).loss

    loss().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # norms of Llama and Qwen round to float32, to 6e-8 of a state, whatever the dtype of the base; that is divided by h
    torch.testing.assert_close(*slopes(model, loss, 1e-2), rtol=1e-3, atol=0)


def test_a_cached_prefix_and_gradient_checkpointing_exclude_each_other() -> None:
    """transformers drops the cache of a layer that it recomputes: the prefix would be forgotten."""
    model = ShadowForCausalLM(adapted(llama())).train()
    expected = behind_a_prefix(model)
    with torch.no_grad():
        ids = tokens()
        prefix = model(ids[:, :PREFIX], use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids[:, PREFIX:], labels=ids[:, PREFIX:], past_key_values=prefix)
    whole = model(ids, labels=ids, past_key_values=DynamicCache()).loss  # an empty cache is no prefix
    assert torch.equal(whole, model(ids, labels=ids).loss)
    model.gradient_checkpointing_disable()
    assert torch.equal(behind_a_prefix(model), expected)
