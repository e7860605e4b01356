"""One `generate` for requests that share nothing but the base: adapters, ends, sampling and seeds are each row's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from shadow_peft.multi_adapter.mixed import BASE
from shadow_peft.serving.cascading import answer_by_cascade
from shadow_peft.serving.requests import Request, Written
from shadow_peft.serving.routes import ServedModels, position_tables
from shadow_peft.serving.row_text import RowText, cut_at
from shadow_peft.tasks.causal_lm import ShadowForCausalLM

MOST_REMOTE = 32
"""Requests for which remote models are asked at once."""


class Decoder:
    """Answers batches.

    Args:
        served: the models.
        draft: let the shadows draft for greedy requests that are not streamed.
    """

    def __init__(self, served: ServedModels, draft: bool = False) -> None:
        self._served, self._draft = served, draft
        self._waiting = ThreadPoolExecutor(MOST_REMOTE, thread_name_prefix="shadow-peft-remote")

    def close(self) -> None:
        """Wait for the remote models that are still asked, each no longer than its own time limit."""
        self._waiting.shutdown()

    def kind(self, request: Request) -> tuple[str, ...]:
        """Requests of one kind may share a batch."""
        route = request.route
        if route.answering == "cascade":
            return "cascade", route.adapter, json.dumps(request.config.to_diff_dict(), sort_keys=True, default=str)
        if route.answering == "shadow" or not self._drafts(request):
            return (route.answering,)
        return "attached", "drafted"

    def together(self, waiting: Sequence[Request], most: int) -> list[Request]:
        """Of requests of one kind, oldest first, those that make the next batch; the oldest is always one of them.

        Adapters must fit into memory at once. Where positions are looked up in a table, so must the longest prompt with the
        longest answer: a row that has ended is fed until the last one ends, and its positions go on.
        """
        chosen: list[Request] = []
        loaded: set[str] = set()
        positions = min(position_tables(self._served.model), default=sys.maxsize)
        for request in waiting[: 4 * most]:
            own = {request.route.adapter} if self._served.takes_room(request.route) else set()
            fits = self._served.room is None or len(loaded | own) <= self._served.room
            if not chosen or (len(chosen) < most and fits and _longest([*chosen, request]) <= positions):
                chosen.append(request)
                loaded |= own
        return chosen

    def _drafts(self, request: Request) -> bool:
        if not self._draft or request.on_text is not None or request.route.adapter == BASE or request.config.do_sample:
            return False
        return not len(self._processors(request))

    def answer(self, batch: Sequence[Request]) -> None:
        """Answer requests of one kind; every one of them is finished afterwards, or over.

        Raises:
            Exception: whatever the model raises; the requests that are not finished have no answer then.
        """
        kind, first = self.kind(batch[0]), batch[0].route
        if first.answering == "cascade":
            answer_by_cascade(self._served.cascades[first.adapter], batch, self._waiting)
            return
        with self._served.use([request.route.adapter for request in batch]), torch.no_grad():
            if "drafted" in kind:
                self._answer_drafted(batch)
            else:
                self._answer_rows(batch, self._served.shadow if first.answering == "shadow" else self._served.attached)

    def _answer_rows(self, batch: Sequence[Request], model: PreTrainedModel) -> None:
        rows = [Row(request, self._served.tokenizer) for request in batch]
        samplers = RowProcessors([request.prompt for request in batch], [self._processors(r) for r in batch], batch)
        self._generate(
            model,
            batch,
            logits_processor=LogitsProcessorList([samplers] if samplers.needed else []),
            stopping_criteria=StoppingCriteriaList([RowEnds(rows)]),
        )

    def _answer_drafted(self, batch: Sequence[Request]) -> None:
        """Rows end where the longest does; each is cut at its own end."""
        eos = eos_of(batch[0].config)
        longest = max(len(request.prompt) for request in batch)
        sequences = self._generate(
            self._served.attached,
            batch,
            eos_token_id=eos or None,
            use_shadow_draft=True,
            stopping_criteria=StoppingCriteriaList([AllOver(batch)]),
        )
        for request, sequence in zip(batch, sequences[:, longest:].tolist(), strict=True):
            row = Row(request, self._served.tokenizer)
            any(row.take(token) for token in sequence)

    def _generate(self, model: Any, batch: Sequence[Request], eos_token_id: Any = None, **kwargs: Any) -> Any:
        ids, mask = padded([request.prompt for request in batch], batch[0].config.pad_token_id or 0, model.device)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(map(_most_new, batch)),
            pad_token_id=batch[0].config.pad_token_id,
            eos_token_id=eos_token_id,
        )
        if isinstance(model, ShadowForCausalLM):  # else it is a shadow without a base
            kwargs["adapter_names"] = [request.route.adapter for request in batch]
        return model.generate(ids, attention_mask=mask, generation_config=config, **kwargs)

    def _processors(self, request: Request) -> LogitsProcessorList:
        """What a request's own config does to logits, as transformers' `generate` would do for it alone."""
        model = self._served.attached
        config, _ = model._prepare_generation_config(request.config)
        model._prepare_special_tokens(config, True, device=model.device)
        ids = torch.tensor([request.prompt], device=model.device)
        processors: LogitsProcessorList = model._get_logits_processor(
            config, len(request.prompt), ids, None, LogitsProcessorList(), model.device, {}
        )
        return processors


class Row:
    """The answer of one row while it is written."""

    def __init__(self, request: Request, tokenizer: PreTrainedTokenizerBase) -> None:
        self._request, self._tokenizer = request, tokenizer
        self._text = RowText(tokenizer._tokenizer, request.stops, request.keep_special)
        self._tokens: list[int] = []
        self._eos = eos_of(request.config)
        self._most = _most_new(request)
        self._done = False

    def take(self, token: int) -> bool:
        """Write one more token; whether the row has ended."""
        if self._done or self._request.over:
            self._done = True
            return True
        self._tokens.append(token)
        self._request.write(self._text.push(token))
        if self._text.stopped or token in self._eos or len(self._tokens) >= self._most:
            self._finish()
        return self._done

    def _finish(self) -> None:
        self._done = True
        self._request.write(self._text.flush())
        self._request.finish(finished(self._request, self._tokenizer, self._tokens))


def _most_new(request: Request) -> int:
    return int(request.config.max_new_tokens or 1)


def _longest(batch: Sequence[Request]) -> int:
    """Tokens that the row with the longest prompt has when the longest answer ends."""
    return max(len(request.prompt) for request in batch) + max(map(_most_new, batch))


def finished(request: Request, tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> Written:
    """An answer from its tokens, cut before a stop string."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    cut = cut_at(text, request.stops)
    if cut is None:
        return Written(text, tokens)
    raw: str = tokenizer.decode(tokens)
    kept = raw[: cut_at(raw, request.stops)]
    return Written(text[:cut], list(tokenizer(kept, add_special_tokens=False)["input_ids"]))


