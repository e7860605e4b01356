"""A stock model with weights of few bits: a folder that transformers loads where the package that stored them is installed.

    int8   torchao: integers of 8 bits, one float scale a row
    nf4    bitsandbytes: 4 bits, the codes of NormalFloat4, one scale for 64 weights of a row

The linear layers of the decoder are stored so; embeddings, norms and head stay floats, and so do activations. As nf4, only
those are that have blocks of 64 weights in rows and blocks of 32 rows, since bitsandbytes runs no others on every CPU.
Integers of 4 bits are not offered: of torchao's forms, those that transformers saves hold 8 bits each, or need a GPU.
"""

from __future__ import annotations

import tempfile
from typing import Any, Literal

from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from shadow_peft.export.runtimes import CannotExport, require

Quantization = Literal["int8", "nf4"]
NF4_BLOCK = (32, 64)
"""Rows, and weights in a row, of which a linear layer must have a multiple to be stored as nf4."""

PACKAGES: dict[Quantization, str] = {"int8": "torchao", "nf4": "bitsandbytes"}


def quantized(model: PreTrainedModel, to: Quantization) -> PreTrainedModel:
    """A copy of a causal language model with weights of few bits.

    Raises:
        CannotExport: the package is not installed, the model is a classifier, or no layer can be stored so.
    """
    require("quantized", (PACKAGES[to],))
    if model.get_output_embeddings() is None:
        raise CannotExport("only language models are quantized, no classifiers")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.dtype, quantization_config=_config(to, model), device_map="cpu"
        )
    return loaded.eval()


def _config(to: Quantization, model: PreTrainedModel) -> Any:
    if to == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=model.dtype,
            llm_int8_skip_modules=_without_nf4(model),
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def _without_nf4(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that stay floats.

    Raises:
        CannotExport: all of them do.
    """
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    rows, columns = NF4_BLOCK
    floats = [name for name, m in linears.items() if m is head or m.out_features % rows or m.in_features % columns]
    if len(floats) == len(linears):
        raise CannotExport(f"no layer of this model is a multiple of {rows} x {columns} weights")
    return floats
