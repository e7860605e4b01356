"""Writes and reads the tensors of a checkpoint, with errors that name what is wrong, and copies them into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, flushed to the disk; views become tensors of their own."""
    path.touch()
    mode = path.stat().st_mode  # that of any new file; safetensors makes its own readable by nobody else
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path, {"format": "pt"})
    path.chmod(mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or a legacy `.pt` file without running any code in it.

    Raises:
        ValueError: the file is truncated, holds something else than tensors, or NaN or infinite values.
    """
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else _read_legacy(path)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise ValueError(f"{path} holds NaN or infinite values in {_listed(broken, ', ')}. Take an earlier checkpoint.")
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float()).all())


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file, of which only the header is read; none where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, RuntimeError, OSError):
        return []


def _read_legacy(path: Path) -> dict[str, Tensor]:
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
        strict: every view must have a value.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; it names them, and nothing is changed.
    """
    problems = [f"missing {name}" for name in views if strict and name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in views]
    problems += [
        f"{name} has shape {tuple(tensor.shape)} instead of {tuple(views[name].shape)}"
        for name, tensor in tensors.items()
        if name in views and tensor.shape != views[name].shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit this model: {_listed(problems, '; ')}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            views[name].copy_(tensor)


def _listed(items: list[str], separator: str) -> str:
    """The first items, and how many more there are."""
    return separator.join(items[:8]) + (f"{separator}and {len(items) - 8} more" if len(items) > 8 else "")
