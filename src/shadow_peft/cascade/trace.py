"""What the shadow thought of the tokens that it wrote: recorded while `generate` runs, by its public interfaces.

p is the distribution of the next token after the logits processors, before temperature and cuts of the sampling:

    probability  max p              margin  max p - second of p          certainty  1 - H(p) / log V
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria


@dataclass(frozen=True)
class Trace:
    """What the shadow thought of T tokens, the token that ends the answer included; of a class, T is 1.

    Attributes:
        log_probabilities: of the tokens that were written, in nats.
        probabilities: of the likeliest tokens, in [0, 1].
        margins: how far the likeliest tokens are before the second ones, in [0, 1].
        certainties: one minus the entropies, in units of that of the uniform distribution, in [0, 1].
    """

    log_probabilities: tuple[float, ...]
    probabilities: tuple[float, ...]
    margins: tuple[float, ...]
    certainties: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.probabilities:
            raise ValueError("A trace needs at least one token.")

    def __len__(self) -> int:
        return len(self.probabilities)


def step_confidence(logits: Tensor) -> Tensor:
    """Probability, margin and certainty `[B, 3]` of logits `[B, V]`."""
    log_p = logits.to(torch.float32).log_softmax(-1)
    p = log_p.exp()
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    entropy = torch.special.entr(p).sum(-1)
    certainty = (1 - entropy / math.log(logits.shape[-1])).clamp(0, 1)
    return torch.stack([first, first - second, certainty], dim=-1)


def class_traces(logits: Tensor) -> list[Trace]:
    """One trace a row of classification logits `[B, C]`."""
    chosen = logits.to(torch.float32).log_softmax(-1).amax(-1, keepdim=True)
    columns = torch.cat([chosen, step_confidence(logits)], dim=-1)
    return [Trace(*((value,) for value in row)) for row in columns.tolist()]


class Recorder:
    """Records what a generation thinks of its tokens; `processor` and `criterion` are passed to `generate`.

    Args:
        stops: decides from the values `[B, 3]` of `step_confidence` which rows `[B]` end with the token just written.

    Attributes:
        processor: a logits processor that changes nothing.
        criterion: a stopping criterion.
    """

    COLUMNS: ClassVar[dict[str, int]] = {"min_probability": 0, "min_margin": 1, "certainty": 2}
    """Signal of a token -> its column in the values that `stops` sees."""

    def __init__(self, stops: Callable[[Tensor], Tensor] | None = None) -> None:
        self._stops = stops
        self._log_p: Tensor | None = None
        self._steps: list[Tensor] = []
        self._latest: Tensor | None = None
        self.processor = _Processor(self)
        self.criterion = _Criterion(self)

    def read(self, scores: Tensor) -> None:
        """Read the scores `[B, V]` of the next token."""
        self._log_p = scores.to(torch.float32).log_softmax(-1)
        self._latest = step_confidence(scores)

    def wrote(self, tokens: Tensor) -> Tensor:
        """Record the tokens `[B]` that were chosen, and return which rows `[B]` are to end."""
        assert self._log_p is not None
        assert self._latest is not None
        chosen = self._log_p.gather(-1, tokens[:, None])
        self._steps.append(torch.cat([chosen, self._latest], dim=-1))
        if self._stops is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return self._stops(self._latest)

    def traces(self, lengths: list[int]) -> list[Trace]:
        """The trace of each row's first so many tokens."""
        table = torch.stack(self._steps, dim=1).cpu()
        return [Trace(*map(tuple, rows[:n].T.tolist())) for rows, n in zip(table, lengths, strict=True)]


class _Processor(LogitsProcessor):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._recorder.read(scores)
        return scores


class _Criterion(StoppingCriteria):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return self._recorder.wrote(input_ids[:, -1])
