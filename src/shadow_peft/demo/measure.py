"""Runs functions in processes of their own and measures peak memory."""

from __future__ import annotations

import logging
import resource
import signal
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import active_children, get_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def in_own_process(work: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function in a fresh process, so that its peak memory is its own; its exceptions are raised here."""
    with ProcessPoolExecutor(1, get_context("spawn"), _start_worker) as pool:
        return pool.submit(work, *args, **kwargs).result()


def side_by_side(*works: Callable[[], R]) -> list[R]:
    """Run functions at the same time, each in a fresh process, and return their results; a failure ends all of them."""
    with ThreadPoolExecutor(max_workers=len(works)) as waiting:
        running = [waiting.submit(in_own_process, work) for work in works]
        try:
            failed = [work for work in wait(running, return_when=FIRST_EXCEPTION).done if work.exception()]
            return [work.result() for work in failed or running]
        except BaseException:  # Ctrl-C, too: a terminal sends it to every process, and each would print a traceback
            for child in active_children():
                child.terminate()
            raise


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and hide what libraries log."""
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
