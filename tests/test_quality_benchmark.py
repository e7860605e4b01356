"""The quality benchmark: exact match without generation, the contenders' sizes, the choice of a rate."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.quality.methods import build
from benchmarks.quality.run import load_base, path_of
from benchmarks.quality.scoring import score
from benchmarks.quality.sweep import GRID, chosen_rate
from benchmarks.quality.tasks import BASE, Shortener, code_of, functions, signature, summary, without_leaks
from benchmarks.quality.training import IGNORE, Settings, collate, encode, in_order

PROMPTS = ("The red ball was in the kitchen", "words: apple pear plum\nnumber 2:", "def close(self):\n    ")


def continuations() -> list[dict[str, str]]:
    """What the base itself writes after each prompt, as text that is tokenized as it was written; the last one spoiled."""
    tokenizer, base = AutoTokenizer.from_pretrained(BASE), load_base()
    examples = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        written = base.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        examples.append({"prompt": prompt, "completion": written.tolist()})
    return examples


def test_exact_match_is_what_greedy_decoding_writes() -> None:
    tokenizer, base = AutoTokenizer.from_pretrained(BASE), load_base()
    rows = []
    for example in continuations():
        prompt = tokenizer(example["prompt"])["input_ids"]
        rows.append({"input_ids": prompt + example["completion"], "labels": [IGNORE] * len(prompt) + example["completion"]})
    rows[-1]["input_ids"][-1] = rows[-1]["labels"][-1] = (rows[-1]["labels"][-1] + 1) % 3072
    scores = score(base, lambda inputs: (base(**inputs).logits, base(**inputs).logits), rows)
    assert scores["exact"] == scores["detached_exact"] == pytest.approx(2 / 3)
    assert scores["agreement"] == 1.0


def test_loss_is_the_models_own_over_completions() -> None:
    tokenizer, base = AutoTokenizer.from_pretrained(BASE), load_base()
    rows = [encode({"prompt": p, "completion": " a b"}, tokenizer) for p in PROMPTS]
    inputs = collate(rows)
    assert score(base, lambda i: (base(**i).logits, None), rows)["loss"] == pytest.approx(
        base(**inputs).loss.item(), abs=1e-5
    )
    assert int(inputs["labels"].ne(IGNORE).sum()) == 3 * (len(tokenizer(" a b")["input_ids"]) + 1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks by that name
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "peft-shadow", "ours", "ours-pretrained", "ours+lora"])
def test_contenders_have_one_size_and_change_nothing_at_the_start(method: str) -> None:
    contender, base = build(method, load_base(), seed=0), load_base()
    inputs = {"input_ids": torch.arange(20, 40)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    with torch.no_grad():
        logits, _ = contender.logits(inputs)
        torch.testing.assert_close(logits, base(**inputs).logits, atol=2e-4, rtol=1e-4)


def test_every_method_reads_the_same_rows_in_the_same_order() -> None:
    rows = [{"input_ids": [i], "labels": [i]} for i in range(10)]
    settings = Settings(steps=3, batch=5)
    assert in_order(rows, settings, 1) == in_order(rows, settings, 1) != in_order(rows, settings, 2)
    assert len(in_order(rows, settings, 1)) == 15


def test_tasks_read_functions() -> None:
    source = 'def add(a, b=1):\n    """Add two numbers together."""\n    return a + b\n'
    (node,), cut = functions(source), Shortener()
    assert signature(node, "", cut) == {"prompt": '"""Add two numbers together."""\ndef add(', "completion": "a, b=1):"}
    assert code_of(node) == "def add(a, b=1):\n    return a + b"
    made = summary(node, "", cut)
    assert made is not None
    assert made["completion"] == "Add two numbers together."
    assert "Add two" not in made["prompt"]
    assert without_leaks({"train": [made], "dev": [{**made, "prompt": "other"}], "test": []}, "summary")["dev"] == []


def test_rate_with_the_lowest_mean_loss_on_dev(tmp_path: Path) -> None:
    assert chosen_rate("lora", tmp_path) is None
    losses = {("robot", GRID[0]): 1.0, ("signature", GRID[0]): 1.0, ("robot", GRID[1]): 0.5, ("signature", GRID[1]): 1.6}
    for (task, rate), loss in losses.items():
        path_of("lora", task, 0, rate, tmp_path).write_text(json.dumps({"dev": {"loss": loss}}))
    assert chosen_rate("lora", tmp_path) == GRID[0]
    path_of("lora", "robot", 0, GRID[2], tmp_path).write_text(json.dumps({"dev": {"loss": 0.1}}))
    assert chosen_rate("lora", tmp_path) == GRID[0]  # not run on both tasks


def test_a_pretrained_shadow_is_trained_at_a_rate_of_its_own() -> None:
    contender = build("ours-pretrained", load_base(), seed=0)
    rest, backbone = contender.groups(1e-2)
    assert (rest["lr"], backbone["lr"]) == (1e-2, pytest.approx(3e-3))
    assert {id(p) for p in backbone["params"]} == {id(p) for p in contender.model.peft_model.shadow_model.parameters()}
    assert sum(p.numel() for group in (rest, backbone) for p in group["params"]) == contender.trainable
    (alone,) = build("ours", load_base(), seed=0).groups(1e-2)
    assert alone["lr"] == 1e-2
