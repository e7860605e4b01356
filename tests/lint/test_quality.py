"""What `make lint` checks is part of the tests: style, format, types, and the one-way line of dependencies."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("lint-imports",)],
    ids=lambda command: " ".join(command),
)
def test_nothing_to_complain_about(command: tuple[str, ...]) -> None:
    tool, *arguments = command
    run = subprocess.run([str(SCRIPTS / tool), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"\n{run.stdout[-4000:]}\n{run.stderr[-1000:]}"


def test_the_library_needs_its_core_dependencies_only() -> None:
    """Trainers, plots and peft belong to extras; no public name may reach for them."""
    extras = ("accelerate", "datasets", "trl", "matplotlib", "peft", "openai", "scipy", "sklearn")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); from shadow_peft import *; import shadow_peft.cli"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
