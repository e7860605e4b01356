"""Greedy decoding of the demo's task: bare base, base + shadow, base + shadow drafting; interleaved, medians and ratios.

    shadow-peft demo --output shadow-demo
    OMP_NUM_THREADS=1 python benchmarks/draft_demo.py shadow-demo/adapter [results.json]

Every path writes the same number of tokens per command: the base is held to the length of the adapted model's answer. One
machine, one run: compare the ratios, not the seconds.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import logging

from shadow_peft import ShadowForCausalLM
from shadow_peft.demo.embedded import load_base, load_tokenizer
from shadow_peft.demo.robot_commands import commands
from shadow_peft.drafting import DraftStatistics

COMMANDS, ROUNDS = 30, 3


def timed(run: Callable[[], Tensor]) -> float:
    """Seconds that a run takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main(adapter: str) -> dict[str, object]:
    """Seconds per token of every path and what became of the drafts."""
    tokenizer, bare = load_tokenizer(), load_base().eval()
    model = ShadowForCausalLM.from_pretrained(load_base().eval(), adapter)
    seconds: dict[str, list[float]] = {"bare base": [], "base + shadow": [], "base + shadow, drafting": []}
    total = DraftStatistics()
    for command in commands("test", COMMANDS, 0):
        inputs = tokenizer(command.prompt, return_tensors="pt", return_token_type_ids=False)
        greedy = {**inputs, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, "max_new_tokens": 48}
        drafting = {**greedy, "use_shadow_draft": True}
        drafted = model.generate(**drafting, return_dict_in_generate=True)
        answer = model.generate(**greedy)
        assert torch.equal(drafted.sequences, answer)
        written = answer.shape[1] - inputs["input_ids"].shape[1]
        total.drafted += drafted.draft_statistics.drafted
        total.accepted += drafted.draft_statistics.accepted
        total.base_passes += drafted.draft_statistics.base_passes
        held = {**greedy, "min_new_tokens": written, "max_new_tokens": written}
        paths = (partial(bare.generate, **held), partial(model.generate, **greedy), partial(model.generate, **drafting))
        for _ in range(ROUNDS):
            for name, path in zip(seconds, paths, strict=True):
                seconds[name].append(timed(path) / written)
    return report(seconds, total)


def report(seconds: dict[str, list[float]], total: DraftStatistics) -> dict[str, object]:
    """Medians, ratios to the bare base, counts, and where they were measured."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "milliseconds_per_token": {name: round(1000 * value, 2) for name, value in medians.items()},
        "ratio_to_bare_base": {name: round(value / medians["bare base"], 3) for name, value in medians.items()},
        "acceptance_rate": round(total.acceptance_rate, 3),
        "tokens_per_base_pass": round(total.tokens_per_base_pass, 2),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


if __name__ == "__main__":
    logging.set_verbosity_error()
    results = json.dumps(main(sys.argv[1]), indent=1)
    print(results)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(results + "\n", encoding="utf-8")
