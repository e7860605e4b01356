"""The public names of `shadow_peft.training`, and what they need to be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import shadow_peft.training as training

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there() -> None:
    assert sorted(training.__all__) == sorted(training._MODULES)
    for name in training.__all__:
        assert getattr(training, name).__name__ == name
    with pytest.raises(AttributeError, match="ShadowPPOTrainer"):
        _ = training.ShadowPPOTrainer


def test_groups_and_monitor_need_no_extra() -> None:
    extras = ("accelerate", "datasets", "trl", "peft")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extras!r})); "
        "from shadow_peft.training import GradientMonitor, GradientWatch, parameter_groups"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
