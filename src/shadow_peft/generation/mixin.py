"""Generation of a model with a shadow, through transformers' own: both caches, and drafting as a switch of `generate`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from shadow_peft.cache import ShadowCache, num_uncached_tokens, select_cache
from shadow_peft.generation.batched import BatchedDrafting
from shadow_peft.generation.candidate_generator import ShadowCandidateGenerator
from shadow_peft.generation.draft_vocabulary import DraftVocabulary
from shadow_peft.generation.drafting import (
    DEFAULT_VOCABULARY_SIZE,
    SWITCH,
    VOCABULARY_SIZE,
    DraftedGenerateOutput,
    DraftingGenerationConfig,
    DraftStatistics,
)
from shadow_peft.generation.pass_times import PassTimes, pass_times
from shadow_peft.layers.casts import cast_once
from shadow_peft.model import ShadowPeftModel
from shadow_peft.multi_adapter.mixed import BASE
from shadow_peft.multi_adapter.row_caches import RowCaches
from shadow_peft.outputs import InferenceMode

_NAMES = "adapter_names"
"""What travels with a generation whose rows belong to different adapters."""

_OTHER_DRAFTERS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Options that ask transformers for another drafter."""


class ShadowGenerationMixin(GenerationMixin):
    """`generate` of a causal language model with a shadow; implements `generation.drafting.Drafter`.

    Attributes:
        peft_model: the adapted base.
        inference_mode: which network answers.
    """

    peft_model: ShadowPeftModel
    inference_mode: InferenceMode

    def can_generate(self) -> bool:
        """Always: a causal LM generates."""
        return True

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        use_shadow_draft: bool | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, with the shadow as draft model on request.

        Args:
            inputs: token ids `[B, T]`, or None where `input_ids` or `inputs_embeds` are among the keyword arguments.
            *args: further arguments of transformers' `generate`.
            use_shadow_draft: let the shadow draft tokens that the adapted base then verifies: the same text, or the same
                distribution when sampling, in fewer base passes. None follows the generation config.
            adapter_names: the adapter of each prompt, "__base__" for the bare base; None uses the active adapter for all.
            **kwargs: further arguments of transformers' `generate`. `num_assistant_tokens`,
                `num_assistant_tokens_schedule` and `assistant_confidence_threshold` control the drafts. The schedule
                "heuristic" adapts their length to what is accepted and to the time that passes take, so what is sampled with
                the same seed may differ from run to run; with "constant" it does not. `assistant_vocab_size`, 8192 by
                default, is the most label tokens that drafts are chosen among, see `generation.draft_vocabulary`; 0 lets
                them be chosen among all tokens.

        Returns:
            What transformers' `generate` returns; with `return_dict_in_generate` and drafts, `draft_statistics` beside it.

        Raises:
            ValueError: drafting with beams, guidance, another drafter, or a cache that cannot be cropped; drafting for a
                batch with a streamer or an ensemble (`assistant_ensemble_weight`); an unknown adapter;
                guidance for rows of several adapters; a negative `assistant_vocab_size`.
        """
        if adapter_names is not None:
            if isinstance(adapter_names, str):
                raise ValueError(f"adapter_names must hold one name a row, got {adapter_names!r}.")
            kwargs[_NAMES] = self.peft_model.row_names(adapter_names, None, len(adapter_names))
        if use_shadow_draft is not None:
            kwargs["use_shadow_draft"] = use_shadow_draft
        with cast_once():
            return super().generate(inputs, *args, **kwargs)

    # ---------------------------------------------------------------- both caches

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Whatever the base's `generate` takes is taken; only the base knows which names those are."""
        self.peft_model.base_model._validate_model_kwargs({n: v for n, v in model_kwargs.items() if n != _NAMES})

    def _expand_inputs_for_generation(self, expand_size: int = 1, **model_kwargs: Any) -> Any:
        """Repeat every row, and its adapter, for beams or several sequences."""
        ids, expanded = super()._expand_inputs_for_generation(expand_size=expand_size, **model_kwargs)
        if expanded.get(_NAMES) is not None:
            expanded[_NAMES] = tuple(name for name in expanded[_NAMES] for _ in range(expand_size))
        return ids, expanded

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Let the base prepare the kind of cache that is asked for, and add one for the backbone where it runs."""
        base, name = self.peft_model.base_model, self.peft_model.cache_name
        given = model_kwargs.pop("past_key_values", None)
        names = model_kwargs.get(_NAMES) or self.peft_model.held_names(given)
        if name is not None and given is not None:
            model_kwargs[name] = select_cache(given, self.inference_mode == "base_shadow")
        base._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        prepared = None if name is None else model_kwargs.pop(name, None)
        drafts = getattr(generation_config, SWITCH, None)
        reads_state = self.inference_mode == "shadow_only" or bool(drafts)
        if given is not None and not drafts:
            model_kwargs["past_key_values"] = given
        elif given is not None or prepared is not None:
            cache = prepared if given is None else given
            model_kwargs["past_key_values"] = self.peft_model.with_shadow_cache(cache, names, reads_state)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The base's own preparation, on the base's own cache."""
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        peft, cache, names = self.peft_model, kwargs.pop("past_key_values", None), kwargs.pop(_NAMES, None)
        attention_mask = kwargs.get("attention_mask")
        uncached_tokens = kwargs.pop("uncached_tokens", None)
        if kwargs.get("is_first_iteration") and uncached_tokens is not None:
            kwargs["next_sequence_length"] = uncached_tokens
        if cache is not None and peft.cache_name is not None:
            kwargs[peft.cache_name] = select_cache(cache, self.inference_mode == "base_shadow")
        inputs: dict[str, Any] = peft.base_model.prepare_inputs_for_generation(input_ids, **kwargs)
        if peft.cache_name is not None:
            inputs.pop(peft.cache_name, None)
        own = {"past_key_values": cache, "attention_mask": attention_mask, _NAMES: names}
        return {**inputs, **own, "output_shadow_logits": False}

    # ---------------------------------------------------------------- drafting

    def shadow_step(self, *args: Any) -> Tensor:
        """See `ShadowPeftModel.shadow_step`."""
        return self.peft_model.shadow_step(*args)

    def shadow_logits(self, state: Tensor, cache: Any = None, vocabulary: DraftVocabulary | None = None) -> Tensor:
        """The shadow's logits `[B, T, V]` of states s `[B, T, d]`, of the rows of a cache; with a vocabulary its tokens'."""
        raise NotImplementedError

    def draft_vocabulary(self, config: GenerationConfig, rows: int, cache: ShadowCache) -> DraftVocabulary | None:
        """The likely tokens of all adapters that draft.

        None where one of them was trained without labels or before they were counted, where it does not narrow the head to
        half, or where `assistant_vocab_size` is 0.
        """
        adapters = [adapter for adapter, _ in self.peft_model.drafting_adapters(cache, rows).values()]
        likely = [adapter.label_tokens.most_frequent(config.assistant_vocab_size) for adapter in adapters]
        vocab_size = self.peft_model.vocab_size
        ids = sorted({token for tokens in likely for token in tokens if token < vocab_size})
        if not all(likely) or not 0 < len(ids) <= vocab_size // 2:
            return None
        return DraftVocabulary(torch.tensor(ids, device=self.peft_model.base_model.device), vocab_size)

    def pass_times(
        self, config: GenerationConfig, rows: int, cache: ShadowCache, vocabulary: DraftVocabulary | None
    ) -> PassTimes | None:
        """What passes over so many rows, those of a cache, take; None where the length of drafts does not adapt."""
        if config.num_assistant_tokens_schedule == "constant":
            return None
        share = 1.0 if vocabulary is None else vocabulary.share
        return pass_times(self.peft_model, rows, self.peft_model.drafting_adapters(cache, rows), share)

    def drafting_rows(self, cache: ShadowCache) -> list[int] | None:
        """The rows of a cache that have a shadow; None for all."""
        if not isinstance(cache.shadow, RowCaches):
            return None
        return sorted(row for rows in cache.shadow.rows.values() for row in rows)

    def _prepare_generation_config(
        self, generation_config: Any, use_shadow_draft: bool | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Takes `use_shadow_draft` beside transformers' own flags, as an argument or from a stored generation config.

        Where nobody says how the length of drafts changes, it is "heuristic": it adapts; and then no confidence is too low
        where nobody names a threshold.
        """
        asked = (kwargs, vars(generation_config or self.generation_config), vars(self.generation_config))
        schedule, threshold = "num_assistant_tokens_schedule", "assistant_confidence_threshold"
        given = {
            name: [a[name] for a in asked if a.get(name) is not None] for name in (schedule, threshold, VOCABULARY_SIZE)
        }
        kwargs.pop(VOCABULARY_SIZE, None)
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if use_shadow_draft is not None:
            prepared.use_shadow_draft = use_shadow_draft
        prepared.num_assistant_tokens_schedule = next(iter(given[schedule]), "heuristic")
        if getattr(prepared, SWITCH, None) and prepared.num_assistant_tokens_schedule != "constant" and not given[threshold]:
            prepared.assistant_confidence_threshold = 0.0
        prepared.assistant_vocab_size = next(iter(given[VOCABULARY_SIZE]), DEFAULT_VOCABULARY_SIZE)
        if prepared.assistant_vocab_size < 0:
            raise ValueError(f"{VOCABULARY_SIZE} must be 0 or a number of tokens, got {prepared.assistant_vocab_size}.")
        if getattr(prepared, SWITCH, None):
            for other in _OTHER_DRAFTERS:
                if getattr(prepared, other, None):
                    raise ValueError(f"use_shadow_draft and {other} exclude each other: one drafter at a time.")
            if model_kwargs.get("position_ids") is not None:
                raise ValueError("use_shadow_draft counts positions from the attention mask; leave position_ids out.")
        guided = prepared.guidance_scale not in (None, 1)
        if guided and getattr(prepared, SWITCH, None):
            raise ValueError("use_shadow_draft works without guidance_scale, whose second context would have no drafts.")
        if guided and model_kwargs.get(_NAMES) is not None:
            raise ValueError("adapter_names works without guidance_scale, whose second context would have no adapters.")
        return DraftingGenerationConfig.of(prepared), model_kwargs

    def _validate_generation_mode(self, generation_mode: Any, generation_config: Any, *args: Any) -> None:
        """Several samples of a prompt are rows of a batch, which drafting takes."""
        if isinstance(generation_config, DraftingGenerationConfig):
            generation_config = copy.copy(generation_config)
            generation_config.num_return_sequences = 1
        super()._validate_generation_mode(generation_mode, generation_config, *args)

    def _assisted_decoding(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        """transformers' assisted generation; with the shadow as drafter, its statistics come back with the output."""
        drafting = isinstance(generation_config, DraftingGenerationConfig)
        kwargs["uncached_tokens"] = num_uncached_tokens(input_ids, kwargs)
        if drafting:
            bare = set(kwargs.get(_NAMES) or ()) == {BASE}
            if self.inference_mode == "shadow_only" or bare or not self.peft_model.attachment.enabled:
                raise ValueError("use_shadow_draft needs base and shadow together; one of them is switched off.")
            if kwargs.get("assistant_model") is not None:
                raise ValueError("use_shadow_draft and assistant_model exclude each other: one drafter at a time.")
            generation_config.stopping_criteria, generation_config.statistics = stopping_criteria, DraftStatistics()
            if input_ids.shape[0] > 1:
                return self._drafted_batch(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        output = super()._assisted_decoding(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        if drafting and generation_config.return_dict_in_generate:
            return DraftedGenerateOutput(**output, draft_statistics=generation_config.statistics)
        return output

    def _drafted_batch(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: DraftingGenerationConfig,
        *,
        synced_gpus: bool = False,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Drafting for several rows, see `generation.batched`; transformers' assisted generation takes one.

        Raises:
            ValueError: a streamer, ranks that decode in step, or an ensemble of drafter and base.
        """
        if generation_config.assistant_ensemble_weight is not None:
            raise ValueError("A batch that drafts works without assistant_ensemble_weight; generate row by row.")
        if streamer is not None or synced_gpus:
            raise ValueError("A batch that drafts works without streamer and without synced_gpus.")
        for unused in ("inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer", "uncached_tokens"):
            kwargs.pop(unused, None)
        return BatchedDrafting(self, generation_config, logits_processor, stopping_criteria, input_ids, kwargs).run()

    def _get_candidate_generator(self, generation_config: Any, **kwargs: Any) -> Any:
        """The shadow as drafter, where it is asked for; transformers' other drafters else."""
        if not isinstance(generation_config, DraftingGenerationConfig):
            kwargs["model_kwargs"] = {n: v for n, v in kwargs["model_kwargs"].items() if n != _NAMES}
            return super()._get_candidate_generator(generation_config=generation_config, **kwargs)
        return ShadowCandidateGenerator(self, generation_config, kwargs["logits_processor"], kwargs["model_kwargs"])
