"""Scores answers: exact match, share of right fields, and the loss of the right answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.cascade.outcomes import json_fields
from shadow_peft.demo.robot_commands import Command
from shadow_peft.losses.language_modeling import next_token_loss, shifted
from shadow_peft.losses.reduction import IGNORE_INDEX

BATCH = 50
LONGEST_ANSWER = 64


@dataclass(frozen=True)
class Scores:
    """The scores of one model on a list of commands.

    Attributes:
        exact_match: share of commands whose whole answer is right, in [0, 1].
        fields: share of the four fields that are right, in [0, 1]; an answer that is no JSON counts 0.
        loss: cross entropy of the right answer, nats per token.
        answers: the answers in the order of the commands.
    """

    exact_match: float
    fields: float
    loss: float
    answers: list[str]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    commands: Sequence[Command],
    report: Callable[[int, int], object],
) -> Scores:
    """Generate answers greedily and score them; `report` gets how many of how many are written after each batch."""
    model.eval()
    written: list[str] = []
    for batch in _batches(commands):
        written += answer(model, tokenizer, [command.prompt for command in batch])
        report(len(written), len(commands))
    pairs = list(zip(commands, written, strict=True))
    exact = sum(line == command.completion.strip() for command, line in pairs) / len(pairs)
    fields = sum(fields_right(command, line) for command, line in pairs) / len(pairs)
    return Scores(exact, fields, completion_loss(model, tokenizer, commands), written)


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """The greedy continuations of prompts, without surrounding whitespace."""
    inputs = _encode(tokenizer, prompts)
    tokens = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [line.strip() for line in tokenizer.batch_decode(new, skip_special_tokens=True)]


def fields_right(command: Command, line: str) -> float:
    """Share of the command's four fields that are right in an answer; 0 if it is no JSON object."""
    return json_fields(line, command.completion)


@torch.no_grad()
def completion_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, commands: Sequence[Command]) -> float:
    """Mean cross entropy of the right answers and their end token, nats per token."""
    total, count = 0.0, 0
    for batch in _batches(commands):
        inputs = _encode(tokenizer, [c.prompt + c.completion + str(tokenizer.eos_token) for c in batch])
        targets = shifted(_labels(tokenizer, inputs, batch))
        here = int(targets.ne(IGNORE_INDEX).sum())
        total += float(next_token_loss(model(**inputs).logits, targets)) * here
        count += here
    return total / count


def _labels(tokenizer: PreTrainedTokenizerBase, inputs: BatchEncoding, batch: Sequence[Command]) -> torch.Tensor:
    """Labels `[B, T]`, left-padded: the input ids of the completions, all else ignored."""
    ends = [c.completion + str(tokenizer.eos_token) for c in batch]
    lengths = torch.tensor([len(ids) for ids in tokenizer(ends)["input_ids"]])
    ids: torch.Tensor = inputs["input_ids"]
    behind = ids.shape[1] - torch.arange(ids.shape[1])
    return ids.masked_fill(behind > lengths[:, None], IGNORE_INDEX)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> BatchEncoding:
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)


def _batches(commands: Sequence[Command]) -> Iterator[Sequence[Command]]:
    for start in range(0, len(commands), BATCH):
        yield commands[start : start + BATCH]
