"""The backbone keeps its matrix products alone: same gradients, with and without chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CTRLConfig, CTRLLMHeadModel, PreTrainedModel

from shadow_peft import ShadowForCausalLM
from tests.tiny_models import adapted, gpt2, llama, tokens


def ctrl() -> PreTrainedModel:
    """A base that changes its embeddings in place."""
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.1, "embd_pdrop": 0.1}
    return CTRLLMHeadModel(CTRLConfig(vocab_size=96, n_positions=64, n_embd=32, dff=64, n_layer=3, n_head=4, **off)).eval()


def dropping() -> PreTrainedModel:
    """A base whose attention drops."""
    return llama(attention_dropout=0.3)


MODELS = {"llama": llama, "attention dropout": dropping, "gpt2": gpt2, "ctrl": ctrl}


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
