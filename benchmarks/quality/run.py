"""One run: a method, a task, a seed and a learning rate in, one JSON out; nothing is done where that JSON exists.

    python -m benchmarks.quality.run --method lora --task robot --seed 0 --lr 3e-3
    python -m benchmarks.quality.run --base smollm2 --help      the comparison on a real base, see `benchmarks.quality.real`

Needs torch, transformers and peft alone, and for the shadows the package that is meant.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from benchmarks.quality.methods import METHODS, Contender, build
from benchmarks.quality.scoring import score
from benchmarks.quality.tasks import BASE, ROOT, TASKS, read
from benchmarks.quality.training import Row, Settings, encode, train

RESULTS = ROOT / "benchmarks/results/quality-demo"
FORMER = ROOT / "benchmarks/results/quality"
"""The results of the demo's former base, which had 3 M parameters."""
FORGETTING_ROWS, FORGETTING_TOKENS = 60, 128


def path_of(method: str, task: str, seed: int, rate: float, folder: Path = RESULTS) -> Path:
    """Where a run's JSON stands."""
    return folder / f"{method}--{task}--s{seed}--lr{rate:g}.json"


def load_base() -> PreTrainedModel:
    """The base in float32."""
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return base.requires_grad_(False)


def text_rows(tokenizer: Any) -> list[Row]:
    """Blocks of text that is like the pretraining's, every token a target."""
    stream = [
        i for text in read("forgetting") for i in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    ]
    starts = range(0, min(len(stream) - FORGETTING_TOKENS, FORGETTING_ROWS * FORGETTING_TOKENS), FORGETTING_TOKENS)
    blocks = [stream[start : start + FORGETTING_TOKENS] for start in starts]
    return [{"input_ids": block, "labels": block} for block in blocks]


def run(
    task: str,
    seed: int,
    rate: float,
    make: Callable[[PreTrainedModel], Contender],
    settings: Settings,
    dev_only: bool = False,
) -> dict[str, Any]:
    """Train and score a contender; `dev_only` leaves test and forgetting out."""
    torch.set_num_threads(1)
    tokenizer, base = AutoTokenizer.from_pretrained(BASE), load_base()
    splits = {split: [encode(e, tokenizer) for e in examples] for split, examples in read(task).items()}
    text = text_rows(tokenizer)
    before = 0.0 if dev_only else score(base, lambda inputs: (base(**inputs).logits, None), text)["loss"]
    contender = make(base)
    cost = train(contender.model, splits["train"], settings, rate, seed, contender.groups(rate))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    asked = ("dev",) if dev_only else ("dev", "test")
    scores = {split: score(contender.model, contender.logits, splits[split]) for split in asked}
    after = 0.0 if dev_only else score(contender.model, contender.logits, text)["loss"]
    return {
        "task": task, "seed": seed, "lr": rate, **scores,
        "forgetting": {"before": before, "after": after}, "trainable": contender.trainable, **asdict(cost),
        "peak_memory_mb": round(peak), "settings": asdict(settings), "machine": machine(),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Where a run was made, and with what."""
    packages = {}
    for name in ("torch", "transformers", "peft", "shadow-peft"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "none"
    facts = {"platform": platform.platform(), "python": platform.python_version(), "load": round(os.getloadavg()[0], 1)}
    return {**facts, **packages}


def quiet() -> None:
    """Neither bars nor advice."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def main() -> None:
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--base", choices=("demo", "smollm2"), default="demo", help="The base of the comparison.")
    chosen, words = chooser.parse_known_args()
    if chosen.base == "smollm2":
        from benchmarks.quality.real import run as real

        quiet()
        sys.exit(real.main(words))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[chooser]
    )
    parser.add_argument("--method", required=True, choices=sorted(METHODS))
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    path = path_of(asked.method, asked.task, asked.seed, asked.lr, asked.out)
    if path.exists():
        return
    quiet()
    result = run(
        asked.task, asked.seed, asked.lr, lambda base: build(asked.method, base, asked.seed), Settings(steps=asked.steps)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"method": asked.method, **result}, indent=1) + "\n", encoding="utf-8")
    print(path.stem, json.dumps(result["dev"]), f"{result['trainable']:,} {result['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
