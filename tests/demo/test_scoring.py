"""Scoring: exact lines, fields, and the loss of the right lines."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from shadow_peft.demo.robot_commands import Command, commands
from shadow_peft.demo.scoring import completion_loss, fields_right, score
from tests.cli.conftest import tiny_tokenizer
from tests.tiny_models import llama

COMMAND = Command("open the door", "open", "door", None, None)


@pytest.mark.parametrize(
    ("line", "share"),
    [
        (COMMAND.completion.strip(), 1.0),
        ('{"action": "open", "object": "window", "place": null, "manner": null}', 0.75),
        ('{"action": "open", "object": "door"}', 0.5),
        ("{}", 0.0),
        ("[1]", 0.0),
        ('{"action": "open"', 0.0),
        ("", 0.0),
    ],
)
def test_fields_right(line: str, share: float) -> None:
    assert fields_right(COMMAND, line) == share


def test_completion_loss_is_the_mean_over_completion_tokens() -> None:
    model, tokenizer, drawn = llama(vocab_size=300), tiny_tokenizer(), commands("train", 5)
    total, count = 0.0, 0
    for command in drawn:
        prompt, line = (tokenizer(text)["input_ids"] for text in (command.prompt, command.completion + "<eos>"))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + line])).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(line), reduction="sum"))
        count += len(line)
    assert completion_loss(model, tokenizer, drawn) == pytest.approx(total / count, rel=1e-5)


def test_score_of_a_model_that_knows_nothing() -> None:
    drawn = commands("test", 3)
    heard: list[tuple[int, int]] = []
    scores = score(
        llama(vocab_size=300, eos_token_id=1), tiny_tokenizer(), drawn, lambda done, total: heard.append((done, total))
    )
    assert heard == [(3, 3)]
    assert scores.exact_match == 0.0
    assert scores.fields == 0.0
    assert scores.loss > 4
    assert len(scores.answers) == 3


def test_score_counts_right_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = commands("test", 4)
    right = {c.prompt: c.completion.strip() for c in drawn[:2]}
    monkeypatch.setattr(
        "shadow_peft.demo.scoring.answer", lambda model, tokenizer, prompts: [right.get(p, "{}") for p in prompts]
    )
    scores = score(llama(vocab_size=300), tiny_tokenizer(), drawn, print)
    assert scores.exact_match == 0.5
    assert scores.fields == 0.5
