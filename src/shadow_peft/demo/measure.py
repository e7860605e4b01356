"""Runs functions in processes of their own, hears how far they are, and measures peak memory."""

from __future__ import annotations

import logging
import resource
import signal
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: Takes one message about how far a function is.
Listener = Callable[[Any], object]

POLL_SECONDS = 0.1

_to_parent: Connection | None = None
"""Of a worker process: where its reports go; set when it starts."""


def in_own_process(work: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function in a fresh process, so that its peak memory is its own; its exceptions are raised here."""
    with ProcessPoolExecutor(1, get_context("spawn"), _start_worker) as pool:
        return pool.submit(work, *args, **kwargs).result()


def listened_to(work: Callable[[Listener], R], listener: Listener) -> R:
    """Run `work(report)` in a fresh process; what it reports is passed to `listener` here, in the order of reporting."""
    context = get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with reader, writer, ProcessPoolExecutor(1, context, _start_worker, (writer,)) as pool:
        running = pool.submit(_reporting, work)
        while not running.done() or reader.poll():
            if reader.poll(POLL_SECONDS):
                listener(reader.recv())
        return running.result()


def side_by_side(*works: Callable[[Listener], R], listener: Listener) -> list[R]:
    """Run functions at the same time, each in a fresh process, and return their results; a failure ends all of them.

    Args:
        works: picklable; each is called with a function that takes its reports.
        listener: gets the reports of all, from several threads.
    """
    with ThreadPoolExecutor(max_workers=len(works)) as waiting:
        running = [waiting.submit(listened_to, work, listener) for work in works]
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


def _start_worker(to_parent: Connection | None = None) -> None:
    """Leave Ctrl-C to the parent, hide what libraries log, and keep where reports go."""
    global _to_parent
    _to_parent = to_parent
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _reporting(work: Callable[[Listener], R]) -> R:
    """In a worker: run a function whose reports go to the parent."""
    assert _to_parent is not None
    return work(_to_parent.send)
