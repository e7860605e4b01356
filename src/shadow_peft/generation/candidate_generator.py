"""The shadow as candidate generator of transformers' assisted generation, for one row.

The rule of acceptance is transformers' own (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1):

    greedy     keep the x_i that equal the base's choice up to the first that does not, then the base's choice
    sampling   keep x_i with probability min(1, p_i(x_i) / q_i(x_i)); at the first rejection draw from max(0, p - q) / sum
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessorList
from transformers.generation import CandidateGenerator

from shadow_peft.cache import ShadowCache
from shadow_peft.generation.draft_length import DraftLength
from shadow_peft.generation.drafting import Drafter, DraftingGenerationConfig, grow_draft


class ShadowCandidateGenerator(CandidateGenerator):
    """Drafts with the shadow, for transformers' assisted generation.

    Args:
        drafter: the model whose base is going to verify.
        config: `num_assistant_tokens`, its schedule, `assistant_confidence_threshold`, `do_sample`, and what the running
            generation has put there.
        logits_processor: what is done to the base's logits before a token is chosen; done to the shadow's likewise.
        model_kwargs: what travels with the generation: the cache and the attention mask.

    Raises:
        ValueError: rejected tokens cannot be cropped from the cache.
    """

    def __init__(
        self,
        drafter: Drafter,
        config: DraftingGenerationConfig,
        logits_processor: LogitsProcessorList,
        model_kwargs: dict[str, Any],
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, ShadowCache) or not cache.is_croppable:
            raise ValueError(f"use_shadow_draft needs a cache that can be cropped, this is {cache!r}.")
        self._drafter = drafter
        self._cache = cache
        self._config = config
        self._processor = logits_processor
        self._kwargs = model_kwargs
        self._most = int(config.num_assistant_tokens)
        self._max_length = int(config.max_length)
        self._vocabulary = drafter.draft_vocabulary(config, 1, cache)
        self._length = DraftLength(drafter.pass_times(config, 1, cache, self._vocabulary))
        self._num_read = 0
        self._prompt_is_read = False
        self._confidences: list[float] = []
        self._text: Tensor = torch.empty(1, 0)

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The tokens so far `[1, T]` with up to `num_assistant_tokens` more, and the logits `[1, k, V]` they were chosen by.

        The first pass of the base reads the prompt and has nothing to verify.
        """
        self._confidences, self._config.max_length = [], self._max_length
        self._read(input_ids[0])
        if not self._prompt_is_read:
            self._prompt_is_read = True
            return input_ids, None
        self._text = input_ids
        room = self._max_length - input_ids.shape[1] - 1
        draft = grow_draft(self, self._cache, self._config, self._length, min(self._most, room))
        if draft is None:
            return input_ids, None
        self._confidences = draft.confidences[0].tolist()
        return self._text, draft.logits

    def _read(self, text: Tensor) -> None:
        """Tell the vocabulary which tokens `[T]` stand behind those that it knows: the prompt, or what the base wrote."""
        if self._vocabulary is None:
            return
        tokens, self._num_read = text[self._num_read :], len(text)
        if self._prompt_is_read:
            self._vocabulary.update(tokens)
        else:
            self._vocabulary.add(tokens)

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Update the statistics and the acceptance estimate with what the base accepted."""
        accepted = min(int(num_matches), len(self._confidences))
        self._config.statistics.record(len(self._confidences), accepted)
        self._length.update([self._confidences], [accepted])

    # ---------------------------------------------------------------- what `grow_draft` asks

    @property
    def going_on(self) -> slice:
        """The one row."""
        return slice(None)

    def state_of_last(self, ahead: int) -> Tensor:
        """s `[1, 1, d]` of the text's last token; the backbone's cache holds all tokens before it."""
        assert self._cache.shadow is not None
        text, mask = self._text, self._kwargs.get("attention_mask")
        position = int(self._cache.shadow.get_seq_length())  # the text lacks the prompt where that was given as embeddings
        positions = None
        if mask is None:
            positions = torch.tensor([[position]], device=text.device)
        else:
            mask = F.pad(mask, (0, position + 1 - mask.shape[1]), value=1)
        return self._drafter.shadow_step(text[:, -1:], mask, positions, self._cache)

    def processed_logits(self, state: Tensor, ahead: int) -> Tensor:
        """The shadow's processed logits `[1, V]` of the next token."""
        logits = self._drafter.shadow_logits(state, self._cache, self._vocabulary)[:, -1].to(torch.float32)
        return self._processor(self._text, logits)

    def append(self, tokens: Tensor, ahead: int) -> bool:
        """Add a drafted token `[1]`; False if it ends the text."""
        self._text = torch.cat([self._text, tokens[:, None]], dim=-1)
        if bool(self._config.stopping_criteria(self._text, None).all()):
            self._config.max_length = self._text.shape[1]  # nothing may follow what ends the text, accepted or not
            return False
        return True
