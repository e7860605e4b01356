"""A stock model with weights of 8 bits, by torchao: a folder that transformers loads where torchao is installed.

The linear maps of the layers are stored as int8 with a float scale a row; embeddings, norms and head stay floats, and so do
activations.
"""

from __future__ import annotations

import tempfile

from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from shadow_peft.export.runtimes import CannotExport, require


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a causal language model with int8 weights.

    Raises:
        CannotExport: torchao is not installed, or the model is a classifier.
    """
    require("quantized", ("torchao",))
    if model.get_output_embeddings() is None:
        raise CannotExport("only language models are quantized, no classifiers")
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.dtype, quantization_config=config, device_map="cpu"
        )
    return loaded.eval()
