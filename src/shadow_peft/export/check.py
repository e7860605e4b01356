"""Whether an exported shadow answers as it should: the greedy answers of two models to the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

Answer = Callable[[list[int], int], list[int]]
"""(token ids of a prompt, most tokens) -> token ids of the greedy answer."""


@dataclass(frozen=True)
class Agreement:
    """How many of the prompts had the same whole answer, and the indices of the others."""

    same: int
    prompts: int
    others: tuple[int, ...]


def agreement(expected: Answer, seen: Answer, prompts: Sequence[list[int]], tokens: int, ends: Collection[int]) -> Agreement:
    """Compare two models.

    Args:
        expected: answers as it should be.
        seen: answers of the model that is checked.
        prompts: token ids of each prompt.
        tokens: most tokens of an answer.
        ends: tokens that end an answer; runtimes differ in whether they give them back.
    """
    others = tuple(
        index
        for index, prompt in enumerate(prompts)
        if _without(ends, expected(prompt, tokens)) != _without(ends, seen(prompt, tokens))
    )
    return Agreement(len(prompts) - len(others), len(prompts), others)


def generates(model: PreTrainedModel) -> Answer:
    """Greedy answers of a causal language model of transformers, with its cache."""

    @torch.no_grad()
    def answer(prompt: list[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        own: Any = model.generation_config
        pad = own.pad_token_id if own.pad_token_id is not None else 0
        config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=own.eos_token_id, pad_token_id=pad)
        output: Any = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return list(output[0, len(prompt) :].tolist())

    return answer


def classifies(model: PreTrainedModel) -> Answer:
    """The most likely class of a text as the one token of an answer."""

    @torch.no_grad()
    def answer(prompt: list[int], _: int) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        return [int(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].argmax())]

    return answer


def ends_of(model: PreTrainedModel) -> set[int]:
    """Tokens that end an answer of a causal language model."""
    config: Any = model.generation_config
    ends = config.eos_token_id
    return set(ends) if isinstance(ends, list) else {token for token in (ends,) if token is not None}


def _without(ends: Collection[int], answer: list[int]) -> list[int]:
    return [token for token in answer if token not in ends]
