"""The steps: what each runs, and what it says when it is done.

tests           tests/gpu
train-SHAPE-N   a training step of a contender, beside LoRA
decode-SHAPE-N  prefill and decoding of a contender, or of ours with drafts of a given acceptance, beside the bare base
quality         the plan of `benchmarks.quality.real`, all seeds
pretrain        the shadow of SmolLM2, 200M tokens of text
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from xml.etree import ElementTree

from benchmarks.decoding.contenders import PUBLISHED
from benchmarks.quality.real.packages import PEER, ROOT, cache

Result: TypeAlias = dict[str, Any]
LARGE = ("qwen3-0.6b", "qwen3-4b", "qwen3-8b")
DECODING = ("LoRA", "DoRA", PUBLISHED, "peft Shadow", "ours, variant published", "ours")
ORACLES = ("0.0", "0.5", "0.8", "0.95")
TRAINING = ("DoRA", PUBLISHED, "peft's Shadow", "ours")
SHADOW_TOKENS, CONTEXT, BLOCKS = 200_000_000, 512, 32


class StepError(Exception):
    """A step cannot be done, or what it ran failed."""


@dataclass(frozen=True)
class Options:
    """How the steps run.

    Args:
        device: "cuda", or "cpu" for a trial.
        toy: tiny sizes, and a part of the contenders.
        folder: where results go; what is unfinished is below `work/`.
        minutes: after which a long step stops.
    """

    device: str
    toy: bool
    folder: Path
    minutes: float = 8.0

    @property
    def work(self) -> Path:
        """The folder of what is unfinished."""
        return self.folder / "work"

    @property
    def dtype(self) -> str:
        """The bases' dtype."""
        return "bfloat16"


@dataclass(frozen=True)
class Step:
    """A name, and what makes its result; that gives None while more is to be done."""

    name: str
    run: Callable[[Options], Result | None]


def steps(options: Options) -> list[Step]:
    """All steps in their order: short ones that say most come first."""
    shapes = ("toy",) if options.toy else LARGE
    found = [Step("tests", tests)]
    for shape in shapes:
        for name in ("ours",) if options.toy else TRAINING:
            found.append(Step(f"train-{shape}-{plain(name)}", partial(train, shape, name)))
        for name in () if options.toy else DECODING:
            found.append(Step(f"decode-{shape}-{plain(name)}", partial(decode, shape, name, None)))
        for drafts in ("0.8",) if options.toy else ORACLES:
            found.append(Step(f"decode-{shape}-drafts-{drafts}", partial(decode, shape, "ours", drafts)))
    return [*found, Step("pretrain", pretrain), Step("quality", quality)]


def plain(name: str) -> str:
    """A contender's name as part of a file's."""
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in name.replace("'", "")).lower()


def command(words: list[str], options: Options, stop: bool = False) -> str:
    """Run a command of this repository; the end of what it wrote.

    Args:
        stop: interrupt it after `options.minutes` rather than fail.

    Raises:
        StepError: it failed, or took more than nine minutes.
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "HF_HUB_OFFLINE": "1"}
    run = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        text, _ = run.communicate(timeout=options.minutes * 60 if stop else 540)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGINT if stop else signal.SIGKILL)
        text, _ = run.communicate()
        if stop:
            return text[-2000:]
        raise StepError(f"It took more than nine minutes: {' '.join(words)}\n{text[-2000:]}") from None
    if run.returncode:
        raise StepError(f"It ended with {run.returncode}: {' '.join(words)}\n{text[-4000:]}")
    return text[-2000:]


def tests(options: Options) -> Result:
    """Tests on the device; the CPU's run beside them."""
    report = options.work / "tests.xml"
    part = ["-k", "bfloat16_is or saved_here"] if options.toy else []
    command(["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", f"--junitxml={report}", *part], options)
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case.attrib["name"] for case in cases if case.find("skipped") is not None]
    on_device = [case.attrib["name"] for case in cases if options.device in case.attrib["name"]]
    passed = len(set(on_device) - set(skipped))
    if not passed:
        raise StepError(f"No test ran on {options.device}: {len(skipped)} were skipped.")
    return {"passed": passed, "skipped": sorted(set(on_device) & set(skipped))}


