"""The method in float64, restated without the library's code: values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shadow_peft.layers.injection import inject
from shadow_peft.layers.update import Norm, UpdateWeights, update
from tests.tiny_models import causal_lm, llama, tokens

D, R, K = 6, 3, 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def test_inject_is_the_formula() -> None:
    h, s, down, up = draw(2, 4, D, seed=1), draw(2, 4, D, seed=2), draw(D, R), draw(R, D)
    expected = h + 0.3 * torch.einsum("btd,dr,re->bte", h - s, down, up)
    torch.testing.assert_close(inject(h, s, down, up, 0.3), expected, rtol=1e-12, atol=1e-12)


def test_update_is_the_formula() -> None:
    h, s = draw(2, 4, D, seed=1), draw(2, 4, D, seed=2)
    gate_in, transform_in, gate_out, transform_out = draw(K, D), draw(K, D, seed=5), draw(D, K), draw(D, K, seed=6)
    weight, bias = draw(D, seed=3), draw(D, seed=4)
    mean, variance = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, unbiased=False)
    n = (h - mean) / (variance + 1e-5).sqrt() * weight + bias
    z_gate, z_transform = n @ gate_in.T, n @ transform_in.T
    t = (z_transform * torch.sigmoid(z_transform)) @ transform_out.T
    g = 1 / (1 + torch.exp(-(z_gate * torch.sigmoid(z_gate)) @ gate_out.T))
    maps = UpdateWeights(torch.cat([gate_in, transform_in]), gate_out, transform_out)
    torch.testing.assert_close(update(h, s, maps, Norm(weight, bias)), s + g * (t - s), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout_before_down", [False, True])
def test_gradients_of_injection(dropout_before_down: bool) -> None:
    inputs = (draw(2, 3, D, seed=1), draw(2, 3, D, seed=2), draw(D, R), draw(R, D))
    assert torch.autograd.gradcheck(lambda *x: inject(*x, 0.4, 0.0, dropout_before_down), inputs)


@pytest.mark.parametrize("biased", [False, True])
def test_gradients_of_update(biased: bool) -> None:
    h, s, down, gate, transform = (
        draw(2, 3, D, seed=1),
        draw(2, 3, D, seed=2),
        draw(2 * K, D),
        draw(D, K),
        draw(D, K, seed=9),
    )
    if biased:
        biases = draw(2 * K), draw(D), draw(D, seed=5)
        assert torch.autograd.gradcheck(
            lambda h, s, a, b, c, *d: update(h, s, UpdateWeights(a, b, c, *d), None), (h, s, down, gate, transform, *biases)
        )
    else:
        norm = draw(D, seed=7), draw(D, seed=8)
        assert torch.autograd.gradcheck(
            lambda h, s, a, b, c, *n: update(h, s, UpdateWeights(a, b, c), Norm(*n)), (h, s, down, gate, transform, *norm)
        )


def test_dropout_keeps_the_mean_and_zeroes_the_correction_at_random() -> None:
    h, s, down, up = draw(64, 64, D, seed=1), draw(64, 64, D, seed=2), draw(D, 1), draw(1, D)
    torch.manual_seed(0)
    correction = inject(h, s, down, up, 1.0, 0.25) - h
    exact = inject(h, s, down, up, 1.0) - h
    ratio = (correction / exact)[..., 0]
    assert set(ratio.round(decimals=6).unique().tolist()) == {0.0, round(1 / 0.75, 6)}
    assert abs((ratio == 0).double().mean().item() - 0.25) < 0.03


def oracle_loss(model, input_ids: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole method around the base's own layers, from the tensors of the file."""
    peft = model.peft_model
    base, alpha = peft.base_model, peft.shadow_config.alpha
    tensors = {name: t.clone().requires_grad_(True) for name, t in peft.adapter_state_dict().items()}

    def get(name: str) -> Tensor:
        return tensors[name]

    x = base.model.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])[None]
    rotary = base.model.rotary_emb(x, positions)
    mask = torch.full((input_ids.shape[1],) * 2, float("-inf"), dtype=x.dtype).triu(1)[None, None]
    backbone = {name.removeprefix("shadow_model."): t for name, t in tensors.items() if name.startswith("shadow_model.")}
    s0 = s = torch.func.functional_call(peft.shadow_model, backbone, kwargs={"inputs_embeds": x}).last_hidden_state
    if not peft.shadow_config.use_shadow_state:
        s = torch.zeros_like(s)
    run = {"attention_mask": mask, "position_embeddings": rotary}
    h, first = x, peft.shadow_config.first_injected_layer
    for layer in base.model.layers[:first]:
        h = layer(h, **run)
    for i, layer in enumerate(base.model.layers[first:]):
        down, up = (get(f"shadow_injection_model.injection_{n}")[i] for n in ("downs", "ups"))
        if peft.shadow_config.normalize_injection:
            unit_h, unit_s = (F.rms_norm(x, x.shape[-1:], eps=1e-30) for x in (h, s))
            delta = alpha * (unit_h - unit_s) @ down @ up
        else:
            delta = alpha * (h - s) @ down @ up
        if peft.shadow_config.variant == "readout":
            added = layer(h + delta, **run) - delta - h
            down, up = (get(f"shadow_output_model.output_{n}")[i] for n in ("downs", "ups"))
            h = h + added + added @ down @ up
            continue
        h = layer(h + delta, **run)
        n = F.layer_norm(
            h, h.shape[-1:], get("shadow_update_model.hidden_norm.weight"), get("shadow_update_model.hidden_norm.bias"), 1e-5
        )
        part = "shadow_update_model.update_"
        t = F.silu(n @ get(f"{part}transforms.{i}.0.weight").T) @ get(f"{part}transforms.{i}.3.weight").T
        g = torch.sigmoid(F.silu(n @ get(f"{part}gates.{i}.0.weight").T) @ get(f"{part}gates.{i}.2.weight").T)
        s = s + g * (t - s)
    final = base.model.norm(h)
    if peft.shadow_config.variant == "readout":
        names = ("gate_down", "gate_up", "gate_bias", "down", "up")
        a, b, bias, down, up = (get(f"shadow_readout_model.{n}") for n in names)
        final = final + torch.tanh(final @ a @ b + bias) * (s - final) + (final - s) @ down @ up
    loss = torch.zeros((), dtype=x.dtype)
    for state, factor in ((final, 1.0), (s0, weight)):
        logits = base.lm_head(state)[:, :-1]
        loss = loss + factor * F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())
    return loss, tensors


@pytest.mark.parametrize(
    "config",
    [
        {"variant": "readout"}, {"variant": "readout", "normalize_injection": False},
        {"variant": "readout", "use_shadow_state": False}, {"variant": "readout", "first_injected_layer": 2},
        {"variant": "published"}, {"variant": "published", "first_injected_layer": 2},
    ],
    ids=["readout", "not normalized", "without state", "upper layers", "published", "published, upper layers"],
)  # fmt: skip
def test_the_whole_method_in_float64(config: dict[str, Any]) -> None:
    base = llama(attn_implementation="eager").double()
    model = causal_lm(base, shadow_loss_weight=0.3, **config)
    model.peft_model.double()
    input_ids = tokens()
    expected, tensors = oracle_loss(model, input_ids, 0.3)
    loss = model(input_ids=input_ids, labels=input_ids).loss
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    expected.backward()
    loss.backward()
    expected_grads = {name: t.grad for name, t in tensors.items() if t.grad is not None}
    for parameter in model.peft_model.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    for name, gradient in model.peft_model.adapter_state_dict().items():
        wanted = expected_grads.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
