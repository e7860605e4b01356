"""A tiny random base and tiny tasks in place of everything that is fetched, to try the harness out. No figure of it counts.

python -m benchmarks.quality.real.toy FOLDER        then SHADOW_BENCHMARK_CACHE=FOLDER for what shall use it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.quality.real.tasks import CLASSIFICATION, TASKS
from benchmarks.quality.tasks import BASE

SIZES = {"train": 16, "dev": 6, "test": 6}
WORDS = "red green blue small large open closed first second third"
LAYERS, WIDTH = 3, 64


def make(folder: Path) -> Path:
    """A cache as `benchmarks.quality.real.packages.cache` names it; what is there already is kept."""
    if not (folder / "smollm2-135m").exists():
        save_base(folder / "smollm2-135m")
    for task in TASKS:
        write(folder, task, {split: [example(task, split, n) for n in range(size)] for split, size in SIZES.items()})
    write(folder, "wikipedia", [f"A passage of words, {word} among them." for word in WORDS.split()[:2]])
    return folder


def save_base(folder: Path) -> None:
    """A random Llama in bfloat16 with the tokenizer of the demo's base."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=1024, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def example(task: str, split: str, number: int) -> dict[str, object]:
    """A prompt that tells the answer."""
    words = WORDS.split()
    word = words[number % len(words)]
    prompt = f"{split} {number} is {word}"
    return (
        {"prompt": prompt, "label": number % 2} if task in CLASSIFICATION else {"prompt": prompt, "completion": f" {word}"}
    )


def write(folder: Path, name: str, content: object) -> None:
    """The text of a task, where the harness looks for it."""
    path = folder / "tasks" / name / "content.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
