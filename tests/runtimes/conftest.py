"""A tiny stock model with a tokenizer, as it comes out of folding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from shadow_peft.export.runtimes import Source
from tests.cli.conftest import tiny_tokenizer
from tests.tiny_models import llama

TEXTS = ("say 1:", "bring the red cup, please", "12 cups\n\nand 345", "text: it's a dog keys: action\n")


def digits_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that takes digits one by one, as the demo's does."""
    tokenizer = tiny_tokenizer()
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


def tiny_source(folder: Path, seed: int = 0, **sizes: int) -> Source:
    """A Llama whose greedy answers change from token to token."""
    model = llama(seed, vocab_size=300, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False, **sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    tokenizer = digits_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Source(model, tokenizer, folder)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return tiny_source(tmp_path_factory.mktemp("tiny-source"))


@pytest.fixture(scope="session")
def prompts(source: Source) -> list[list[int]]:
    return [list(source.tokenizer(text)["input_ids"]) for text in TEXTS]
