"""The queue: requests that wait together become one batch."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable

from shadow_peft.serving.limits import Limits
from shadow_peft.serving.metrics import Metrics
from shadow_peft.serving.requests import Request

logger = logging.getLogger(__name__)


class OverloadedError(Exception):
    """The queue is full.

    Attributes:
        retry_after: seconds after which a request is likelier to be taken.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The queue is full; try again in {retry_after} s.")
        self.retry_after = retry_after


class Batcher:
    """A queue and the thread that empties it, oldest first.

    A request waits up to `limits.window` for others of its kind. While a batch is answered the next one collects, so a busy
    server waits for nobody.

    Args:
        kind: requests of one kind may share a batch.
        together: of requests of one kind, oldest first, and the most rows of a batch, those that make the next batch.
        answer: answers a batch.
        limits: of queue and batch.
        metrics: are told.
    """

    def __init__(
        self,
        kind: Callable[[Request], Hashable],
        together: Callable[[list[Request], int], list[Request]],
        answer: Callable[[list[Request]], None],
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self._kind, self._together, self._answer = kind, together, answer
        self._limits, self._metrics = limits, metrics
        self._waiting: list[tuple[Hashable, Request]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 1.0  # of a batch, lately
        self._thread = threading.Thread(target=self._work, name="shadow-peft-batches", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether batches are answered."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            OverloadedError: the queue is full.
        """
        kind = self._kind(request)
        with self._changed:
            self._waiting = [entry for entry in self._waiting if not entry[1].over]
            if len(self._waiting) >= self._limits.queue:
                batches = len(self._waiting) / self._limits.batch
                raise OverloadedError(max(1, math.ceil(batches * self._seconds)))
            self._waiting.append((kind, request))
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            started = time.monotonic()
            self._metrics.batch_started([request.route.adapter for request in batch])
            try:
                self._answer(batch)
            except Exception as error:  # one batch must not end the server; its clients are told
                logger.exception("A batch of %d requests failed", len(batch))
                for request in batch:
                    request.fail(error)
            self._seconds = 0.8 * self._seconds + 0.2 * (time.monotonic() - started)
            self._metrics.running.set(0)

    def _next(self) -> list[Request]:
        """The next batch; empty once the queue is closed and empty."""
        with self._changed:
            while True:
                self._waiting = [entry for entry in self._waiting if not entry[1].over]
                if not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                kind, oldest = self._waiting[0]
                ready = self._together([entry[1] for entry in self._waiting if entry[0] == kind], self._limits.batch)
                left = oldest.arrived + self._limits.window - time.monotonic()
                if left > 0 and len(ready) < self._limits.batch and not self._closed:
                    self._changed.wait(left)
                    continue
                taken = set(map(id, ready))
                self._waiting = [entry for entry in self._waiting if id(entry[1]) not in taken]
                self._metrics.waiting.set(len(self._waiting))
                return ready
