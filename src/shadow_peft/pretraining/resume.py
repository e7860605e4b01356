"""Where an interrupted pretraining goes on: its newest finished checkpoint, and the options that it was made by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shadow_peft.storage.files import read_json, write_json

OPTIONS, STATE, WEIGHTS = "pretraining_options.json", "trainer_state.json", "model.safetensors"

FREE = ("resume", "logging_steps", "eval_steps", "save_steps", "use_cpu", "compile", "teacher_cache", "data_licence")
"""Options that may differ from those before the interruption."""


def newest_checkpoint(output: Path) -> Path | None:
    """The newest finished checkpoint in an output folder; a trainer writes its state last."""
    found = [path for path in output.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    newest_first = sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))
    return next((path for path in newest_first if _is_finished(path)), None)


def _is_finished(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        with safe_open(checkpoint / WEIGHTS, "pt"):
            return True
    except (OSError, ValueError, SafetensorError):
        return False


def store_options(output: Path, options: Mapping[str, Any]) -> None:
    """Write the options of a run into its output folder."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(options, output / OPTIONS)


def changed_options(output: Path, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Names of the options with which a run would go on otherwise than it began.

    Args:
        output: the run's folder.
        options: the options to go on with.
        defaults: of options that the folder does not name, since it was begun before there were such.

    Raises:
        ValueError: the folder does not say by which options it was made.
    """
    before = read_json(output / OPTIONS)
    now = json.loads(json.dumps(dict(options)))
    return sorted(name for name in now if name not in FREE and before.get(name, defaults.get(name)) != now[name])
