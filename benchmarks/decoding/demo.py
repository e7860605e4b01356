"""Greedy decoding of the demo's task: bare base, base + shadow, base + shadow drafting; interleaved, medians and ratios.

    shadow-peft demo --output shadow-demo
    python -m benchmarks.decoding.demo shadow-demo/adapter [results.json]

Acceptance is that of the trained shadow. All paths write the same number of tokens: the bare base is held to the length of
the adapted model's answers. One thread; compare the ratios, not the seconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, logging

from benchmarks.decoding.run import machine
from shadow_peft import ShadowForCausalLM
from shadow_peft.demo.embedded import load_base, load_tokenizer
from shadow_peft.demo.robot_commands import commands
from shadow_peft.generation.drafting import DraftStatistics

COMMANDS, ROUNDS = 32, 5
NAMES = ("bare base", "ours", "ours, drafting")


def timed(run: Callable[[], Tensor]) -> float:
    """Seconds that a run takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def added(total: DraftStatistics, more: DraftStatistics) -> None:
    """Count what became of another generation's drafts."""
    total.base_passes += more.base_passes
    total.drafted += more.drafted
    total.accepted += more.accepted


def measure(model: ShadowForCausalLM, bare: PreTrainedModel, batch: int) -> dict[str, Any]:
    """Milliseconds per step of every path, ratios to the bare base, and what became of the drafts."""
    tokenizer, total = load_tokenizer(), DraftStatistics()
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    prompts = [command.prompt for command in commands("test", COMMANDS, 0)]
    for start in range(0, COMMANDS, batch):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True, return_token_type_ids=False)
        greedy = {**inputs, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, "max_new_tokens": 48}
        drafted = model.generate(**greedy, use_shadow_draft=True, return_dict_in_generate=True)
        answer = model.generate(**greedy)
        assert torch.equal(drafted.sequences, answer)
        added(total, drafted.draft_statistics)
        written = answer.shape[1] - inputs["input_ids"].shape[1]
        held = {**greedy, "min_new_tokens": written, "max_new_tokens": written}
        paths = (
            partial(bare.generate, **held),
            partial(model.generate, **greedy),
            partial(model.generate, **greedy, use_shadow_draft=True),
        )
        for _ in range(ROUNDS):
            for name, path in zip(NAMES, paths, strict=True):
                seconds[name].append(timed(path) / written)
    bare_seconds = seconds["bare base"]
    ratios = {name: statistics.median(a / b for a, b in zip(s, bare_seconds, strict=True)) for name, s in seconds.items()}
    return {
        "milliseconds_per_token": {name: round(1000 * statistics.median(values), 2) for name, values in seconds.items()},
        "ratio_to_bare_base": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "acceptance_rate": round(total.acceptance_rate, 3),
        "tokens_per_base_pass": round(total.tokens_per_base_pass, 2),
    }


def main(adapter: str) -> dict[str, Any]:
    """Batch 1 and 8, and where they were measured."""
    torch.set_num_threads(1)
    bare, model = load_base().eval(), ShadowForCausalLM.from_pretrained(load_base().eval(), adapter)
    rows = {f"batch {batch}": measure(model, bare, batch) for batch in (1, 8)}
    return {**rows, "commands": COMMANDS, "rounds": ROUNDS, "threads": 1, "machine": machine()}


if __name__ == "__main__":
    logging.set_verbosity_error()
    results = json.dumps(main(sys.argv[1]), indent=1)
    print(results)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(results + "\n", encoding="utf-8")
