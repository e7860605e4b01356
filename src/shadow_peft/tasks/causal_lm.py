"""ShadowForCausalLM: a language model of an adapted base and its shadow.

What is trained:

    loss = CE(logits, labels) + shadow_loss_weight * CE(shadow_logits, labels) + distillation_weight * KL(both, see `loss`)

In training neither path's logits are there unless they are asked for: the loss reads the states before the heads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from shadow_peft.backbone.explicit import returned_cache
from shadow_peft.base.task_head import TaskHead
from shadow_peft.cache import num_uncached_tokens, select_cache, shadow_only_cache
from shadow_peft.generation.batched import BatchedDrafting
from shadow_peft.generation.candidate_generator import (
    DraftedGenerateOutput,
    DraftingGenerationConfig,
    DraftStatistics,
    ShadowCandidateGenerator,
)
from shadow_peft.inputs import Call
from shadow_peft.losses.language_modeling import Logits, LogitSource, LossWeights, shifted, token_count, token_losses
from shadow_peft.model import ShadowPeftModel
from shadow_peft.tasks.base import InferenceMode, ShadowTaskModel, trainable_copy


@dataclass
class ShadowCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with the shadow's own logits.

    Attributes:
        shadow_logits: `[B, T, V]`, what the detached shadow computes alone; None where they were not asked for.
        base_loss, shadow_loss, distillation_loss: in training, the terms of `loss` before their weights, in nats per target
            of this batch, without gradient; None where a term is not computed.
    """

    shadow_logits: Tensor | None = None
    base_loss: Tensor | None = None
    shadow_loss: Tensor | None = None
    distillation_loss: Tensor | None = None


@dataclass
class _Answer:
    """What a call answers so far, and the states that the loss can read instead of logits."""

    outputs: ShadowCausalLMOutputWithPast
    base: LogitSource | None = None
    shadow: LogitSource | None = None


