"""Compiled in one graph, without graph breaks and without needless recompilation; the same results as eager."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from shadow_peft import ShadowForCausalLM
from tests.tiny_models import FAMILIES, causal_lm, llama, tokens


class Counted:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture
def backend() -> Iterator[Counted]:
    torch._dynamo.reset()
    yield Counted()
    torch._dynamo.reset()


def compiled(model: ShadowForCausalLM, backend: Counted) -> object:
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_inference(name: str, backend: Counted) -> None:
    model = causal_lm(FAMILIES[name](), num_shadow_layers=2)
    run, ids = compiled(model, backend), tokens(2, 9)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        for batch in (ids, tokens(2, 9, seed=7)):
            output, expected = run(batch, attention_mask=mask, use_cache=False), model(batch, attention_mask=mask)
            torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=2e-5)
            torch.testing.assert_close(output.shadow_logits, expected.shadow_logits, rtol=0, atol=2e-5)
    assert backend.graphs == 1


def test_training(backend: Counted) -> None:
    model = causal_lm(llama(), num_shadow_layers=2, dropout=0.0).train()
    ids = tokens(2, 9)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def gradients(call: object) -> dict[str, Tensor]:
        model.zero_grad()
        call(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in parameters.items()}

    expected, run = gradients(model), compiled(model, backend)
    for _ in range(2):
        for name, gradient in gradients(run).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert backend.graphs == 1


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_decoding_with_a_static_cache(name: str, backend: Counted) -> None:
    """One graph for the prompt, one for all steps behind it, and eager's tokens."""
    model, ids = causal_lm(FAMILIES[name](), num_shadow_layers=2), tokens(2, 6)
    settings = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, **settings)
    cache = model.peft_model.with_shadow_cache(StaticCache(config=model.config, max_cache_len=32))
    step, sequence, last = compiled(model, backend), ids, ids
    with torch.no_grad():
        for _ in range(10):
            start = sequence.shape[1] - last.shape[1]
            positions = torch.arange(start, sequence.shape[1])[None].expand(2, -1)
            output = step(last, position_ids=positions, past_key_values=cache, use_cache=True, output_shadow_logits=False)
            last = output.logits[:, -1:].argmax(-1)
            sequence = torch.cat([sequence, last], 1)
    assert torch.equal(sequence, expected)
    assert backend.graphs == 2


def test_weights_are_swapped_without_recompiling(backend: Counted, tmp_path: Path) -> None:
    model, ids = causal_lm(llama(), num_shadow_layers=2), tokens(2, 9)
    other = causal_lm(llama(), num_shadow_layers=2, seed=5)
    other.save_pretrained(tmp_path)
    run = compiled(model, backend)
    with torch.no_grad():
        before = run(ids, use_cache=False).logits
        model.hotswap_adapter(tmp_path)
        after = run(ids, use_cache=False).logits
        torch.testing.assert_close(after, other(ids).logits, rtol=0, atol=2e-5)
    assert not torch.allclose(after, before, atol=1e-3)
    assert backend.graphs == 1
