"""Locks for runs of a benchmark, so that several loops may work on one plan side by side."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def lock(folder: Path, name: str) -> int | None:
    """A locked file of a run below a folder of results, or None where another process has it; it goes with its process."""
    path = folder / ".locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