def train(shape: str, name: str, options: Options) -> Result:
    """What a training step costs, beside LoRA."""
    output = options.work / "train.json"
    words = ["--only", "LoRA", name, "--shape", shape, "--device", options.device, "--dtype", options.dtype]
    words += ["--rows", "2", "--length", "16", "--steps", "1"] if options.toy else ["--rows", "4", "--length", "512"]
    words += ["--peer", peer(), "--output", str(output)] if name == PUBLISHED else ["--output", str(output)]
    command(["-m", "benchmarks.training_cost", *words], options)
    return json.loads(output.read_text(encoding="utf-8"))


def decode(shape: str, name: str, drafts: str | None, options: Options) -> Result:
    """Prefill and decoding, beside the bare base."""
    from benchmarks.decoding.run import beside_base, measure

    rounds, prompt, tokens = (1, 8, 6) if options.toy else (3, 128, 32)
    processes = beside_base(name, shape, options.device, options.dtype, peer() if name == PUBLISHED else "", drafts)
    try:
        rows = measure(processes, rounds, prompt, tokens, [1] if options.toy else [1, 8])
    finally:
        for process in processes.values():
            process.end()
    return {"shape": shape, "settings": {"rounds": rounds, "prompt": prompt, "tokens": tokens}, "rows": rows}


def peer() -> str:
    """The folder of the unpacked `shadow-peft` 0.1.1.

    Raises:
        StepError: it is not there.
    """
    if not PEER.folder.exists():
        raise StepError(f"shadow-peft 0.1.1 is not in {PEER.folder}: carry along what `make wheels` collects.")
    return str(PEER.folder)


def quality(options: Options) -> Result | None:
    """Runs of the plan until the time is over; done when none is missing."""
    from benchmarks.quality.real.plan import missing

    folder, started = options.folder / "quality", time.monotonic()
    need(cache() / "smollm2-135m")
    longest = 0.0
    while left := missing(folder):
        before = time.monotonic()
        words = ["--base", "smollm2", "--next", "--device", options.device, "--out", str(folder)]
        command(["-m", "benchmarks.quality.run", *words, *(["--steps", "2"] if options.toy else [])], options)
        longest = max(longest, time.monotonic() - before)
        if options.toy:
            return {"runs": len(list(folder.glob("*.json"))), "failed": failures(folder), "missing": len(left) - 1}
        if time.monotonic() - started + longest > options.minutes * 60:
            return None
    return {"runs": len(list(folder.glob("*.json"))), "failed": failures(folder)}


def failures(folder: Path) -> list[str]:
    """Names of the runs that failed."""
    return sorted(path.stem for path in (folder / "failed").glob("*.json"))


def pretrain(options: Options) -> Result | None:
    """A part of the pretraining of the base's shadow; done when its card is there."""
    output = options.folder / "work/shadow"
    base, text = need(cache() / "smollm2-135m"), need(cache() / "corpus")
    number = 2 if options.toy else SHADOW_TOKENS // (CONTEXT * BLOCKS)
    sizes = {"context": 16, "held_out": 2, "per_device_train_batch_size": 2, "save_steps": 1, "eval_steps": 1,
             "num_shadow_layers": 1} if options.toy else {"context": CONTEXT, "per_device_train_batch_size": BLOCKS,
             "shadow_intermediate_size": 512, "distillation_weight": 0.5}  # fmt: skip
    words = ["--model", str(base), "--data", str(text), "--output", str(output), "--max_steps", str(number), "--resume"]
    words += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    words += ["--use_cpu"] if options.device == "cpu" else []
    said = command(["-m", "shadow_peft.cli", "pretrain", *words], options, stop=True)
    facts = output / "pretraining.json"
    if not facts.exists():
        if not any(output.glob("checkpoint-*")):
            raise StepError(f"It stopped before its first checkpoint:\n{said}")
        return None
    if not (cache() / "smollm2-shadow").exists():
        shutil.copytree(output, cache() / "smollm2-shadow", ignore=shutil.ignore_patterns("checkpoint-*"))
    return {"tokens": number * int(sizes["context"]) * int(sizes["per_device_train_batch_size"]),
            "weights": str(output), "pretraining": json.loads(facts.read_text(encoding="utf-8"))}  # fmt: skip


def need(path: Path) -> Path:
    """A part of the cache.

    Raises:
        StepError: it is not there.
    """
    if not path.exists():
        raise StepError(f"{path} is missing: carry along what `make wheels` collects; SHADOW_BENCHMARK_CACHE names it.")
    return path
