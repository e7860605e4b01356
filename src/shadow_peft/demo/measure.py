"""Runs functions in processes of their own and measures peak memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def in_own_process(work: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function in a fresh process, so that its peak memory is its own; its exceptions are raised here."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args, **kwargs).result()


def side_by_side(*works: Callable[[], R]) -> list[R]:
    """Run functions at the same time, each in a fresh process, and return their results."""
    with ThreadPoolExecutor(max_workers=len(works)) as waiting:
        return list(waiting.map(in_own_process, works))


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