class RowEnds(StoppingCriteria):
    """Takes each row's newest token, and ends rows one by one."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row `[B]` has ended."""
        latest = input_ids[:, -1].tolist()
        ended = [row.take(token) for row, token in zip(self._rows, latest, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


class AllOver(StoppingCriteria):
    """Ends all rows when nobody waits for any of them."""

    def __init__(self, batch: Sequence[Request]) -> None:
        self._batch = batch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row `[B]` has ended."""
        over = all(request.over for request in self._batch)
        return torch.full(input_ids.shape[:1], over, device=input_ids.device)


class RowProcessors(LogitsProcessor):
    """Processors of each row's own; a row that samples draws with its own generator, and then has one possible token.

    So a seed gives the same answer whatever else is in the batch, up to the rounding of batched sums.
    """

    def __init__(
        self, prompts: Sequence[list[int]], processors: Sequence[LogitsProcessorList], batch: Sequence[Request]
    ) -> None:
        longest = max(map(len, prompts))
        self._padding = [longest - len(prompt) for prompt in prompts]
        self._processors, self._batch = processors, batch
        self._generators = [_generator(request) if request.config.do_sample else None for request in batch]
        self.needed = any(len(own) for own in processors) or any(self._generators)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits `[B, V]` of the next token, processed row by row."""
        scores = scores.clone()
        for row, (own, generator) in enumerate(zip(self._processors, self._generators, strict=True)):
            if self._batch[row].over or not (len(own) or generator):
                continue
            scores[row] = own(input_ids[row : row + 1, self._padding[row] :], scores[row : row + 1])[0]
            if generator is not None:
                drawn = torch.multinomial(scores[row].float().softmax(-1).cpu(), 1, generator=generator)
                scores[row] = float("-inf")
                scores[row, drawn] = 0
        return scores


def _generator(request: Request) -> torch.Generator:
    generator = torch.Generator()
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)
    return generator


def eos_of(config: GenerationConfig) -> list[int]:
    """The tokens that end an answer."""
    eos = config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def padded(prompts: Sequence[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask `[B, T]`, padded on the left."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
