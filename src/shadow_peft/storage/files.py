"""Files of a checkpoint: written all or none, read with errors that name what is wrong."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


@contextmanager
def all_or_none(directory: str | os.PathLike[str], replacing: Collection[str] = ()) -> Iterator[Path]:
    """A staging directory whose files move into `directory` together at the end.

    Whatever fails before the end, the old files stay as they were; the move itself is undone if it fails half way.

    Args:
        directory: created when it is missing.
        replacing: names of files that go from there, if they are not written anew.
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
    """Write a JSON object, flushed to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, flushed to the disk; views become tensors of their own."""
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path, {"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: there is no such file, or it holds no JSON object.
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or a legacy `.pt` file without running any code in it.

    Raises:
        ValueError: the file is truncated or holds something else than tensors.
    """
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else _read_legacy(path)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    return tensors


def _read_legacy(path: Path) -> dict[str, Tensor]:
    from pickle import UnpicklingError

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and is not loaded: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors.")
    return tensors


def fill(views: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str, strict: bool = True) -> None:
    """Copy tensors into the views of the same name, after all of them were checked.

    Args:
        views: name -> destination.
        tensors: name -> value.
        source: where the values come from, for the error.
        strict: every view needs a value.

    Raises:
        ValueError: names every tensor that is missing, unknown or of another shape; nothing is changed then.
    """
    problems = [f"missing {name}" for name in views if strict and name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in views]
    problems += [
        f"{name} has shape {tuple(tensor.shape)} instead of {tuple(views[name].shape)}"
        for name, tensor in tensors.items()
        if name in views and tensor.shape != views[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source} does not fit this model: {shown}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            views[name].copy_(tensor)
