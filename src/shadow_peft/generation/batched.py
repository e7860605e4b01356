"""Drafting for a batch: every row keeps its own accepted length.

transformers' assisted generation takes one row. Here one pass of the base verifies the drafts of all rows, of which every
row accepts another number. Afterwards each row is shifted to the right by the number of tokens that it lost, so that the
tokens of all rows end together again, and the gap on the left is masked as padding:

    row 0   p p p a b c | x y z    all accepted      p p p a b c x y z
    row 1   . p p a b c | x y z    one accepted      . . . p p a b c x

So positions, sliding windows and attention kernels see an ordinary batch that is padded on the left, and the result is that
of ordinary decoding of such a batch. Logits processors and stopping criteria see every row's text in the layout of ordinary
decoding: the prompts as they were given, followed by what was generated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from shadow_peft.cache import ShadowCache
from shadow_peft.generation.draft_length import DraftLength
from shadow_peft.generation.drafting import (
    Draft,
    DraftedGenerateOutput,
    Drafter,
    DraftingGenerationConfig,
    grow_draft,
)
from shadow_peft.generation.row_texts import RowTexts, for_rows
from shadow_peft.multi_adapter.row_caches import RowCaches
from shadow_peft.multi_adapter.rows import select_rows


class BatchDrafter(Drafter, Protocol):
    """What batched drafting asks of a model: drafting, and the steps of transformers' own decoding."""

    def __call__(self, **inputs: Any) -> Any:
        """A forward pass of the adapted base."""

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> Any: ...

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The arguments of the next forward pass."""

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], num_new_tokens: int = 1
    ) -> dict[str, Any]: ...


def accept(draft: Draft, logits: Tensor, do_sample: bool) -> tuple[Tensor, Tensor]:
    """How much of each row's draft is kept, and the base's own token behind it.

    Greedy keeps what the base would choose itself. Sampling keeps token x with probability min(1, p(x) / q(x)) and, at the
    first rejection, draws from max(0, p - q), normalised (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).

    Args:
        draft: k tokens per row.
        logits: the base's processed logits `[B, k + 1, V]`.
        do_sample: sample instead of taking the likeliest token.

    Returns:
        Accepted tokens per row `[B]`, 0 to k, and the next token `[B]`.
    """
    rows = torch.arange(logits.shape[0], device=logits.device)
    if not do_sample:
        choices = logits.argmax(-1)
        accepted = draft.tokens.eq(choices[:, :-1]).cumprod(-1).sum(-1)
        return accepted, choices[rows, accepted]
    p, q = logits.softmax(-1), F.pad(draft.logits.softmax(-1), (0, 0, 0, 1))  # behind the draft q is 0, and p remains
    chances = (p[:, :-1] / q[:, :-1]).gather(-1, draft.tokens[..., None])[..., 0]
    accepted = torch.rand_like(chances).lt(chances).cumprod(-1).sum(-1)
    rest = (p - q)[rows, accepted].clamp(min=0)
    return accepted, torch.multinomial(rest, num_samples=1)[:, 0]


class BatchedDrafting:
    """One generation of several rows with the shadow as drafter.

    Args:
        model: the model whose base verifies.
        config: lengths, drafting and sampling settings, and the statistics to fill: passes are counted for every row that
            they advance.
        processor: what is done to logits before a token is chosen.
        criteria: what ends a row.
        prompts: `[B, T]`, padded on the left.
        model_kwargs: what travels with the generation.

    Raises:
        ValueError: a cache whose rows cannot be shifted, or something is asked for that a drafted batch does not have.
    """

    def __init__(
        self,
        model: BatchDrafter,
        config: DraftingGenerationConfig,
        processor: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        prompts: Tensor,
        model_kwargs: dict[str, Any],
    ) -> None:
        if config.output_attentions or config.output_hidden_states:
            raise ValueError("A batch that drafts returns no attentions and no hidden states; generate row by row.")
        self._cache = require_shiftable(model_kwargs.get("past_key_values"))
        self._model, self._config, self._processor, self._criteria = model, config, processor, criteria
        self._kwargs = model_kwargs
        self._texts = RowTexts(prompts)
        self._ends = torch.zeros_like(self._texts.lengths)
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._vocabulary = model.draft_vocabulary(config, len(prompts), self._cache)
        if self._vocabulary is not None:
            self._vocabulary.add(prompts.flatten())
        self._length = DraftLength(model.pass_times(config, len(prompts), self._cache, self._vocabulary))
        self._drafting_rows = model.drafting_rows(self._cache)
        self._written: list[DecodedStep] = []

    def run(self) -> Any:
        """Decode every row to its end.

        Returns:
            The sequences `[B, M]`, rows that ended early padded on the right; as a `DraftedGenerateOutput` if the config
            asks for one. It holds no cache, and the one that was used is emptied: its rows are aligned otherwise than the
            sequences.
        """
        self._read_prompts()
        while bool(self._live.any()):
            self._verify(self._draft())
        self._cache.reset()
        length = int(self._ends.max())
        sequences = self._texts.tokens[:, :length]
        if self._pads:
            behind = torch.arange(length, device=sequences.device) >= self._ends[:, None]
            sequences = torch.where(behind, self._config._pad_token_tensor.to(sequences.device), sequences)
        if not self._config.return_dict_in_generate:
            return sequences
        return DraftedGenerateOutput(
            sequences=sequences,
            scores=self._columns("scores", length) if self._config.output_scores else None,
            logits=self._columns("logits", length) if self._config.output_logits else None,
            draft_statistics=self._config.statistics,
        )

    @property
    def _live(self) -> Tensor:
        """Rows `[B]` that go on: those that have not ended. Where no token ends a text, all go on until the last has."""
        if self._pads:
            return self._ends.eq(0)
        return self._texts.lengths < (self._ends.max() if bool(self._ends.all()) else self._config.max_length)

    def _read_prompts(self) -> None:
        """One pass of the base over the prompts; every row has its first token then."""
        prompts, kwargs = self._texts.tokens, self._kwargs
        outputs = self._model._prefill(prompts, self._config, kwargs)
        self._cache.activate_past_recording()
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = prompts.new_ones(len(self._ends), self._cache.get_seq_length())
        logits = outputs.logits[:, -1:].to(torch.float32)
        self._take(Draft.empty(len(prompts), 1, prompts.device), logits)
        self._advance(outputs, mask, 1)

    def _draft(self) -> Draft:
        """Up to `num_assistant_tokens` tokens for every row, while they are worth their cost."""
        config, texts = self._config, self._texts
        room = int((config.max_length - texts.lengths[self._live]).max()) - 1
        most = min(int(config.num_assistant_tokens), room) if bool(self.going_on.any()) else 0
        draft = grow_draft(self, self._cache, config, self._length, most)
        if draft is None:
            return Draft.empty(len(texts.lengths), 1, texts.tokens.device)
        return draft

    @property
    def going_on(self) -> Tensor:
        """Rows `[B]` that have not ended and have a shadow; what the others draft is a guess that the base rejects."""
        return self._with_shadow(self._live)

    def _with_shadow(self, rows: Tensor) -> Tensor:
        """Those of some rows `[B]` that have a shadow."""
        if self._drafting_rows is None:
            return rows
        drafts = torch.zeros_like(rows)
        drafts[self._drafting_rows] = True
        return rows & drafts

    def state_of_last(self, ahead: int) -> Tensor:
        """s `[B, 1, d]` of each row's last token, `ahead` tokens being drafted already."""
        mask = self._with_new(self._kwargs["attention_mask"], ahead)
        return self._model.shadow_step(self._texts.last(ahead), mask, last_positions(mask, 1), self._cache)

    def processed_logits(self, state: Tensor, ahead: int) -> Tensor:
        """The shadow's processed logits `[B, V]` of the next token."""
        return self._processed(self._model.shadow_logits(state, self._cache, self._vocabulary)[:, -1], ahead)

    def append(self, tokens: Tensor, ahead: int) -> bool:
        """Write a drafted token `[B]` behind each row's text; what ends a row is decided when it is verified."""
        self._texts.put(tokens, ahead)
        return True

    def _verify(self, draft: Draft) -> None:
        """One pass of the base over all drafts; rows take what they accept and are shifted to end together again."""
        count = draft.tokens.shape[1]
        mask = self._with_new(self._kwargs["attention_mask"], count)
        tokens = torch.cat([self._texts.last(), draft.tokens], 1)
        inputs = self._model.prepare_inputs_for_generation(
            tokens, next_sequence_length=count + 1, is_first_iteration=False, **{**self._kwargs, "attention_mask": mask}
        )
        inputs |= {"logits_to_keep": 0, "position_ids": last_positions(mask, count + 1)}
        outputs = self._model(**inputs, return_dict=True)
        live = self._live
        rejected = count + 1 - self._take(draft, outputs.logits.to(torch.float32))
        least = int(rejected[live].min())
        lost = (rejected - least).masked_fill(~live, 0)
        if bool(lost.any()):
            mask = shifted(mask, lost)
            shift_rows(self._cache, lost)
        self._cache.crop(-least)
        self._advance(outputs, mask[:, : mask.shape[1] - least], count + 1 - least)

    def _take(self, draft: Draft, logits: Tensor) -> Tensor:
        """Take what each row accepts and the base's token behind it, up to the row's end.

        Args:
            draft: k tokens per row.
            logits: the base's logits `[B, k + 1, V]`, in float32.

        Returns:
            Tokens per row that it took, `[B]`, 1 to k + 1; of no meaning where a row is not live.
        """
        texts, live, count = self._texts, self._live, draft.tokens.shape[1]
        processed = torch.stack([self._processed(logits[:, i], i) for i in range(count + 1)], 1)
        if count == 0:
            draft = Draft.empty(len(processed), processed.shape[-1], processed.device)
        accepted, token = accept(draft, processed, bool(self._config.do_sample))
        texts.put(token, accepted)
        scores = processed if self._config.output_scores else None
        raw = logits if self._config.output_logits else None
        self._written.append(DecodedStep(texts.lengths, (accepted + 1) * live, scores, raw))
        taken = self._up_to_ends(accepted + 1, live)
        self._written[-1] = replace(self._written[-1], counts=taken * live)
        drafting, kept = self._with_shadow(live), taken - 1
        for row in live.nonzero()[:, 0].tolist():
            number = int(kept[row])
            self._config.statistics.record(count if drafting[row] else number, number)
        self._length.update(draft.confidences[drafting].tolist(), kept[drafting].tolist())
        if self._vocabulary is not None:
            self._vocabulary.update(texts.written(taken * self._with_shadow(live)))
        texts.lengths = texts.lengths + taken * live
        return taken

    def _up_to_ends(self, taken: Tensor, live: Tensor) -> Tensor:
        """Of newly written tokens `[B]` the number up to each row's end, which is recorded."""
        lengths = self._texts.lengths
        taken = torch.minimum(taken, (self._config.max_length - lengths).clamp(min=1))
        for ahead in range(1, int(taken[live].max()) + 1):
            may_end = live & self._ends.eq(0) & taken.ge(ahead)
            if not bool(may_end.any()):
                continue
            ended = self._texts.each(ahead, may_end, lambda text, rows: self._criteria(text, self._scores(text, rows)))
            self._ends = torch.where(ended, lengths + ahead, self._ends)
            if self._pads:
                taken = torch.where(ended, ahead, taken)
        return taken

    def _advance(self, outputs: Any, mask: Tensor, columns: int) -> None:
        """What travels on: the mask `[B, W]` of the cached tokens and one more, and what else the base wants."""
        update = self._model._update_model_kwargs_for_generation
        kwargs = update(outputs, {**self._kwargs, "attention_mask": mask}, num_new_tokens=columns)
        kwargs.pop("position_ids", None)  # they follow from the mask, row by row
        self._kwargs = {**kwargs, "attention_mask": self._with_new(mask, 1)}

    def _with_new(self, mask: Tensor, columns: int) -> Tensor:
        """A mask `[B, W]` with new columns; a row reads them up to its longest end, so no position lies behind that."""
        room = (self._config.max_length - self._texts.lengths) * self._live
        new = torch.arange(columns, device=mask.device) < room[:, None]
        return torch.cat([mask, new.to(mask.dtype)], 1)

    def _processed(self, logits: Tensor, ahead: int) -> Tensor:
        """Logits `[B, V]` of the token `ahead` places behind each row's text, processed with the text up to there."""
        logits = logits.to(torch.float32)
        live = self._live
        if not len(self._processor) or not bool(live.any()):
            return logits
        return self._texts.each(ahead, live, lambda text, rows: for_rows(self._processor, rows)(text, logits.clone()))

    def _scores(self, text: Tensor, rows: Tensor) -> tuple[Tensor, ...] | None:
        """The scores `[B, V]` of every token of these texts, where the config asks for scores."""
        if not self._config.output_scores:
            return None
        columns = self._columns("scores", text.shape[1])
        return tuple(torch.where(rows[:, None], column, column[rows][:1]) for column in columns)

    def _columns(self, name: str, length: int) -> tuple[Tensor, ...]:
        """Scores or logits `[B, V]` of every written place; zero where a row had ended."""
        first = int(self._written[0].lengths[0])
        like = getattr(self._written[0], name)
        whole = like.new_zeros(len(self._ends), length - first, like.shape[-1])
        for written in self._written:
            for row, (start, count) in enumerate(zip(written.lengths.tolist(), written.counts.tolist(), strict=True)):
                kept = max(0, min(start + count, length) - start)
                whole[row, start - first : start - first + kept] = getattr(written, name)[row, :kept]
        return whole.unbind(1)


