"""The embedded base: a stock Llama of 3 million parameters, pretrained by `scripts/pretrain_demo_base.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

BASE_PATH = Path(__file__).parent / "base"


def load_base(path: Path = BASE_PATH) -> PreTrainedModel:
    """The base in float32 on the CPU, frozen by nobody yet."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model


def load_tokenizer(path: Path = BASE_PATH) -> PreTrainedTokenizerBase:
    """The base's byte-level BPE, which pads on the left."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return tokenizer
