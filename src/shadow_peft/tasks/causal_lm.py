"""ShadowForCausalLM: a causal language model of an adapted base and its shadow.

    loss = CE(logits, labels) + shadow_loss_weight * CE(shadow_logits, labels) + distillation_weight * KL      see `losses`

In training with labels, neither network's logits are computed unless they are asked for: the loss reads the hidden states
before the heads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.base.task_head import TaskHead
from shadow_peft.generation.draft_vocabulary import DraftVocabulary
from shadow_peft.generation.mixin import ShadowGenerationMixin
from shadow_peft.inputs import ModelInputs
from shadow_peft.losses.language_modeling import (
    Logits,
    LogitSource,
    LossWeights,
    TokenLosses,
    shifted,
    token_losses,
    total_losses,
)
from shadow_peft.losses.reduction import token_count
from shadow_peft.model import ShadowPeftModel
from shadow_peft.multi_adapter.rows import select_rows
from shadow_peft.outputs import AdaptedOutput, InferenceMode
from shadow_peft.tasks.base import ShadowTaskModel, trainable_copy
from shadow_peft.tasks.heads import LanguageHeads, Pair, RowHeads


@dataclass
class ShadowCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with the shadow's own logits.

    Attributes:
        shadow_logits: `[B, T, V]`, the logits that the detached shadow computes; None if they were not computed.
        base_loss: in training, the first term of `loss`, in nats per target of this batch, without gradient; else None.
        shadow_loss: likewise the shadow's term before its weight.
        distillation_loss: likewise the distillation term before its weight.
    """

    shadow_logits: Tensor | None = None
    base_loss: Tensor | None = None
    shadow_loss: Tensor | None = None
    distillation_loss: Tensor | None = None


