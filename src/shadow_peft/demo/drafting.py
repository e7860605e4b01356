"""What drafting is worth: answers written one at a time, drafted by the shadow, beside the bare base."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadow_peft.demo.robot_commands import Command
from shadow_peft.demo.scoring import LONGEST_ANSWER
from shadow_peft.tasks.causal_lm import ShadowForCausalLM


@dataclass(frozen=True)
class Drafting:
    """Greedy decoding at batch size 1.

    Attributes:
        tokens_per_pass: tokens written for one pass of the base.
        speed: tokens per second with drafts, in units of the bare base's; both write answers of the same lengths.
    """

    tokens_per_pass: float
    speed: float


@torch.no_grad()
def measure_drafting(
    model: ShadowForCausalLM, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, commands: Sequence[Command]
) -> Drafting:
    """Answer commands with drafts, and with the bare base, in turns; the first command warms up."""
    model.eval()
    tokens = passes = 0
    drafted_seconds = bare_seconds = 0.0
    for index, command in enumerate(commands):
        inputs = tokenizer(command.prompt, return_tensors="pt", return_token_type_ids=False)
        options = {**inputs, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        started = time.process_time()
        output = model.generate(
            **options, max_new_tokens=LONGEST_ANSWER, use_shadow_draft=True, return_dict_in_generate=True
        )
        ended = time.process_time()
        written = output.sequences.shape[1] - inputs["input_ids"].shape[1]
        base.generate(**options, max_new_tokens=written, min_new_tokens=written)
        if index:
            drafted_seconds += ended - started
            bare_seconds += time.process_time() - ended
            tokens += written
            passes += output.draft_statistics.base_passes
    return Drafting(tokens / passes, bare_seconds / drafted_seconds)