def last_positions(mask: Tensor, columns: int) -> Tensor:
    """Positions `[B, columns]` of the last columns of a mask; what a row does not read stands where its last token does."""
    return (mask.long().cumsum(-1) - 1)[:, -columns:].clamp(min=0)


@dataclass(frozen=True)
class DecodedStep:
    """What one pass wrote: from each row's length `[B]` on `counts` `[B]` tokens.

    Scores and logits `[B, k + 1, V]` are kept where the config asks for them, for they take most of the memory.
    """

    lengths: Tensor
    counts: Tensor
    scores: Tensor | None
    logits: Tensor | None


def require_shiftable(cache: Any) -> ShadowCache:
    """The cache itself, if the rows of all its layers can be shifted.

    Raises:
        ValueError: they cannot.
    """
    if (
        isinstance(cache, ShadowCache)
        and not any(part.offloading for part in (cache.base, cache.shadow) if part is not None)
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    ):
        return cache
    raise ValueError(f"use_shadow_draft for a batch needs a dynamic cache of attention layers alone, this is {cache!r}.")


def shift_rows(cache: ShadowCache, lost: Tensor) -> None:
    """Shift the rows of a cache to the right by `lost` `[B]` tokens each; what falls off the end is gone."""
    assert cache.base is not None
    parts: list[tuple[Cache, list[int] | None]] = [(cache.base, None)]
    if isinstance(cache.shadow, RowCaches):
        parts += [(part, cache.shadow.rows[name]) for name, part in cache.shadow.parts.items()]
    else:
        parts.append((cache.shadow, None))
    for part, rows in parts:
        own = select_rows(lost, rows)
        for layer in part.layers:
            if layer.is_initialized:
                layer.keys, layer.values = shifted(layer.keys, own, -2), shifted(layer.values, own, -2)


def shifted(tensor: Tensor, lost: Tensor, dim: int = -1) -> Tensor:
    """Rows moved to the right along `dim` by `lost` `[B]` places each, zeros behind them; whole blocks are copied."""
    result = tensor.clone()
    for row, count in enumerate(lost.tolist()):
        if count:
            kept = tensor.shape[dim] - count
            result[row].narrow(dim, 0, count).zero_()
            result[row].narrow(dim, count, kept).copy_(tensor[row].narrow(dim, 0, kept))
    return result
