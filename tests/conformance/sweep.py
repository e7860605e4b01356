"""Every check on every type of transformers' ``MODEL_FOR_CAUSAL_LM_MAPPING``; writes the tables of the documentation.

    python -m tests.conformance.sweep [--jobs 2] [--timeout 300] [--output docs] [type ...]

Each type runs in a process of its own. The exit code is 1 when a type fails a check that applies to it. ``make conformance``
runs it on all types; the tables are written only then, or where ``--output`` says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import textwrap
import time
import warnings
from collections import Counter, deque
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, get_args

import torch
from transformers.utils import logging

from shadow_peft.base.architectures import ARCHITECTURES
from shadow_peft.config import Variant
from tests.conformance import checks
from tests.conformance.checks import CHECKS
from tests.conformance.outcomes import Outcome, outcome
from tests.conformance.tiny import NOT_APPLICABLE, applicable_types

UNSUPPORTED = {name: a.unsupported for name, a in ARCHITECTURES.items() if a.unsupported is not None}
COMMAND = "python -m tests.conformance.sweep"
PACKAGES = ("shadow-peft", "torch", "transformers")

Row = dict[str, Outcome]


def unsupported(model_type: str) -> str | None:
    """Why the library refuses a type, or None."""
    return UNSUPPORTED.get(model_type)


def row(model_type: str) -> Row:
    """All checks of one type."""
    return {name: outcome(check, model_type) for name, check in CHECKS.items()}


def _work(model_type: str, out: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    out.send(row(model_type))
    out.close()


@dataclass
class Worker:
    """A process that runs the checks of one type."""

    model_type: str
    process: Any
    answer: Connection
    started: float

    @classmethod
    def start(cls, model_type: str) -> Worker:
        """Start the checks of a type."""
        context = multiprocessing.get_context("fork")
        answer, out = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(model_type, out), daemon=True)
        process.start()
        out.close()
        return cls(model_type, process, answer, time.monotonic())

    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self.started

    def finish(self) -> Row:
        """The answer of a worker that has ended or is out of time."""
        try:
            result: Row = self.answer.recv() if self.answer.poll() else self._broken("out of time")
        except EOFError:
            result = self._broken("the process died")
        self.process.kill()
        self.process.join()
        return result

    def _broken(self, what: str) -> Row:
        return dict.fromkeys(CHECKS, Outcome("FAIL", f"{what} after {self.seconds():.0f} s"))


def sweep(model_types: list[str], jobs: int, timeout: float) -> dict[str, Row]:
    """All checks of all types, so many at a time."""
    waiting, running, rows = deque(model_types), list[Worker](), dict[str, Row]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Worker.start(waiting.popleft()))
        ready = wait([worker.answer for worker in running], timeout=1.0)
        for worker in [w for w in running if w.answer in ready or w.seconds() > timeout]:
            rows[worker.model_type] = worker.finish()
            running.remove(worker)
            _report(worker, rows[worker.model_type], f"{len(rows)}/{len(model_types)}")
    return {name: rows[name] for name in model_types}


def _report(worker: Worker, result: Row, progress: str) -> None:
    counts = Counter(o.verdict for o in result.values())
    print(f"[{progress}] {worker.model_type}: {dict(counts)} in {worker.seconds():.0f} s", file=sys.stderr, flush=True)
    for detail in dict.fromkeys(o.detail for o in result.values() if o.verdict == "FAIL"):
        names = [name for name, o in result.items() if o.verdict == "FAIL" and o.detail == detail]
        print(f"    {', '.join(names)}: {detail[:300]}", file=sys.stderr, flush=True)


def failing(result: Row) -> list[str]:
    """The checks that apply to a type and do not hold."""
    return [name for name, found in result.items() if found.verdict == "FAIL"]


def document(rows: dict[str, Row], refused: dict[str, str]) -> str:
    """The tables as Markdown."""
    passing = [name for name, result in rows.items() if not failing(result)]
    notes: dict[str, int] = {}
    lines = [
        "# Conformance",
        "",
        "Every causal language model type of transformers, built tiny with random weights, with an adapter attached. "
        f"{len(passing)} types pass every check that applies to them; {len(rows) - len(passing)} fail one; "
        f"{len(refused)} cannot be adapted (last table). A check does not apply where the bare base itself does not do "
        "what is checked; this is measured in the same run, and the note says what was seen. A shadow that is refused by "
        "`export_shadow(fold=True)` is exported with its projection instead; the note says why.",
        "",
        f"Made by `{COMMAND}` with {', '.join(f'{name} {version(name)}' for name in PACKAGES)} on a CPU, float32, "
        f"variant `{checks.variant}`.",
        "",
        "| type | " + " | ".join(CHECKS) + " |",
        "|---|" + "---|" * len(CHECKS),
        *(
            f"| {name} | " + " | ".join(_cell(found, notes) for found in result.values()) + " |"
            for name, result in rows.items()
        ),
        "",
        "## Notes",
        "",
        *(f"{number}. {text}" for text, number in notes.items()),
        "",
        "## What cannot be adapted",
        "",
        "| type | reason |",
        "|---|---|",
        *(f"| {name} | {reason} |" for name, reason in sorted(refused.items())),
    ]
    return "\n".join(lines) + "\n"


def _cell(found: Outcome, notes: dict[str, int]) -> str:
    if found.verdict == "pass":
        return "pass"
    detail = textwrap.shorten(found.detail, 240)
    number = notes.setdefault(f"{found.verdict}: {detail}", len(notes) + 1)
    return f"{found.verdict} ({number})"


def write(rows: dict[str, Row], refused: dict[str, str], folder: Path) -> None:
    """Write `conformance.json` and `conformance.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "command": COMMAND,
        "variant": checks.variant,
        "versions": {name: version(name) for name in PACKAGES},
        "types": {name: {check: asdict(found) for check, found in result.items()} for name, result in rows.items()},
        "refused": refused,
    }
    (folder / "conformance.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "conformance.md").write_text(document(rows, refused))


def main(arguments: list[str]) -> int:
    """Run the sweep; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="types at a time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one type")
    parser.add_argument("--output", type=Path, help="folder of the tables")
    parser.add_argument("--variant", default="published", choices=get_args(Variant), help="mathematics to check")
    parser.add_argument("types", nargs="*", help="default: all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    checks.variant = options.variant  # the workers are forks
    chosen = options.types or [name for name in applicable_types() if unsupported(name) is None]
    rows = sweep(chosen, options.jobs, options.timeout)
    if options.output is not None or not options.types:
        refused = {**NOT_APPLICABLE, **UNSUPPORTED}
        write(rows, refused, options.output or Path("docs"))
    failed = {name: failing(result) for name, result in rows.items() if failing(result)}
    print(f"{len(rows) - len(failed)} of {len(rows)} types pass every check that applies to them.")
    for name, missed in failed.items():
        print(f"  {name}: {', '.join(missed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
