"""Quantized bases: one step of training, files, generation and unloading; the shadow itself is never quantized."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model
from tests.tiny_models import llama, tokens, with_nonzero_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # these packages have warnings of their own

KINDS = {"bitsandbytes 4": "bitsandbytes", "bitsandbytes 8": "bitsandbytes", "torchao 8": "torchao", "torchao 4": "torchao"}


def settings(kind: str) -> Any:
    if kind == "bitsandbytes 4":
        return BitsAndBytesConfig(load_in_4bit=True)
    if kind == "bitsandbytes 8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "torchao 8" else IntxWeightOnlyConfig(weight_dtype=torch.int4))


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    package = KINDS[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    llama(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "base")
    quantization = settings(request.param)
    folder = tmp_path / "base"
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
    return loaded.eval()


def attached(base: PreTrainedModel, init: str = "auto") -> ShadowForCausalLM:
    torch.manual_seed(0)
    config = ShadowConfig(shadow_init=init, dropout=0.0, alpha=0.7)
    return ShadowForCausalLM(with_nonzero_weights(get_shadow_model(base, config)), shadow_loss_weight=0.5)


def test_a_quantized_base_trains_saves_loads_generates_and_is_given_back(base: PreTrainedModel, tmp_path: Path) -> None:
    ids = tokens()
    model = attached(base)
    with torch.no_grad():
        before = base(ids).logits  # bitsandbytes packs its weights anew in the first inference
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(parameter.grad)
    model.eval().save_pretrained(tmp_path / "adapter")
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.peft_model.unload()
    with torch.no_grad():
        assert torch.equal(base(ids).logits, before)
    loaded = ShadowForCausalLM.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False), written)


def test_the_shadow_is_cut_from_what_the_quantized_weights_mean(base: PreTrainedModel) -> None:
    layer = attached(base, "base").peft_model.shadow_model.layers[0]
    assert {(type(p), p.dtype) for p in layer.parameters()} == {(torch.nn.Parameter, torch.float32)}
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    theirs = base.model.layers[0].mlp.gate_proj(x)
    difference = (layer.mlp.gate_proj(x) - theirs).abs().max() / theirs.abs().max()
    assert difference < 0.02  # 8 bit of bitsandbytes rounds its inputs as well


def test_weights_packed_for_inference_leave_the_shadow_random(
    base: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        base(tokens())
    if not getattr(getattr(base.model.layers[0].mlp.gate_proj.weight, "quant_state", None), "packing_format_for_cpu", False):
        pytest.skip("these weights are not packed anew")
    with caplog.at_level(logging.INFO, "shadow_peft"):
        attached(base)
    assert "starts at random" in caplog.text
    with pytest.raises(ValueError, match="before that"):
        attached(base, "base")
