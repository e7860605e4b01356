"""Prefill and decoding: bare base, LoRA, DoRA, the published shadows, ours, ours drafting; one run, ratios to the bare base.

    python -m benchmarks.decoding.run                    makes an environment of the peers first (some minutes)
    python -m benchmarks.decoding.run --peer PYTHON      uses the interpreter of one that is there already
    python -m benchmarks.decoding.run --base DIR [--adapter DIR --text FILE] --output FILE
                                                         a real base in bfloat16 and a trained adapter, without the peers

On a random base of 46 M parameters (12 layers of width 512) all contenders train about 1.17 M parameters. Drafting
there is an oracle's, right with a given probability: the ceiling. How well a trained shadow drafts is measured by
`benchmarks.decoding.demo`, and with a real base by prompts from a text. Every contender has a process and one thread;
each measurement stands between two of the bare base, its ratio is that to their mean, and the median of the rounds
counts. Machines are noisy: compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.decoding.contenders import CONTENDERS, PUBLISHED
from tests.compat.run import make_environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "decoding.json"
ORACLES = (0.0, 0.5, 0.7, 0.8, 0.9)
REAL_ORACLES = (0.0, 0.85)
BASE = "bare base"
SLOW = {"DoRA": 8}
"""Tokens at most, where a token takes seven times as long."""


class Process:
    """A worker that answers one request at a time."""

    def __init__(self, python: str, name: str, **options: Any) -> None:
        command = [python, "-m", "benchmarks.decoding.worker", name, json.dumps(options)]
        paths = peer_paths(python) if name == PUBLISHED else [ROOT, ROOT / "src"]
        command[0] = interpreter(python)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(map(str, paths))}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        self._answer()

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """The answer to a request."""
        assert self._process.stdin is not None
        print(json.dumps({"do": what, **request}), file=self._process.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        """Let it go, and wait until its memory is free."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"A worker ended: {self._process.args!r}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def start(peer: str) -> dict[str, Process]:
    """A worker for every contender on the random base, drafting ones included."""
    processes = {name: Process(peer if name == PUBLISHED else sys.executable, name) for name in CONTENDERS}
    for acceptance in ORACLES:
        processes[f"ours, drafts right {acceptance:.0%}"] = Process(sys.executable, "ours", drafts=str(acceptance))
    return processes


def peer_paths(peer: str) -> list[Path]:
    """Where the published package is found: the unpacked one if `peer` is a folder, else its interpreter knows."""
    return [Path(peer), ROOT] if Path(peer).is_dir() else [ROOT]


def interpreter(peer: str) -> str:
    """The interpreter of a peer; an unpacked package runs in ours."""
    return sys.executable if Path(peer).is_dir() else peer


def beside_base(name: str, shape: str, device: str, dtype: str, peer: str, drafts: str | None = None) -> dict[str, Process]:
    """The bare base and one contender in the shape of a large model: two at a time fit into the memory of a GPU."""
    options = {"shape": shape, "device": device, "dtype": dtype}
    other = {**options, "drafts": drafts}
    python = peer if name == PUBLISHED else sys.executable
    title = name if drafts is None else f"{name}, drafts right {float(drafts):.0%}"
    return {BASE: Process(sys.executable, BASE, **options), title: Process(python, name, **other)}


def start_real(base: str, adapter: str | None, text: str | None, only: list[str] | None = None) -> dict[str, Process]:
    """A worker for the bare base and for every contender on it, or only for some."""
    ours = {"adapter": adapter}
    options: dict[str, dict[str, Any]] = {BASE: {}, "LoRA": {}, "ours, variant published": {}, "ours": ours}
    for acceptance in REAL_ORACLES:
        options[f"ours, drafts right {acceptance:.0%}"] = {"drafts": str(acceptance), **ours}
    if adapter is not None:
        options["ours, its own drafts"] = {"drafts": "own", **ours}
        options["ours, its own drafts, whole head"] = {"drafts": "own", "assistant_vocab_size": 0, **ours}
    unknown = set(only or ()) - set(options)
    if unknown:
        raise ValueError(f"There is no contender {sorted(unknown)}; there are {sorted(options)}.")
    chosen = [name for name in options if name == BASE or only is None or name in only]
    return {
        name: Process(sys.executable, name if name in CONTENDERS else "ours", base=base, text=text, **options[name])
        for name in chosen
    }


def measure(
    processes: dict[str, Process], rounds: int, prompt: int, tokens: int, batches: list[int]
) -> dict[str, dict[str, float]]:
    """Contender -> median ratios to the bare base for each number of rows, and counts."""
    rows: dict[str, dict[str, float]] = {name: {} for name in processes}
    for batch in batches:

        def seconds(name: str, batch: int = batch) -> dict[str, float]:
            length = min(tokens if batch > 1 else 3 * tokens, SLOW.get(name, 3 * tokens))
            return processes[name].ask("time", batch=batch, prompt=prompt, tokens=length)

        ratios: dict[tuple[str, str], list[float]] = {
            (name, what): [] for name in processes for what in ("prefill", "decode")
        }
        for number in range(rounds + 1):
            before = seconds(BASE)
            for name in processes:
                taken, after = seconds(name), seconds(BASE)
                if number:  # the first round warms up
                    for what in ("prefill", "decode"):
                        ratios[name, what].append(2 * taken[what] / (before[what] + after[what]))
                before = after
        for (name, what), found in ratios.items():
            rows[name][f"{what} b{batch}"] = round(statistics.median(found), 3)
    for name, process in processes.items():
        rows[name] |= process.ask("parameters")
        rows[name] |= process.ask("drafts") if "drafts" in name else process.ask("operations", batch=1)
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """The ratios in Markdown."""
    head = ["prefill b1", "decode b1", "prefill b8", "decode b8", "operations", "acceptance", "tokens_per_base_pass"]
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in head) + " |", "|---|" + "---|" * len(head)]
    for name, row in rows.items():
        cells = [f"{row[key]:.2f}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in head]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where figures were measured, and with what."""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.partition(":")[2].strip() for line in facts.splitlines() if line.startswith("model name")), "")
    packages = ("torch", "transformers", "peft")
    return {"platform": platform.platform(), "cpu": cpu, "cores": os.cpu_count(), **{p: version(p) for p in packages}}


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with shadow-peft 0.1.1")
    parser.add_argument("--base", help="Folder of a real base; the published shadows and DoRA are left out then.")
    parser.add_argument("--adapter", help="Folder of an adapter for it, whose own drafts are measured too.")
    parser.add_argument("--text", help="A text file: its pieces are the prompts.")
    parser.add_argument("--only", nargs="+", help="Contenders on the real base beside the bare one; all by default.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32, help="Tokens to write at batch 8; three times as many at batch 1.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="Numbers of rows.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.base is None and (args.adapter or args.text):
        parser.error("--adapter and --text need the --base that they belong to.")
    if args.base is not None and args.output == RESULTS:
        parser.error("Name the --output of a real base; the default one is that of the random base.")
    with tempfile.TemporaryDirectory() as folder:
        if args.base is not None:
            processes = start_real(args.base, args.adapter, args.text, args.only)
        else:
            processes = start(args.peer or make_environment(Path(folder) / "peer"))
        rows = measure(processes, args.rounds, args.prompt, args.tokens, args.batches)
    print(table(rows))
    settings = {"rounds": args.rounds, "prompt": args.prompt, "tokens": args.tokens, "threads": 1}
    settings |= {name: Path(given).name for name in ("base", "adapter", "text") if (given := getattr(args, name))}
    args.output.write_text(json.dumps({"settings": settings, "machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
