"""A tiny base with its tokenizer, and a corpus of two files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.cli.conftest import model_folder, seeded, tiny_tokenizer

__all__ = ["model_folder", "seeded", "tiny_tokenizer"]

WORDS = "the red robot takes a small box from table to shelf and then puts it back on warm ground near door"


def documents(count: int, seed: int) -> list[str]:
    """Sentences of random words, 5 to 40 each."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS.split(), k=rng.randint(5, 40))) for _ in range(count)]


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of lines `{"text": ...}`, 60 and 20 documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, count, seed in (("a", 60, 1), ("b", 20, 2)):
        lines = [json.dumps({"text": text}) for text in documents(count, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
