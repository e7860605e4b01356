"""Carries out the steps of `benchmarks.gpu`: one JSON each, with the hardware and versions; what has a JSON is not repeated.

python -m benchmarks.gpu.run --list | --next | --step NAME | (nothing: all that are missing, one after another)
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from benchmarks import devices
from benchmarks.gpu.steps import Options, Result, Step, steps
from benchmarks.quality.real.packages import ROOT

RESULTS = ROOT / "benchmarks/results/gpu"


def path_of(step: Step, folder: Path) -> Path:
    """The result of a step."""
    return folder / f"{step.name}.json"


def missing(options: Options) -> list[Step]:
    """The steps that have no result, in their order."""
    return [step for step in steps(options) if not path_of(step, options.folder).exists()]


def carry_out(step: Step, options: Options) -> str:
    """Run a step; "done", "to be continued" or "failed". An error is written to `failed/`, and the step is tried again."""
    print(f"{step.name} ...", flush=True)
    options.work.mkdir(parents=True, exist_ok=True)
    failure, started = options.folder / "failed" / f"{step.name}.txt", time.perf_counter()
    try:
        result = step.run(options)
    except Exception as error:
        failure.parent.mkdir(exist_ok=True)
        failure.write_text(traceback.format_exc(), encoding="utf-8")
        print(f"  failed, see {failure}: {str(error).splitlines()[0] if str(error) else error!r}", flush=True)
        return "failed"
    failure.unlink(missing_ok=True)
    if result is None:
        print("  to be continued", flush=True)
        return "to be continued"
    write(path_of(step, options.folder), step, result, time.perf_counter() - started, options)
    print(f"  done, {time.perf_counter() - started:.0f} s", flush=True)
    return "done"


def write(path: Path, step: Step, result: Result, seconds: float, options: Options) -> None:
    """The file of a result, which appears when it is complete."""
    facts = {"step": step.name, "toy": options.toy, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    content = {**facts, "seconds": round(seconds), "hardware": devices.machine(options.device), "result": result}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def all_missing(options: Options) -> list[str]:
    """Every step that is missing, each until it is done or fails; the names of those that failed."""
    failed = []
    for step in missing(options):
        while (end := carry_out(step, options)) == "to be continued":
            pass
        failed += [step.name] if end == "failed" else []
    return failed


def make_toy(folder: Path) -> None:
    """A tiny base, tasks and text in place of what is carried along."""
    from benchmarks.quality.real import toy

    toy.make(folder)
    (folder / "corpus").mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"Passage {number}: " + toy.WORDS * 4}) for number in range(40)]
    (folder / "corpus/text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.environ["SHADOW_BENCHMARK_CACHE"] = str(folder)


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The options of the command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="Name the steps and which of them are done.")
    parser.add_argument("--next", action="store_true", help="Only the first step that is missing, and if long a part of it.")
    parser.add_argument("--step", help="Only this step, and if it is a long one a part of it.")
    parser.add_argument("--toy", action="store_true", help="Tiny sizes, to try it out; with a folder of its own.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="After which a long step stops, to go on later.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(words)
    if asked.results == RESULTS and (asked.toy or asked.device == "cpu") and not asked.list:
        parser.error("Trials belong into another folder: give --results.")
    if asked.device == "cuda" and not asked.list and not torch.cuda.is_available():
        parser.error("There is no CUDA GPU that this torch can use; --toy --device cpu tries the steps out.")
    return asked


def main(words: list[str] | None = None) -> int:
    """The command line; 1 where a step failed."""
    asked = parsed(words)
    options = Options(asked.device, asked.toy, asked.results.resolve(), asked.minutes)
    if asked.list:
        left = {step.name for step in missing(options)}
        for step in steps(options):
            print(f"{'missing' if step.name in left else 'done   '}  {step.name}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if asked.toy:
            make_toy(Path(folder))
        if not asked.next and asked.step is None:
            failed = all_missing(options)
            print(f"Failed: {', '.join(failed)}" if failed else "All steps are done.")
            return int(bool(failed))
        chosen = [step for step in missing(options) if asked.next or step.name == asked.step][:1]
        if asked.step is not None and asked.step not in {step.name for step in steps(options)}:
            print(f"There is no step {asked.step!r}; --list names them.", file=sys.stderr)
            return 2
        return int([carry_out(step, options) for step in chosen] == ["failed"])


if __name__ == "__main__":
    sys.exit(main())
