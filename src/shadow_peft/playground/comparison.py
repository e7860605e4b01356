"""The four answers to one prompt, and what base and shadow think of each token of an answer.

base        the bare base, its adapter switched off
attached    the adapted base
detached    the shadow alone; no layer of the base runs
drafted     the shadow drafts and the adapted base verifies: the attached answer in fewer passes
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from shadow_peft.outputs import InferenceMode
from shadow_peft.tasks.causal_lm import ShadowForCausalLM

NAMES = ("base", "attached", "detached", "drafted")


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        name: one of `NAMES`.
        text: what was added to the prompt, without special tokens.
        ids: its tokens `[N]`, special ones included.
        seconds: wall-clock time of the generation, the pass over the prompt included.
        base_passes: passes of the base; None where there is no answer.
        problem: why there is no answer; else None.
    """

    name: str
    text: str
    ids: Tensor
    seconds: float
    base_passes: int | None = None
    problem: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of wall-clock time."""
        return len(self.ids) / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Guess:
    """The likeliest next token of a network, and the probability that it gives the token that was written."""

    id: int
    token: str
    of_written: float


@dataclass(frozen=True)
class Opinion:
    """What the adapted base and the shadow, each having read all before it, think of one written token."""

    token: str
    base: Guess
    shadow: Guess

    @property
    def agrees(self) -> bool:
        """Whether both find the same token likeliest."""
        return self.base.id == self.shadow.id


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, device: Any) -> BatchEncoding:
    """The tokens of a prompt, as it stands or as a user's message.

    Raises:
        ValueError: there is none.
    """
    if chat:
        talk = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, add_special_tokens=not chat)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("The prompt is empty: there is nothing to continue.")
    return inputs.to(device)


def warm_up(model: ShadowForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Answer once and forget it: what happens in a first generation alone must not count against the first answer."""
    for _ in answers(model, tokenizer, encoded(tokenizer, "Hello", False, model.device), 8):
        pass


def answers(
    model: ShadowForCausalLM, tokenizer: PreTrainedTokenizerBase, inputs: BatchEncoding, max_new_tokens: int
) -> Iterator[Answer]:
    """The four greedy answers, in the order of `NAMES`, each as soon as it is there.

    The model's mode is the same afterwards. Two of these must not run at once on one model.
    """
    for name in NAMES:
        yield _answer(name, model, tokenizer, inputs, max_new_tokens)


@torch.no_grad()
def _answer(
    name: str, model: ShadowForCausalLM, tokenizer: PreTrainedTokenizerBase, inputs: BatchEncoding, max_new_tokens: int
) -> Answer:
    config = copy.deepcopy(model.generation_config)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config.update(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=True)
    config.update(temperature=None, top_p=None, top_k=None)  # they draw tokens, and here the likeliest is taken
    config.use_shadow_draft = True if name == "drafted" else None
    before = model.inference_mode
    mode: InferenceMode = "shadow_only" if name == "detached" else "base_shadow"
    model.set_inference_mode(mode)
    started = time.perf_counter()
    try:
        with model.disable_adapter() if name == "base" else nullcontext():
            output: Any = model.generate(**inputs, generation_config=config)
    except ValueError as error:  # such as a cache that drafting cannot crop
        return Answer(name, "", inputs["input_ids"].new_empty(0), 0.0, problem=str(error))
    finally:
        model.set_inference_mode(before)
    seconds = time.perf_counter() - started
    ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    statistics = output.get("draft_statistics")
    passes = statistics.base_passes if statistics is not None else {"detached": 0}.get(name, len(ids))
    return Answer(name, tokenizer.decode(ids, skip_special_tokens=True), ids, seconds, passes)


@torch.no_grad()
def opinions(
    model: ShadowForCausalLM, tokenizer: PreTrainedTokenizerBase, inputs: BatchEncoding, ids: Tensor
) -> list[Opinion]:
    """What adapted base and shadow think of each token of an answer, from one pass over prompt and answer.

    Args:
        model: the adapted base with its shadow.
        tokenizer: its tokenizer.
        inputs: the prompt.
        ids: the answer's tokens `[N]`.
    """
    tokens = torch.cat([inputs["input_ids"], ids[None]], dim=1)
    before = model.inference_mode
    model.set_inference_mode("base_shadow")
    try:
        outputs = model(input_ids=tokens)
    finally:
        model.set_inference_mode(before)
    first = inputs["input_ids"].shape[1] - 1  # the position that predicts the answer's first token
    of_base = _guesses(outputs.logits[0, first:-1], ids, tokenizer)
    of_shadow = _guesses(outputs.shadow_logits[0, first:-1], ids, tokenizer)
    written = [tokenizer.decode([token]) for token in ids.tolist()]
    return [Opinion(*parts) for parts in zip(written, of_base, of_shadow, strict=True)]


def _guesses(logits: Tensor, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[Guess]:
    """The guesses of logits `[N, V]` about tokens `[N]`."""
    probabilities = logits.float().softmax(dim=-1)
    of_written = probabilities.gather(1, ids[:, None])[:, 0].tolist()
    likeliest = probabilities.argmax(dim=-1).tolist()
    return [Guess(token, tokenizer.decode([token]), p) for token, p in zip(likeliest, of_written, strict=True)]
