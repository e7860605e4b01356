"""One run on the real base: method, task, seed and rate in, one JSON out; called by `benchmarks.quality.run --base smollm2`.

The JSON has, beside means, the loss and correctness of every test example, so that differences between methods can be
bootstrapped over the same examples. A run that fails leaves its error in `failed/`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import devices
from benchmarks.quality.real import measures, plan, tasks
from benchmarks.quality.real.batches import collate
from benchmarks.quality.real.builder import all_methods, build
from benchmarks.quality.real.contenders import AUTOCAST
from benchmarks.quality.real.packages import PEER, ROOT, cache, fetched
from benchmarks.quality.real.plan import RESULTS, Run
from benchmarks.quality.real.scoring import bare, score
from benchmarks.quality.real.weights import NAME, base_folder, load_base
from benchmarks.quality.training import IGNORE, Settings, train

SETTINGS = Settings(steps=100, batch=8, warmup=5)


def run(wanted: Run, settings: Settings = SETTINGS, device: str = "cpu") -> dict[str, Any]:
    """Train and score a contender."""
    torch.set_num_threads(1)
    tokenizer, classifies = AutoTokenizer.from_pretrained(base_folder()), wanted.task in tasks.CLASSIFICATION
    splits = {split: [tasks.encode(e, tokenizer) for e in found] for split, found in tasks.splits(wanted.task).items()}
    text = [] if classifies else tasks.passage_rows(tokenizer)
    torch.manual_seed(wanted.seed)
    base = load_base(classifies).to(device)
    before = None if classifies else score(bare(base), text)["loss"]
    contender = build(wanted.method, base, wanted.seed)
    first = {name: one.to(device) for name, one in collate(splits["train"][: settings.batch]).items()}
    memory = {one.__name__: one(contender.model, first) for one in (measures.bytes_saved, measures.step_bytes)}
    torch.manual_seed(wanted.seed)  # methods draw different numbers until here
    cost = train(
        contender.model, splits["train"], settings, wanted.rate, wanted.seed, contender.groups(wanted.rate), collate, device
    )
    scores = {split: score(contender, splits[split]) for split in ("dev", "test")}
    after = None if classifies else score(contender, text)["loss"]
    drafts = wanted.method in plan.DRAFTED and wanted.task in tasks.DRAFTED
    return {
        **asdict(wanted), "base": NAME, "precision": precision(wanted.method), **scores,
        "forgetting": {"before": before, "after": after}, "trainable": contender.trainable, **asdict(cost),
        **memory,
        "decoding": measures.decoding(contender.model, base, prompts(splits["test"])) if drafts else None,
        "settings": asdict(settings), "machine": devices.machine(device) | {"load": round(os.getloadavg()[0], 1)},
    }  # fmt: skip


def precision(method: str) -> str:
    """The precision that a method ran in."""
    mixed = "forward under autocast to bfloat16" if method in AUTOCAST else "no autocast"
    return f"base bfloat16, trained parameters float32, {mixed}"


def prompts(rows: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of each row that are no targets."""
    return [[t for t, label in zip(r["input_ids"], r["labels"], strict=True) if label == IGNORE] for r in rows]


def carry_out(wanted: Run, folder: Path, settings: Settings = SETTINGS, device: str = "cpu") -> None:
    """A run and its file, or its error and the file of that."""
    if wanted.method == "shadow-peft-0.1.1":
        sys.path.insert(0, str(fetched(PEER)))  # before anything imports this library, which has the same name
    path = wanted.path(folder)
    try:
        result = run(wanted, settings, device)
    except Exception as error:
        path, result = wanted.failure(folder), {**asdict(wanted), "error": repr(error), "where": traceback.format_exc()}
        print(result["where"], file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(path)
    if "error" not in result:
        test = {name: round(value, 4) for name, value in result["test"].items() if isinstance(value, float)}
        print(path.stem, json.dumps(test), f"{result['trainable']:,} {result['seconds']:.0f} s", flush=True)


def prepare(names: list[str]) -> None:
    """Write tasks that are missing, in a process of its own, since that may import this library."""
    missing = [name for name in names if not (cache() / "tasks" / name).exists()]
    if missing:
        subprocess.run([sys.executable, "-m", "benchmarks.quality.real.tasks", *missing], cwd=ROOT, check=True)


def main(words: list[str]) -> int:
    """The command line; 0 after a run, 1 where none was to be done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.run --base smollm2", description=__doc__)
    parser.add_argument("--next", action="store_true", help="The next run of the plan that is missing and that nobody does.")
    parser.add_argument("--list", action="store_true", help="Only name the runs of the plan that can be told now.")
    parser.add_argument("--method", choices=sorted(all_methods()))
    parser.add_argument("--task", choices=tasks.TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="Fewer, to try it out; with a folder of its own.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="With a folder of its own.")
    asked = parser.parse_args(words)
    if asked.list:
        for wanted in plan.missing(asked.out):
            print(*asdict(wanted).values())
        return 0
    if not asked.next and None in (asked.method, asked.task, asked.lr):
        parser.error("Give --next, or --method, --task and --lr.")
    if asked.out == RESULTS and (asked.steps != SETTINGS.steps or asked.device != "cpu"):
        parser.error("Runs of another length or on another device belong into another folder: give --out.")
    settings = Settings(asked.steps, SETTINGS.batch, SETTINGS.warmup)
    one = None if asked.next else Run(asked.method, asked.task, asked.seed, asked.lr)
    with plan.claimed(asked.out, one) as claimed:
        if claimed is None:
            return 1
        prepare([claimed.task, "wikipedia"])
        carry_out(claimed, asked.out, settings, asked.device)
    return 0
