"""The embedded models of `shadow-peft demo`: a base of 4 million parameters, and a shadow of three layers.

`scripts/pretrain_demo_base.py` trained the base on text. `scripts/pretrain_demo_shadow.py` initialised the shadow from the
base and trained it on the same text. Both are stock Llamas; the shadow uses the base's embedding table.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.backbone.explicit import prepare_shadow_model

BASE_PATH = Path(__file__).parent / "base"
SHADOW_PATH = Path(__file__).parent / "shadow"


def load_base(path: Path = BASE_PATH) -> PreTrainedModel:
    """The base in float32 on the CPU, not frozen yet."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model


def load_shadow(path: Path = SHADOW_PATH) -> PreTrainedModel:
    """The pretrained shadow in float32, to be passed to `get_shadow_model`; it is fed the base's embeddings."""
    return prepare_shadow_model(load_base(path), remove_embed_tokens=True)


def load_tokenizer(path: Path = BASE_PATH) -> PreTrainedTokenizerBase:
    """The base's byte-level BPE, which pads on the left."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return tokenizer
