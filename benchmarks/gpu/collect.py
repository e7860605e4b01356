"""What a machine without a network needs for `make gpu`: packages but torch, the base, tasks, the peer, and text.

python -m benchmarks.gpu.collect FOLDER        or: make wheels WHEELS=FOLDER

    FOLDER/packages   wheels of all that is installed here but torch and what belongs to its CUDA; this project's too
    FOLDER/cache      SmolLM2, the tasks, shadow-peft 0.1.1 and the text for pretraining

The other machine has to have the same version of Python and the same platform. What is there already is kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from benchmarks.quality.real import tasks
from benchmarks.quality.real.packages import PEER, ROOT, fetched
from benchmarks.quality.real.plan import FURTHER, PLANNED

OWN = "shadow-peft"
WITH_CUDA = ("torch", "triton", "pytorch-triton")
OF_CUDA = ("nvidia-", "cuda-")


def requirements() -> list[str]:
    """Every installed package at its version, without torch, its CUDA, and this project."""
    found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}
    left_out = (*WITH_CUDA, OWN, "pip", "setuptools")
    return sorted(f"{n}=={v}" for n, v in found.items() if n not in left_out and not n.startswith(OF_CUDA))


def main(folder: Path) -> None:
    """Collect everything."""
    packages, cache = folder / "packages", folder / "cache"
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(packages), str(ROOT), *requirements()], check=True)
    os.environ["SHADOW_BENCHMARK_CACHE"] = str(cache.resolve())
    from benchmarks.quality.real.weights import base_folder

    print(base_folder(), fetched(PEER), sep="\n")
    for task in (*PLANNED, *FURTHER):
        print(task, {split: len(found) for split, found in tasks.splits(task).items()})
    print("passages", len(tasks.passages()))
    if not (cache / "corpus").exists():
        words = [str(ROOT / "scripts/registry_text.py"), "--output", str(cache / "corpus")]
        subprocess.run([sys.executable, *words], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