class ShadowForCausalLM(ShadowTaskModel, GenerationMixin):
    """A causal language model that answers with the adapted base or with the shadow alone.

    The heads `lm_head` and `shadow_lm_head` are the base's own, without a copy, unless `modules_to_save` names them: then
    each named one is a trained copy in float32.

    Args:
        peft_model: an adapted causal LM.
        shadow_loss_weight: factor of the shadow's own loss.
        inference_mode: "base_shadow" or "shadow_only".
        distillation_weight: factor of the shadow's distance from the adapted base, see `loss`.
        distillation_temperature: softens both distributions for that distance.
        distillation_warmup_ratio: first part of a training in which `distillation_weight` rises linearly from 0, since an
            adapted base that has learned nothing yet is no teacher; the trainers of `shadow_peft.training` say how far a
            training is (`training_progress`).

    Raises:
        ValueError: the base is no causal LM, or a weight or temperature out of range; see also `ShadowTaskModel`.
    """

    head_names = ("lm_head", "shadow_lm_head")
    loss_settings = (
        "shadow_loss_weight",
        "distillation_weight",
        "distillation_temperature",
        "distillation_warmup_ratio",
    )

    training_progress: float = 1.0
    """Done part of the training that runs, in [0, 1]; a trainer's `ProgressCallback` sets it."""

    def __init__(
        self,
        peft_model: ShadowPeftModel,
        *,
        shadow_loss_weight: float = 0.05,
        inference_mode: InferenceMode = "base_shadow",
        distillation_weight: float = 0.0,
        distillation_temperature: float = 1.0,
        distillation_warmup_ratio: float = 0.0,
    ) -> None:
        super().__init__(peft_model, shadow_loss_weight=shadow_loss_weight, inference_mode=inference_mode)
        LossWeights(shadow_loss_weight, distillation_weight, distillation_temperature)
        if not 0 <= distillation_warmup_ratio <= 1:
            raise ValueError(f"distillation_warmup_ratio must lie in [0, 1], got {distillation_warmup_ratio}.")
        self.distillation_weight, self.distillation_temperature = distillation_weight, distillation_temperature
        self.distillation_warmup_ratio = distillation_warmup_ratio
        if peft_model.base_model.get_output_embeddings() is None:
            raise ValueError(f"{type(peft_model.base_model).__name__} has no output embedding: it is no causal LM.")
        self.generation_config = copy.deepcopy(peft_model.base_model.generation_config)
        self._rebuild_heads()

    @classmethod
    def _owned_heads(cls, peft_model: ShadowPeftModel) -> list[str]:
        return list(peft_model.shadow_config.modules_to_save)

    @classmethod
    def _fresh_head(cls, peft_model: ShadowPeftModel, name: str) -> nn.Module:
        return trainable_copy(peft_model.base_model.get_output_embeddings())

    def _rebuild_heads(self) -> None:
        base, path, trained = self.peft_model.base_model, self.peft_model.decoder.head_input_path, self.peft_model.task_heads
        own, shadow = (trained[name] if name in trained else None for name in self.head_names)
        width = self.peft_model.decoder.hidden_size
        self._base_head = TaskHead(base, path, own, width=width)
        self._own_head = None if own is None else self._base_head
        self._shadow_head = self._base_head if own is shadow else TaskHead(base, path, shadow, width=width)

    @property
    def loss_weights(self) -> LossWeights:
        """The factors of the loss as far as the training is."""
        ratio, progress = self.distillation_warmup_ratio, self.training_progress
        risen = progress / ratio if progress < ratio else 1.0
        return LossWeights(self.shadow_loss_weight, risen * self.distillation_weight, self.distillation_temperature)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_shadow_logits: bool | None = None,
        return_dict: bool | None = None,
        output_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the next token, of the adapted base and of the shadow.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, P + T]`, 1 for tokens and 0 for padding on either side.
            position_ids: `[B, T]`; None counts them from the mask.
            past_key_values: what an earlier call returned, with P tokens, or an empty transformers cache.
            inputs_embeds: `[B, T, d]` instead of `input_ids`.
            labels: `[B, T]`, `-100` where there is none; adds `loss`.
            use_cache: return the states of both networks in `past_key_values`.
            logits_to_keep: compute the logits of the last so many tokens only, or of these positions; 0 keeps all.
            num_items_in_batch: divisor of both losses, see `loss`.
            output_shadow_logits: whether `shadow_logits` are computed; None leaves them out where training has labels, or no
                use for them.
            return_dict: False returns a tuple.
            output_logits: whether `logits` are computed; None leaves them out where training has labels.
            **kwargs: whatever else the base's forward takes; and `shift_labels` `[B, T]`, labels that are shifted already,
                which sequence parallelism passes instead of `labels`.

        Returns:
            `ShadowCausalLMOutputWithPast`. In "shadow_only", and inside `disable_adapter()` of the base, `logits` are those
            of the one network that runs.
        """
        peft = self.peft_model
        targets = kwargs.pop("shift_labels", None)  # declared, a trainer would take it for a column of the data
        if targets is None and labels is not None:
            targets = shifted(labels)
        kept = _kept(logits_to_keep)
        if targets is not None and kept is not _ALL:
            raise ValueError("A loss needs the logits of every token: pass labels without logits_to_keep.")
        call = peft.call(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs)
        if peft.base_takes("logits_to_keep"):
            kwargs["logits_to_keep"] = logits_to_keep
        lean = self.training and targets is not None
        wanted = not lean if output_logits is None else output_logits
        shadow_wanted = bool(output_shadow_logits) if lean else self.wants_shadow_logits(output_shadow_logits)
        if not peft.attachment.enabled:
            answer = _Answer(_as_ours(peft.run_base(call, kwargs)))
        elif self.inference_mode == "shadow_only":
            answer = self._alone(call, kwargs, kept, wanted)
        else:
            answer = self._together(call, kwargs, kept, wanted, shadow_wanted)
        result = answer.outputs
        if result.logits is not None and self.inference_mode == "base_shadow" and not peft.base_takes("logits_to_keep"):
            result.logits = result.logits[:, kept]
        if targets is not None:
            self._add_loss(answer, targets, num_items_in_batch)
        if not wanted:
            result.logits = None
        result = ShadowCausalLMOutputWithPast(**{f.name: getattr(result, f.name) for f in fields(result)})
        return result.to_tuple() if return_dict is False else result

    def _alone(self, call: Call, kwargs: dict[str, Any], kept: Any, wanted: bool) -> _Answer:
        """The shadow's answer; no layer of the base runs."""
        state, cache = self.peft_model.initial_state(call, kwargs)
        result = ShadowCausalLMOutputWithPast(
            past_key_values=shadow_only_cache(cache if call.cache is None else call.cache.shadow)
        )
        if wanted:
            result.logits = result.shadow_logits = self._shadow_head(state[:, kept])
        return _Answer(result, base=LogitSource(state, self._shadow_head))

    def _together(self, call: Call, kwargs: dict[str, Any], kept: Any, wanted: bool, shadow_wanted: bool) -> _Answer:
        """The adapted base's answer and the shadow's; heads compute what is wanted alone."""
        peft = self.peft_model
        state, shadow_cache = peft.initial_state(call, kwargs)
        skip_head = not wanted and self._base_head.reads_states
        catch = skip_head or self._own_head is not None
        outputs, hidden = peft.run_coupled(state, shadow_cache, call, kwargs, keep_head_input=catch)
        answer = _Answer(_as_ours(outputs))
        if hidden is not None:
            answer.base = LogitSource(hidden, self._base_head)
            answer.outputs.logits = None if skip_head else self._base_head(hidden)
        if shadow_wanted:
            answer.outputs.shadow_logits = self._shadow_head(state[:, kept])
        if self.loss_weights.need_shadow:
            answer.shadow = LogitSource(state, self._shadow_head)
        return answer

    def _add_loss(self, answer: _Answer, targets: Tensor, count: Tensor | int | None) -> None:
        """The loss from logits where they are there, else from states; in training with its terms."""
        result, base, shadow = answer.outputs, answer.base, answer.shadow
        if result.logits is not None:
            base = LogitSource(result.logits, Logits())
        if result.shadow_logits is not None and shadow is not None:
            shadow = LogitSource(result.shadow_logits, Logits())
        assert base is not None
        losses = token_losses(base, shadow, targets, count, self.loss_weights)
        result.loss = losses.total(self.loss_weights)
        if self.training:
            share = token_count(targets, count) / token_count(targets, None)
            terms = (None if term is None else term.detach() * share.to(term.device) for term in losses)
            result.base_loss, result.shadow_loss, result.distillation_loss = terms

    # ---------------------------------------------------------------- generation, through transformers' own

    def can_generate(self) -> bool:
        """Always: a causal LM generates."""
        return True

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Whatever the base's `generate` takes is taken; only the base knows which names those are."""
        self.peft_model.base_model._validate_model_kwargs(dict(model_kwargs))

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Let the base prepare the kind of cache that is asked for, and put a sibling for the backbone beside it."""
        base, name = self.peft_model.base_model, self.peft_model.cache_name
        given = model_kwargs.pop("past_key_values", None)
        if name is not None and given is not None:
            model_kwargs[name] = select_cache(given, self.inference_mode == "base_shadow")
        base._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        prepared = None if name is None else model_kwargs.pop(name, None)
        if given is not None:
            model_kwargs["past_key_values"] = given
        elif prepared is not None:
            model_kwargs["past_key_values"] = self.peft_model.with_shadow_cache(prepared)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The base's own preparation, on the base's own cache."""
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        peft, states = self.peft_model, kwargs.pop("past_key_values", None)
        attention_mask = kwargs.get("attention_mask")
        uncached_tokens = kwargs.pop("uncached_tokens", None)
        if kwargs.get("is_first_iteration") and uncached_tokens is not None:
            kwargs["next_sequence_length"] = uncached_tokens
        if states is not None and peft.cache_name is not None:
            kwargs[peft.cache_name] = select_cache(states, self.inference_mode == "base_shadow")
        inputs: dict[str, Any] = peft.base_model.prepare_inputs_for_generation(input_ids, **kwargs)
        if peft.cache_name is not None:
            inputs.pop(peft.cache_name, None)
        return {**inputs, "past_key_values": states, "attention_mask": attention_mask, "output_shadow_logits": False}

    def shadow_logits(self, state: Tensor) -> Tensor:
        """The shadow's logits `[B, T, V]` of states s `[B, T, d]`."""
        return self._shadow_head(state)

    def _prepare_generation_config(
        self, generation_config: Any, use_shadow_draft: bool | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Takes `use_shadow_draft` beside transformers' own flags, as an argument or from a stored generation config.

        Where nobody says how the length of drafts changes, it is "heuristic": it adapts.
        """
        schedule = "num_assistant_tokens_schedule"
        said = [kwargs.get(schedule), *(getattr(c, schedule, None) for c in (generation_config, self.generation_config))]
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if use_shadow_draft is not None:
            prepared.use_shadow_draft = use_shadow_draft
        prepared.num_assistant_tokens_schedule = next(filter(None, said), "heuristic")
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
            if self.inference_mode == "shadow_only" or not self.peft_model.attachment.enabled:
                raise ValueError("use_shadow_draft needs base and shadow together; one of them is switched off.")
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
        """Drafting for several rows, see `ragged`; transformers' assisted generation takes one.

        Raises:
            ValueError: a streamer, or ranks that decode in step.
        """
        if streamer is not None or synced_gpus:
            raise ValueError("A batch that drafts works without streamer and without synced_gpus.")
        for unused in ("inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer", "uncached_tokens"):
            kwargs.pop(unused, None)
        return BatchedDrafting(self, generation_config, logits_processor, stopping_criteria, input_ids, kwargs).run()

    def _get_candidate_generator(self, generation_config: Any, **kwargs: Any) -> Any:
        """The shadow as drafter, where it is asked for; transformers' other drafters else."""
        if not isinstance(generation_config, DraftingGenerationConfig):
            return super()._get_candidate_generator(generation_config=generation_config, **kwargs)
        return ShadowCandidateGenerator(self, generation_config, kwargs["logits_processor"], kwargs["model_kwargs"])

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the base's embeddings; heads that are trained copies cannot follow.

        Raises:
            ValueError: a head is a trained copy.
        """
        if len(self.peft_model.task_heads):
            raise ValueError("Resize the base's token embeddings before heads are copied for training.")
        embeddings: nn.Module = self.peft_model.base_model.resize_token_embeddings(*args, **kwargs)
        self._rebuild_heads()
        return embeddings


_ALL = slice(None)


def _kept(logits_to_keep: int | Tensor) -> Any:
    """Which tokens of a sequence `logits_to_keep` means."""
    if isinstance(logits_to_keep, int):
        return slice(-logits_to_keep, None) if logits_to_keep else _ALL
    return logits_to_keep


def _as_ours(outputs: Any) -> ShadowCausalLMOutputWithPast:
    """The base's outputs as ours."""
    return ShadowCausalLMOutputWithPast(
        logits=outputs.logits,
        past_key_values=returned_cache(outputs),
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )
