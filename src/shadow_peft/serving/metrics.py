"""What Prometheus is told. Every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server; `model` in a label is a name that is served."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.responses = Counter("shadow_peft_responses", "HTTP responses", ["path", "status"], registry=registry)
        self.answers = Counter("shadow_peft_answers", "Finished answers", ["model"], registry=registry)
        self.prompt_tokens = Counter("shadow_peft_prompt_tokens", "Tokens of prompts", ["model"], registry=registry)
        self.answer_tokens = Counter("shadow_peft_answer_tokens", "Tokens of answers", ["model"], registry=registry)
        self.hang_ups = Counter("shadow_peft_hang_ups", "Clients that left before their answer", registry=registry)
        self.timeouts = Counter("shadow_peft_timeouts", "Requests that ran out of time", registry=registry)
        self.refused = Counter("shadow_peft_overloads", "Requests that found the queue full", registry=registry)
        self.waiting = Gauge("shadow_peft_waiting_requests", "Requests in the queue", registry=registry)
        self.running = Gauge("shadow_peft_running_rows", "Rows of the batch that is answered", registry=registry)
        self.seconds = Histogram("shadow_peft_answer_seconds", "From arrival to the end of the answer", registry=registry)
        self.rows = Histogram("shadow_peft_batch_rows", "Rows of a batch", buckets=_ROWS, registry=registry)
        self.adapters = Histogram("shadow_peft_batch_adapters", "Adapters of a batch", buckets=_ROWS, registry=registry)

    def batch_started(self, adapters: Sequence[str]) -> None:
        """A batch with these adapters, one a row, is answered now."""
        self.running.set(len(adapters))
        self.rows.observe(len(adapters))
        self.adapters.observe(len(set(adapters)))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
