"""The draft loop: the shadow proposes tokens one by one, for one row or several.

    x_1 .. x_k drafted from q_i = softmax(head(s_i)); the base verifies them all in one pass

The backbone runs on every token anyway, and `head(s)` predicts the next one. The verifying pass reuses the states that
drafting computed (`cache.DraftedStates`), so no token passes the backbone twice: beside plain decoding, drafting costs one
head product per token and the tokens that are rejected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from shadow_peft.cache import DraftedStates, ShadowCache
from shadow_peft.generation.draft_length import DraftLength
from shadow_peft.generation.draft_vocabulary import DraftVocabulary
from shadow_peft.generation.pass_times import PassTimes

SWITCH = "use_shadow_draft"
"""The generation flag that turns drafting on."""
VOCABULARY_SIZE, DEFAULT_VOCABULARY_SIZE = "assistant_vocab_size", 8192
"""The generation flag for the most label tokens that drafts are chosen among, and its default."""


class Drafter(Protocol):
    """What drafting asks of a model with a shadow."""

    def shadow_step(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: ShadowCache
    ) -> Tensor:
        """s `[B, T, d]` of tokens `[B, T]` that the backbone reads ahead of the base."""

    def shadow_logits(self, state: Tensor, cache: ShadowCache, vocabulary: DraftVocabulary | None = None) -> Tensor:
        """The shadow's logits `[B, T, V]` of states s `[B, T, d]` of the rows of a cache; with a vocabulary its tokens'."""

    def draft_vocabulary(self, config: GenerationConfig, rows: int, cache: ShadowCache) -> DraftVocabulary | None:
        """The likely tokens of a generation, before it has a text; None for all tokens."""

    def pass_times(
        self, config: GenerationConfig, rows: int, cache: ShadowCache, vocabulary: DraftVocabulary | None
    ) -> PassTimes | None:
        """What passes over so many rows, those of a cache, take; None where the length of drafts does not adapt."""

    def drafting_rows(self, cache: ShadowCache) -> list[int] | None:
        """The rows of a cache that have a shadow; None for all."""


class DraftingGenerationConfig(GenerationConfig):
    """A generation config in which `use_shadow_draft` counts as a way of assisted generation.

    Attributes:
        use_shadow_draft: True.
        assistant_vocab_size: the most label tokens that drafts are chosen among; 0 for the whole vocabulary.
        stopping_criteria: what ends the running generation.
        statistics: what becomes of its drafts.
    """

    use_shadow_draft: bool
    assistant_vocab_size: int
    stopping_criteria: StoppingCriteriaList
    statistics: DraftStatistics

    @classmethod
    def of(cls, config: GenerationConfig) -> GenerationConfig:
        """The same config, in this class if drafting is asked for."""
        if getattr(config, SWITCH, None):
            config.__class__ = cls
        return config

    def get_generation_mode(self, assistant_model: Any = None) -> GenerationMode:
        """Assisted generation where greedy decoding or sampling is asked for.

        Raises:
            ValueError: another way of decoding is asked for.
        """
        mode = super().get_generation_mode(assistant_model or self.use_shadow_draft)
        if mode != GenerationMode.ASSISTED_GENERATION:
            raise ValueError(f"use_shadow_draft works with greedy decoding and sampling, not with {mode.value}.")
        return mode


@dataclass
class DraftStatistics:
    """What became of the drafts of one generation.

    Attributes:
        base_passes: forward passes of the base, the one over the prompt included.
        drafted: tokens that the shadow drafted.
        accepted: drafted tokens that the base accepted.
        accepted_at: how often the token at each position of a draft was accepted.
        drafted_at: how often a token was drafted at each position.
    """

    base_passes: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    drafted_at: list[int] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        """Share of drafted tokens that were accepted; 0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_base_pass(self) -> float:
        """Tokens won by a base pass: the accepted ones and the base's own."""
        return (self.accepted + self.base_passes) / self.base_passes if self.base_passes else 0.0

    def record(self, drafted: int, accepted: int) -> None:
        """Count one base pass over a draft."""
        self.base_passes += 1
        self.drafted += drafted
        self.accepted += accepted
        for counts, number in ((self.drafted_at, drafted), (self.accepted_at, accepted)):
            counts.extend([0] * (drafted - len(counts)))
            for position in range(number):
                counts[position] += 1


@dataclass
class DraftedGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(use_shadow_draft=True, return_dict_in_generate=True)` returns.

    Attributes:
        draft_statistics: what became of the drafts.
    """

    draft_statistics: DraftStatistics | None = None


@dataclass(frozen=True)
class Draft:
    """What the shadow proposes to B rows.

    Attributes:
        tokens: `[B, k]`.
        logits: the processed logits `[B, k, V]` that they were chosen by.
        confidences: the shadow's own probability of its likeliest token, `[B, k]`.
    """

    tokens: Tensor
    logits: Tensor
    confidences: Tensor

    @classmethod
    def empty(cls, rows: int, vocab_size: int, device: torch.device) -> Draft:
        """A draft of no tokens."""
        tokens = torch.empty(rows, 0, dtype=torch.long, device=device)
        return cls(tokens, torch.empty(rows, 0, vocab_size, device=device), torch.empty(rows, 0, device=device))


class GrowingTexts(Protocol):
    """The texts of B rows while a draft grows behind them."""

    def state_of_last(self, ahead: int) -> Tensor:
        """s `[B, 1, d]` of each row's last token, `ahead` tokens being drafted already."""

    def processed_logits(self, state: Tensor, ahead: int) -> Tensor:
        """The shadow's processed logits `[B, V]` of the next token."""

    def append(self, tokens: Tensor, ahead: int) -> bool:
        """Add a drafted token `[B]` to each row; False if nothing may follow it."""

    @property
    def going_on(self) -> Tensor | slice:
        """Rows `[B]` whose confidence counts, as booleans; a slice takes all."""


def grow_draft(
    texts: GrowingTexts, cache: ShadowCache, config: GenerationConfig, length: DraftLength, max_steps: int
) -> Draft | None:
    """Draft up to `max_steps` tokens for every row, and leave their states in the cache.

    Args:
        texts: the rows.
        cache: takes the states of the tokens that the backbone has read ahead of the base.
        config: `do_sample` and `assistant_confidence_threshold`.
        length: decides whether another token is worth its cost, and takes the time.
        max_steps: the most tokens to draft.

    Returns:
        The draft, or None without a token.
    """
    states: list[Tensor] = []
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    length.begin()
    for ahead in range(max_steps):
        if not length.drafts():
            break
        states.append(texts.state_of_last(ahead))
        logits = texts.processed_logits(states[-1], ahead)
        confidence = logits.softmax(-1).amax(-1)
        counted = confidence[texts.going_on]
        if not length.verifies(counted):  # decided before a token is drawn, or sampling would be biased
            break
        token = choose(logits, bool(config.do_sample))
        columns.append((token, logits, confidence))
        if not texts.append(token, ahead) or float(counted.max()) < (config.assistant_confidence_threshold or 0.0):
            break
    length.end()
    cache.drafted = DraftedStates(torch.cat(states, dim=1)) if states else None
    return Draft(*(torch.stack(column, 1) for column in zip(*columns, strict=True))) if columns else None


def choose(logits: Tensor, do_sample: bool) -> Tensor:
    """A token `[B]` of processed logits `[B, V]`: sampled, or the likeliest."""
    return torch.multinomial(logits.softmax(-1), num_samples=1)[:, 0] if do_sample else logits.argmax(-1)
