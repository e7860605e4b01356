"""The texts of a batch whose rows grow at their own pace, shown to processors as ordinary decoding shows them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessorList
from transformers.generation import PrefixConstrainedLogitsProcessor


class RowTexts:
    """The texts of B rows.

    Args:
        prompts: token ids `[B, T]`, padded on the left.

    Attributes:
        tokens: `[B, M]`; behind a row's length are drafted tokens, or meaningless ones.
        lengths: `[B]`.
    """

    def __init__(self, prompts: Tensor) -> None:
        self.tokens = prompts
        self.lengths = torch.full((prompts.shape[0],), prompts.shape[1], device=prompts.device)

    def last(self, ahead: int = 0) -> Tensor:
        """The last token of each row, `[B, 1]`, counting `ahead` drafted ones."""
        return self.tokens.gather(1, self.lengths[:, None] - 1 + ahead)

    def put(self, tokens: Tensor, ahead: int | Tensor) -> None:
        """Write a token `[B]` `ahead` places behind each row's text, without making the text longer."""
        places = self.lengths + ahead
        missing = max(0, int(places.max()) + 1 - self.tokens.shape[1])
        self.tokens = F.pad(self.tokens, (0, missing)).scatter(1, places[:, None], tokens[:, None])

    def written(self, counts: Tensor) -> Tensor:
        """The `counts` `[B]` tokens behind each row's text, of all rows one after another."""
        places = torch.arange(self.tokens.shape[1], device=counts.device) - self.lengths[:, None]
        return self.tokens[places.ge(0) & places.lt(counts[:, None])]

    def each(self, ahead: int, chosen: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The result of a function of each chosen row's text with `ahead` tokens more, one length after another.

        Processors may keep something per row, so a function always sees B texts; other rows are replaced by a copy of
        one of the rows in question, since nobody wrote what they would show.

        Args:
            ahead: tokens behind each row's text that count as text.
            chosen: rows `[B]`, as booleans, at least one.
            function: takes texts `[B, length]` and the rows `[B]` in question, as booleans; returns `[B, ...]`.

        Returns:
            `[B, ...]`; zeros for rows that were not chosen.
        """
        lengths = self.lengths + ahead
        results: Tensor | None = None
        for length in lengths[chosen].unique().tolist():
            rows = lengths.eq(length) & chosen
            texts = self.tokens[:, :length]
            if not bool(rows.all()):
                texts = torch.where(rows[:, None], texts, texts[rows][:1])
            part = function(texts, rows)
            results = torch.zeros_like(part) if results is None else results
            results[rows] = part[rows]
        assert results is not None
        return results


def for_rows(processors: LogitsProcessorList, rows: Tensor) -> LogitsProcessorList:
    """The processors for texts of which only some rows `[B]` count: a prefix function is asked about those alone."""
    if bool(rows.all()):
        return processors
    return LogitsProcessorList(
        _asked_about(p, rows.tolist()) if isinstance(p, PrefixConstrainedLogitsProcessor) else p for p in processors
    )


def _asked_about(processor: PrefixConstrainedLogitsProcessor, rows: list[bool]) -> PrefixConstrainedLogitsProcessor:
    own = copy.copy(processor)
    allowed = processor._prefix_allowed_tokens_fn
    own._prefix_allowed_tokens_fn = lambda row, text: allowed(row, text) if rows[row] else [0]
    return own
