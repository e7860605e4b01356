"""Half-precision bases, autocast, and bases whose layers live elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from tests.conformance.tiny import tiny_model
from tests.tiny_models import (
    BASES,
    adapted,
    causal_lm,
    classifier,
    llama,
    qwen3_classifier,
    slopes,
    tokens,
    with_nonzero_weights,
)

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_base_generates(dtype: torch.dtype) -> None:
    assert causal_lm(llama().to(dtype)).generate(tokens(), max_new_tokens=3, do_sample=False).shape == (3, 13)


@pytest.mark.parametrize("dtype", HALF)
def test_an_argument_keeps_the_adapter_in_the_bases_dtype(dtype: torch.dtype) -> None:
    peft = get_shadow_model(llama().to(dtype), ShadowConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in peft.parameters()} == {dtype}
    ShadowForCausalLM(peft)(tokens(), labels=tokens()).loss.backward()


def test_rotary_frequencies_are_not_rounded() -> None:
    """transformers loads a bfloat16 model with float32 frequencies; so do we, in memory as from a file."""
    peft = get_shadow_model(llama().to(torch.bfloat16), ShadowConfig(), autocast_adapter_dtype=False)
    exact = llama().model.rotary_emb.inv_freq
    for backbone in (peft.shadow_model, ShadowForCausalLM(peft).export_shadow().model):
        assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
        assert torch.equal(backbone.rotary_emb.inv_freq, exact)


@pytest.mark.parametrize("model_type", ["xglm", "openai-gpt", "falcon_h1"])
def test_other_buffers_are_cast_with_the_weights(model_type: str) -> None:
    """transformers makes these in the dtype that a model is loaded in, and adds them to states of that dtype."""
    base = tiny_model(model_type).to(torch.bfloat16)
    model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(), autocast_adapter_dtype=False)).eval()
    assert model(tokens()).shadow_logits.dtype == torch.bfloat16
    assert model.export_shadow()(tokens()).logits.isfinite().all()


VARIANTS = ["readout", "published", "peft"]


@pytest.mark.parametrize("heads", [[], ["lm_head", "shadow_lm_head"]])
@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("name", BASES)
def test_a_float64_base_trains_and_generates_in_float64(name: str, masters: bool, heads: list[str], tmp_path: Path) -> None:
    ids, config = tokens(), ShadowConfig(variant="readout", dropout=0.0, modules_to_save=heads)
    peft = get_shadow_model(BASES[name]().double(), config, autocast_adapter_dtype=masters)
    model = ShadowForCausalLM(with_nonzero_weights(peft)).train()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float64
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    outputs = model.eval()(ids)
    assert outputs.logits.dtype == outputs.shadow_logits.dtype == torch.float64
    written = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, use_shadow_draft=True), written)
    model.save_pretrained(tmp_path / "adapter")
    loaded = ShadowForCausalLM.from_pretrained(BASES[name]().double(), tmp_path / "adapter", autocast_adapter_dtype=masters)
    assert torch.equal(loaded(ids).logits, outputs.logits)
    exported = model.export_shadow()
    assert exported.dtype == torch.float64
    torch.testing.assert_close(exported(ids).logits, outputs.shadow_logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_beside_a_float64_base_is_that_of_differences(variant: str) -> None:
    """Only where nothing on the way is rounded to float32; GPT-2's own layers round nothing."""
    model, ids = ShadowForCausalLM(adapted(BASES["gpt2"]().double(), variant=variant), shadow_loss_weight=0.5), tokens()
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(*slopes(model, lambda: model(ids, labels=ids).loss, 1e-5), rtol=1e-7, atol=0)


def test_a_shadow_made_from_a_float64_base_has_its_very_weights() -> None:
    base = llama().double()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1 + 1e-12)
    layer = get_shadow_model(base, ShadowConfig(shadow_init="base")).shadow_model.layers[0]
    for name, value in layer.state_dict().items():
        assert torch.equal(value, base.model.layers[0].state_dict()[name]), name


def test_float64_classifiers_and_an_explicit_shadow() -> None:
    for base in (qwen3_classifier().double(), llama(num_labels=3).double()):
        model = classifier(base)
        outputs = model(tokens(), labels=torch.tensor([0, 1, 2]))
        outputs.loss.backward()
        assert outputs.logits.dtype == torch.float64
        assert {p.dtype for p in model.parameters()} == {torch.float64}
    explicit = ShadowForCausalLM(adapted(llama().double(), shadow_model=llama(3, hidden_size=16, num_hidden_layers=2)))
    explicit.train()(tokens(), labels=tokens()).loss.backward()
    assert {p.dtype for p in explicit.parameters()} == {torch.float64}


def test_float32_masters_compute_in_the_bases_dtype() -> None:
    model = causal_lm(llama().bfloat16())
    backbone, seen = model.peft_model.shadow_model, []
    backbone.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: seen.append((m.weight.dtype, out.dtype)))
    model(tokens())
    assert seen == [(torch.float32, torch.bfloat16)]


def test_half_precision_classifier_and_explicit_shadow() -> None:
    model = classifier(qwen3_classifier().bfloat16())
    model(tokens(), labels=torch.tensor([0, 1, 2])).loss.backward()
    explicit = ShadowForCausalLM(
        adapted(llama().bfloat16(), shadow_model=llama(3, hidden_size=16, num_hidden_layers=2).bfloat16())
    )
    explicit(tokens(), labels=tokens()).loss.backward()
    assert explicit.peft_model.shadow_hidden_projection.weight.grad.isfinite().all()


def test_autocast_does_not_round_the_residual_stream() -> None:
    model, ids = causal_lm(llama()), tokens()
    exact = model(ids, labels=ids)
    seen: list[torch.dtype] = []
    model.peft_model.base_model.model.layers[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert seen == [torch.float32]
    assert (outputs.logits.float() - exact.logits).abs().max() < 0.08 * exact.logits.abs().max()


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_base_spread_by_device_map(offload: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": offload}
    device_map |= {f"model.layers.{i}": "cpu" if i < 2 else offload for i in range(4)}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "off"
    ).eval()
    ids, before = tokens(), llama()(tokens()).logits
    torch.manual_seed(1)
    settings = {"alpha": 0.7, "dropout": 0.0, "injection_hidden_size": 8, "gate_hidden_size": 6, "shadow_init": "base"}
    model = ShadowForCausalLM(
        with_nonzero_weights(get_shadow_model(base, ShadowConfig(**settings, num_shadow_layers=3)))
    ).eval()
    expected = causal_lm(llama(), num_shadow_layers=3, shadow_init="base")
    expected.load_state_dict(model.state_dict())
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.logits, expected(ids).logits)
    torch.testing.assert_close(outputs.shadow_logits, expected(ids).shadow_logits)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False), expected.generate(ids, max_new_tokens=4, do_sample=False)
    )
    torch.testing.assert_close(model.export_shadow()(ids).logits, outputs.shadow_logits)
    torch.testing.assert_close(model.peft_model.unload()(ids).logits, before)


def test_maps_on_another_device_are_brought_to_the_layer() -> None:
    base = llama()
    model = causal_lm(base)
    moved: list[str] = []
    expected = model(tokens()).logits
    model.peft_model.shadow_injection_model.double()  # stands for "elsewhere": maps move to the layer's dtype and device
    base.model.layers[1].register_forward_pre_hook(lambda m, args: moved.append(str(args[0].dtype)))
    torch.testing.assert_close(model(tokens()).logits, expected)
    assert moved == ["torch.float32"]
