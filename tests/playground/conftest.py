"""A tiny model with an adapter that shows, and its tokenizer."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from shadow_peft import ShadowForCausalLM
from tests.cli.conftest import TEMPLATE, tiny_tokenizer
from tests.tiny_models import causal_lm, qwen3


@pytest.fixture(scope="module")
def model() -> ShadowForCausalLM:
    return causal_lm(qwen3(vocab_size=300, eos_token_id=1, bos_token_id=None), variant="readout")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made
