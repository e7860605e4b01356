"""A stock model with weights of few bits: a folder that transformers loads where the package that stored them is installed.

    int8   torchao: integers of 8 bits, one float scale a row
    nf4    bitsandbytes: 4 bits, the codes of NormalFloat4, one scale for 64 weights

The linear maps of the layers are stored so; embeddings, norms and head stay floats, and so do activations. Integers of 4
bits are not offered: of torchao's forms, those that transformers saves hold 8 bits each, or need a GPU.
"""

from __future__ import annotations

import tempfile
from typing import Any, Literal

from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from shadow_peft.export.runtimes import CannotExport, require

Quantization = Literal["int8", "nf4"]
PACKAGES: dict[Quantization, str] = {"int8": "torchao", "nf4": "bitsandbytes"}


def quantized(model: PreTrainedModel, to: Quantization) -> PreTrainedModel:
    """A copy of a causal language model with weights of few bits.

    Raises:
        CannotExport: the package is not installed, or the model is a classifier.
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
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=model.dtype)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))
