"""Files of a checkpoint, written all or none, and JSON. Without torch, so that a config can be read without it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def all_or_none(directory: str | os.PathLike[str], replacing: Collection[str] = ()) -> Iterator[Path]:
    """A staging directory whose files are moved into `directory` together at the end.

    If anything fails before the end, the old files stay as they were. The move itself is undone if it fails half way.

    Args:
        directory: created when it is missing.
        replacing: names of old files to remove from there, unless they are written again.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"Cannot save into {target}: it is a file, not a directory.")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as staging:
        fresh, old = Path(staging, "new"), Path(staging, "old")
        fresh.mkdir()
        old.mkdir()
        yield fresh
        _move_in(fresh, target, old, replacing)


def _move_in(fresh: Path, target: Path, old: Path, replacing: Collection[str]) -> None:
    done: list[str] = []
    written = sorted(os.listdir(fresh))
    try:
        for name in written:
            if (target / name).exists():
                os.link(target / name, old / name)
            done.append(name)
            os.replace(fresh / name, target / name)
        for name in sorted(set(replacing) - set(written)):
            if (target / name).exists():
                done.append(name)
                os.replace(target / name, old / name)
    except BaseException:
        for name in done:
            _put_back(name, target, old)
        raise


def _put_back(name: str, target: Path, old: Path) -> None:
    if (old / name).exists():
        os.replace(old / name, target / name)
    else:
        (target / name).unlink(missing_ok=True)


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(data).__name__}.")
    return data
