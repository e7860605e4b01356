"""Quantized tiny bases, and the same bases with the floats that the quantized weights mean."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tests.tiny_models import llama, qwen3_classifier

KINDS = {"bitsandbytes 4": "bitsandbytes", "bitsandbytes 8": "bitsandbytes", "torchao 8": "torchao", "torchao 4": "torchao"}
"""Kind -> the package that quantizes; "bitsandbytes 4" is QLoRA's: NF4 with double quantization."""

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 3,
    "initializer_range": 0.1,  # or nearly the whole gradient would pass beside the layers
}  # fmt: skip
WORDS: dict[str, Any] = {"vocab_size": 300, "eos_token_id": 1, "bos_token_id": None}


def need(kind: str) -> None:
    """Skip, saying why, where the kind's package is not installed."""
    if importlib.util.find_spec(KINDS[kind]) is None:
        pytest.skip(f"{KINDS[kind]} is not installed: pip install -e '.[quantized]'")


def settings(kind: str, compute: torch.dtype = torch.float32) -> Any:
    """The `quantization_config` of a kind."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "bitsandbytes 4":
        double = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **double)
    if kind == "bitsandbytes 8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "torchao 8" else IntxWeightOnlyConfig(weight_dtype=torch.int4))


def save_base(folder: Path, classifier: bool = False, **sizes: Any) -> Path:
    """A random float base as a folder: a Llama, or a Qwen3 classifier of one label."""
    chosen = {**SIZES, **WORDS, **sizes}
    model = qwen3_classifier(**{"num_labels": 1, **chosen}) if classifier else llama(**chosen)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, kind: str | None, dtype: torch.dtype = torch.float32, classifier: bool = False) -> PreTrainedModel:
    """The folder's model in eval mode, quantized as `kind` says."""
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    extra = {} if kind is None else {"quantization_config": settings(kind, dtype), "device_map": "cpu"}
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=dtype, **extra)
    return model.eval()


def dequantized(folder: Path, kind: str, dtype: torch.dtype = torch.float32, classifier: bool = False) -> PreTrainedModel:
    """The float model whose weights are what the quantized ones mean, rounded to `dtype` once."""
    quantized, plain = load(folder, kind, dtype, classifier), load(folder, None, dtype, classifier)
    modules = dict(quantized.named_modules())
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(_meaning(modules[name]))
    return plain


def _meaning(module: Any) -> Tensor:
    weight = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        return weight.data.float() * (weight.SCB[:, None] / 127)
    return weight.dequantize() if hasattr(weight, "dequantize") and type(weight.data) is not Tensor else weight


def frozen_bits(base: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of everything that the base would save."""
    return {name: value.detach().clone() for name, value in base.state_dict().items() if isinstance(value, Tensor)}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two copies of `frozen_bits` are equal bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(_plain(actual[name]), _plain(value)), name


def _plain(value: Tensor) -> Tensor:
    return value if type(value) is Tensor or not hasattr(value, "dequantize") else value.dequantize()