class ShadowForCausalLM(ShadowGenerationMixin, ShadowTaskModel):
    """A causal language model whose logits are those of the adapted base or of the shadow alone.

    The heads `lm_head` and `shadow_lm_head` are the base's own head, without a copy. A head that `modules_to_save` names is
    a trained copy in float32, or float64 on a float64 base.

    Args:
        peft_model: an adapted causal LM.
        shadow_loss_weight: factor of the shadow's own loss.
        inference_mode: "base_shadow" or "shadow_only".
        distillation_weight: factor of the KL divergence of the shadow (student) from the adapted base (teacher).
        distillation_temperature: temperature of both distributions of that divergence.
        distillation_warmup_ratio: fraction of the training in which `distillation_weight` rises linearly from 0, since an
            adapted base that has learned nothing yet is no teacher. The trainers of `shadow_peft.training` report the
            progress of the training (`training_progress`).

    Raises:
        TypeError: `peft_model` is no `ShadowPeftModel`.
        ValueError: the base is no causal LM, a weight or temperature is out of range, the mode is unknown, or
            `modules_to_save` names a head that a causal LM does not have.
    """

    head_names = ("lm_head", "shadow_lm_head")
    loss_settings = (
        "shadow_loss_weight",
        "distillation_weight",
        "distillation_temperature",
        "distillation_warmup_ratio",
    )

    training_progress: float = 1.0
    """Fraction of the running training that is done, in [0, 1]; a trainer's `ProgressCallback` sets it."""

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
    def _owned_heads(cls, adapter: ShadowAdapter) -> list[str]:
        return list(adapter.shadow_config.modules_to_save)

    @classmethod
    def _fresh_head(cls, adapter: ShadowAdapter, name: str) -> nn.Module:
        return trainable_copy(adapter.base_model.get_output_embeddings())

    @property
    def lm_head(self) -> nn.Module:
        """The output embedding `[V, d]` of the adapted base's logits; the base's own, or its trained copy."""
        return self._output_embedding("lm_head")

    @property
    def shadow_lm_head(self) -> nn.Module:
        """The output embedding `[V, d]` of the shadow's logits; the base's own, or its trained copy."""
        return self._output_embedding("shadow_lm_head")

    def _output_embedding(self, name: str) -> nn.Module:
        trained = self.peft_model.task_heads
        own: nn.Module = self.peft_model.base_model.get_output_embeddings()
        return trained[name] if name in trained else own

    def _rebuild_heads(self) -> None:
        """Build the functions from hidden states to logits, see `tasks.heads`."""
        self._heads = LanguageHeads(self.peft_model)
        self._base_selects_tokens = self.peft_model.base_takes("logits_to_keep")

    @property
    def loss_weights(self) -> LossWeights:
        """The factors of the loss: in training at its present progress, in evaluation the final ones."""
        ratio, progress = self.distillation_warmup_ratio, self.training_progress
        risen = progress / ratio if self.training and progress < ratio else 1.0
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
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the next token, of the adapted base and of the shadow.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, P + T]`, 1 for tokens and 0 for padding on either side.
            position_ids: `[B, T]`; None counts them from the mask.
            past_key_values: the cache that an earlier call returned, with P tokens, or an empty transformers cache.
            inputs_embeds: `[B, T, d]` instead of `input_ids`.
            labels: `[B, T]`, `-100` where there is none; adds `loss`.
            use_cache: return the cache of both networks in `past_key_values`; None follows the base's config in inference
                and is False in training.
            logits_to_keep: compute the logits of this many last tokens only, or of these positions; 0 is all of them.
            num_items_in_batch: divisor of both losses: the number of targets of the whole optimizer step.
            output_shadow_logits: whether to compute `shadow_logits`; None is False in training with labels or without a
                shadow loss, else True.
            return_dict: False returns a tuple.
            output_logits: whether to compute `logits`; None is False in training with labels, else True.
            adapter_names: the adapter of each row, "__base__" for the bare base, whose rows have shadow logits 0 and no
                shadow loss; None uses the active adapter for all rows, or those of the cache.
            **kwargs: further arguments of the base's forward; and `shift_labels` `[B, T]`, labels that are shifted already,
                which sequence parallelism passes instead of `labels`.

        Returns:
            `ShadowCausalLMOutputWithPast`. In "shadow_only", and inside `disable_adapter()`, `logits` are those of the one
            network that runs. In "shadow_only", `output_hidden_states` asks for the state s as `hidden_states[0]`.

        Raises:
            ValueError: no tokens, labels together with `logits_to_keep`, or a cache that does not fit.
        """
        if self._heads.are_outdated:
            self._rebuild_heads()  # it was replaced, for example by resizing the vocabulary
        targets = kwargs.pop("shift_labels", None)  # undeclared, or a trainer would look for a column of this name
        if targets is None and labels is not None:
            targets = shifted(labels)
        kept = _kept(logits_to_keep)
        if targets is not None and kept is not _ALL:
            raise ValueError("A loss needs the logits of every token: pass labels without logits_to_keep.")
        if self._base_selects_tokens:
            kwargs["logits_to_keep"] = logits_to_keep
        loss_only = self.training and targets is not None
        wanted = not loss_only if output_logits is None else output_logits
        shadow_wanted = bool(output_shadow_logits) if loss_only else self.wants_shadow_logits(output_shadow_logits)

        past_key_values = self.peft_model.given_cache(past_key_values, kwargs)
        inputs = ModelInputs(input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, kwargs)
        names = self.peft_model.row_names(adapter_names, past_key_values, inputs.checked().num_rows)
        if loss_only:
            self.peft_model.count_label_tokens(targets, names)
        heads = self._heads.rows(names)
        skips_logits = not wanted and all(pair.base.reads_states for _, pair in heads.groups)
        adapted = self.peft_model.run(
            replace(inputs, adapter_names=names),
            self.inference_mode,
            keep_head_input=skips_logits or self._heads.replaces_base(names),
            reads_state=shadow_wanted or (targets is not None and self.loss_weights.need_shadow),
        )
        result = self._with_logits(adapted, heads, kept, wanted, shadow_wanted)
        if adapted.base is None and kwargs.get("output_hidden_states"):
            result.hidden_states = (adapted.shadow_state,)
        if targets is not None:
            self._add_loss(result, adapted, heads, targets, num_items_in_batch)
        if not wanted:
            result.logits = None
        result = ShadowCausalLMOutputWithPast(**{f.name: getattr(result, f.name) for f in fields(result)})
        return result.to_tuple() if return_dict is False else result

    def _with_logits(
        self, adapted: AdaptedOutput, heads: RowHeads[TaskHead], kept: Any, wanted: bool, shadow_wanted: bool
    ) -> ShadowCausalLMOutputWithPast:
        """The outputs with the wanted logits of the kept tokens."""
        result = ShadowCausalLMOutputWithPast(past_key_values=adapted.cache)
        state = adapted.shadow_state
        if adapted.base is None:
            assert state is not None
            if wanted:
                result.logits = result.shadow_logits = heads.shadow_logits(state[:, kept])
            return result
        result.hidden_states, result.attentions = adapted.base.get("hidden_states"), adapted.base.get("attentions")
        if adapted.head_input is None:
            result.logits = adapted.base.logits if self._base_selects_tokens else adapted.base.logits[:, kept]
        elif wanted:
            result.logits = heads.base_logits(adapted.head_input[:, kept])
        if state is not None and shadow_wanted:
            result.shadow_logits = heads.shadow_logits(state[:, kept])
        return result

    def _add_loss(
        self,
        result: ShadowCausalLMOutputWithPast,
        adapted: AdaptedOutput,
        heads: RowHeads[TaskHead],
        targets: Tensor,
        count: Tensor | int | None,
    ) -> None:
        """Add the loss, from logits where they were computed and else from states; in training also its terms."""
        divisor = count if len(heads.groups) == 1 else token_count(targets, count)
        losses = total_losses(
            [
                self._losses_of(result, adapted, rows, pair, select_rows(targets, rows), divisor)
                for rows, pair in heads.groups
            ]
        )
        result.loss = losses.total(self.loss_weights)
        if self.training:
            share = token_count(targets, count) / token_count(targets, None)
            terms = (None if term is None else term.detach() * share.to(term.device) for term in losses)
            result.base_loss, result.shadow_loss, result.distillation_loss = terms

    def _losses_of(
        self,
        result: ShadowCausalLMOutputWithPast,
        adapted: AdaptedOutput,
        rows: list[int] | None,
        heads: Pair[TaskHead],
        targets: Tensor,
        divisor: Tensor | int | None,
    ) -> TokenLosses:
        """The terms of the loss of some rows, which share their heads."""
        base = _source(result.logits, adapted.head_input, heads.base, rows)
        shadow = None
        if heads.shadow is not None:
            shadow = _source(result.shadow_logits, adapted.shadow_state, heads.shadow, rows)
        if adapted.base is None:
            base, shadow = shadow, None
        elif not self.loss_weights.need_shadow:
            shadow = None
        assert base is not None
        return token_losses(base, shadow, targets, divisor, self.loss_weights)

    def shadow_logits(self, state: Tensor, cache: Any = None, vocabulary: DraftVocabulary | None = None) -> Tensor:
        """The shadow's logits `[B, T, V]` of states s `[B, T, d]`, of the rows of a cache; zero in rows of the bare base.

        With a vocabulary that is used, those of its tokens, and a floor elsewhere.
        """
        names = self.peft_model.row_names(None, cache, len(state))
        heads: RowHeads[Any] = self._heads.rows(names)
        if vocabulary is not None and vocabulary.is_used:
            narrow = [None if pair.shadow is None else vocabulary.narrowed(pair.shadow) for pair in heads.by_row]
            heads = RowHeads(tuple(Pair(p.base, head) for p, head in zip(heads.by_row, narrow, strict=True)))
        return heads.shadow_logits(state)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the embeddings of base and shadow; not possible with heads that are trained copies.

        Raises:
            ValueError: a head is a trained copy.
        """
        if any(len(adapter.task_heads) for adapter in map(self.peft_model.adapter, self.peft_model.adapter_configs)):
            raise ValueError("Resize the base's token embeddings before heads are copied for training.")
        return super().resize_token_embeddings(*args, **kwargs)


def _source(logits: Tensor | None, states: Tensor | None, head: TaskHead, rows: list[int] | None) -> LogitSource | None:
    """The source of the logits of some rows for the loss: computed logits, else the states with their head."""
    if logits is not None:
        return LogitSource(select_rows(logits, rows), Logits())
    return None if states is None else LogitSource(select_rows(states, rows), head)


_ALL = slice(None)


def _kept(logits_to_keep: int | Tensor) -> Any:
    """The index of the tokens that `logits_to_keep` selects."""
    if isinstance(logits_to_keep, int):
        return slice(-logits_to_keep, None) if logits_to_keep else _ALL
    return logits_to_keep


class _KnownToPipelines(PreTrainedConfig):
    """Key under which transformers' registry lists the class above, so that pipelines take it for what it is."""

    model_type = "shadow_for_causal_lm"


MODEL_FOR_CAUSAL_LM_MAPPING.register(_KnownToPipelines, ShadowForCausalLM, exist_ok=True)
