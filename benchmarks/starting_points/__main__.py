"""Makes one run of the plan; see the package."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

from benchmarks.starting_points.cell import Settings, base_hash, run
from benchmarks.starting_points.plan import RESULTS, ROOT, SEEDS, STARTS, Cell, claimed

DEFAULTS = {f.name: f.default for f in fields(Settings) if f.name not in ("corpus", "base", "shape")}
PATHS = {name: getattr(Settings, name) for name in ("base", "shape")}


def main(words: list[str]) -> int:
    """The command line; 0 after a run, 1 where none is left to be done."""
    asked = _parse(words)
    settings = Settings(**{f.name: getattr(asked, f.name) for f in fields(Settings)})
    known = base_hash(settings.base)
    others = {p.name for p in asked.out.glob("*.json") if json.loads(p.read_text(encoding="utf-8"))["base"] != known}
    if others:
        sys.exit(f"{asked.out} has results of another base than {known}, such as {min(others)}: give another --out")
    with claimed(asked.out, None if asked.next else Cell(asked.start, asked.seed)) as cell:
        if cell is None:
            return 1
        same = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]  # a run goes on with the settings it began with
        work = asked.work / f"{known}-{same}" / cell.name
        work.mkdir(parents=True, exist_ok=True)
        result = run(cell, settings, work)
        partial = cell.path(asked.out).with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(cell.path(asked.out))
        shutil.rmtree(work)
        print(cell.name, json.dumps(result["shadow"]), f"{result['cpu_seconds']:.0f} s", flush=True)
    return 0


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starting_points", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="Folder that scripts/registry_text.py wrote.")
    parser.add_argument("--next", action="store_true", help="The next run of the plan that is missing and that nobody does.")
    parser.add_argument("--start", choices=STARTS)
    parser.add_argument("--seed", type=int, default=0, choices=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/starting_points", help="For checkpoints.")
    for name, value in {**PATHS, **DEFAULTS}.items():
        parser.add_argument(f"--{name}", type=type(value) if name in DEFAULTS else Path, default=value)
    asked = parser.parse_args(words)
    if not asked.next and asked.start is None:
        parser.error("Give --next or --start.")
    if asked.out == RESULTS and any(getattr(asked, name) != value for name, value in DEFAULTS.items()):
        parser.error("Runs of other sizes belong into another folder: give --out.")
    return asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
