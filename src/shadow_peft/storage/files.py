"""JSON files of a checkpoint; needs no torch, so that a config can be read without it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object and flush it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: there is no such file, or it contains no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"There is no {path.name} in {path.parent}.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(data).__name__}.")
    return data
