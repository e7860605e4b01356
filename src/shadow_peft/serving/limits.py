"""What the server allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of requests and batches.

    Attributes:
        prompt_tokens: longest prompt.
        new_tokens: longest answer; also the length of an answer for which the request names none.
        queue: requests that may wait; one more is refused with 429.
        timeout: seconds in which a request must be answered, waiting included.
        batch: rows of a batch.
        window: seconds that a request waits for others to share a batch.
        body_bytes: largest body of a request.
        body_seconds: seconds in which a body must arrive.

    Raises:
        ValueError: a limit that nothing could keep.
    """

    prompt_tokens: int = 4096
    new_tokens: int = 1024
    queue: int = 256
    timeout: float = 120.0
    batch: int = 32
    window: float = 0.005
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "queue", "timeout", "batch", "body_bytes", "body_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if not self.window >= 0:
            raise ValueError(f"window must not be negative, got {self.window}.")
