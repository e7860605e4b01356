"""ShadowForSequenceClassification: a classifier, or regressor, of an adapted base and its shadow.

    logits = classifier_head(h_last)     shadow_logits = shadow_classifier_head(s_last)
    loss   = L(logits, labels) + shadow_loss_weight * L(shadow_logits, labels)

A sequence is pooled at its last non-padding token, whichever side the padding is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.implicit import master_dtype
from shadow_peft.base.decoder import classifier_name
from shadow_peft.inputs import ModelInputs
from shadow_peft.losses.classification import classification_loss, problem_type_of
from shadow_peft.losses.reduction import token_count
from shadow_peft.multi_adapter.mixed import BASE
from shadow_peft.multi_adapter.rows import select_rows
from shadow_peft.tasks.base import ShadowTaskModel, trainable_copy
from shadow_peft.tasks.heads import Pair, RowHeads


@dataclass
class ShadowSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """`SequenceClassifierOutputWithPast` with the shadow's own logits.

    Attributes:
        shadow_logits: `[B, C]`; None if they were not computed.
    """

    shadow_logits: Tensor | None = None


class ShadowForSequenceClassification(ShadowTaskModel):
    """A classifier whose logits are those of the adapted base or of the shadow alone.

    The heads `classifier_head` and `shadow_classifier_head` start as copies of the base's classification head, or random on
    a base without one. Both are trained, unless `modules_to_save` names a subset: then only that subset is. Both are saved.

    Args:
        peft_model: an adapted sequence classification model, causal LM or bare decoder; `num_labels` is read from its
            config.
        shadow_loss_weight: factor of the shadow's own loss.
        inference_mode: "base_shadow" or "shadow_only".
    """

    head_names = ("classifier_head", "shadow_classifier_head")

    @classmethod
    def _owned_heads(cls, adapter: ShadowAdapter) -> list[str]:
        return list(cls.head_names)

    @classmethod
    def _fresh_head(cls, adapter: ShadowAdapter, name: str) -> nn.Module:
        base = adapter.base_model
        own = classifier_name(base)
        if own is not None:
            head = trainable_copy(base.get_submodule(own))
        else:
            dtype = master_dtype(base.dtype)
            head = nn.Linear(adapter.decoder.hidden_size, base.config.num_labels, bias=False, dtype=dtype)
            nn.init.normal_(head.weight, std=getattr(adapter.decoder.config, "initializer_range", 0.02))
        chosen = adapter.shadow_config.modules_to_save
        return head.to(adapter.shadow_injection_model.injection_downs.device).requires_grad_(not chosen or name in chosen)

    @property
    def classifier_head(self) -> nn.Module:
        """The adapted base's head, from `[d]` to `[C]`."""
        return self.peft_model.task_heads["classifier_head"]

    @property
    def shadow_classifier_head(self) -> nn.Module:
        """The shadow's head, from `[d]` to `[C]`."""
        return self.peft_model.task_heads["shadow_classifier_head"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_shadow_logits: bool | None = None,
        return_dict: bool | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of a sequence, of the adapted base and of the shadow.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 1 for tokens and 0 for padding on either side. Without it, tokens equal to the config's
                `pad_token_id` are padding when a sequence is pooled.
            position_ids: `[B, T]`; None counts them from the mask.
            past_key_values: the cache that an earlier call returned.
            inputs_embeds: `[B, T, d]` instead of `input_ids`.
            labels: `[B]` classes (`-100` for none), `[B]` or `[B, C]` floats for regression, `[B, C]` floats for multi
                label; adds `loss`. `config.problem_type`, or else the labels, decide its kind.
            use_cache: return the cache of both networks.
            num_items_in_batch: divisor of both losses: the number of labels of the whole optimizer step.
            output_shadow_logits: whether to compute `shadow_logits`; None is False only in training without a shadow loss.
            return_dict: False returns a tuple.
            adapter_names: the adapter of each row, "__base__" for the bare base, with the active adapter's head as inside
                `disable_adapter()`, shadow logits 0 and no shadow loss; None uses the active adapter for all rows.
            **kwargs: further arguments of the base's backbone.

        Returns:
            `ShadowSequenceClassifierOutput` with logits `[B, C]`. In "shadow_only", `output_hidden_states` asks for the
            state s as `hidden_states[0]`.
        """
        past_key_values = self.peft_model.given_cache(past_key_values, kwargs)
        inputs = ModelInputs(
            input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, bool(use_cache), kwargs
        ).checked()
        names = self.peft_model.row_names(adapter_names, past_key_values, inputs.num_rows)
        returns_shadow = self.wants_shadow_logits(output_shadow_logits)
        wants_shadow = returns_shadow or (labels is not None and bool(self.shadow_loss_weight))
        inputs = replace(inputs, adapter_names=names)
        adapted = self.peft_model.run(inputs, self.inference_mode, skip_head=True, reads_state=wants_shadow)
        padding = getattr(self.config.get_text_config(), "pad_token_id", None)
        last = last_tokens(next(iter(inputs.tokens.values())), attention_mask, padding)
        heads = self._heads(names)
        shadow_logits = loss = None
        if adapted.shadow_state is not None and (wants_shadow or adapted.base is None):
            shadow_logits = heads.shadow_logits(_pooled(adapted.shadow_state, last))
        if adapted.base is not None:
            logits = heads.base_logits(_pooled(adapted.base[0], last))
        else:
            assert shadow_logits is not None
            logits = shadow_logits
        if labels is not None:
            loss = self._loss(logits, shadow_logits, labels, num_items_in_batch, heads.shadow_rows)
        shown = shadow_logits if returns_shadow or adapted.base is None else None
        result = ShadowSequenceClassifierOutput(loss, logits, past_key_values=adapted.cache, shadow_logits=shown)
        if adapted.base is None and kwargs.get("output_hidden_states"):
            result.hidden_states = (adapted.shadow_state,)
        return result.to_tuple() if return_dict is False else result

    def _heads(self, names: tuple[str, ...] | None) -> RowHeads[ClassifierHead]:
        """The heads of a batch with these adapters, or with the active one."""
        active = Pair(ClassifierHead(self.classifier_head), ClassifierHead(self.shadow_classifier_head))
        if names is None:
            return RowHeads((active,))
        pairs = {BASE: Pair(active.base, None)}
        for name in set(names) - {BASE}:
            heads = self.peft_model.adapter(name).task_heads
            missing = [head for head in self.head_names if head not in heads]
            if missing:
                raise ValueError(f"Adapter {name!r} has no {missing[0]}; add or load it through the task model.")
            pairs[name] = Pair(*(ClassifierHead(heads[head]) for head in self.head_names))
        return RowHeads(tuple(pairs[name] for name in names))

    def _loss(
        self,
        logits: Tensor,
        shadow_logits: Tensor | None,
        labels: Tensor,
        count: Tensor | int | None,
        shadow_rows: list[int] | None,
    ) -> Tensor:
        kind = problem_type_of(labels, self.config.num_labels, self.config.problem_type)
        loss = classification_loss(logits, labels, kind, count)
        if shadow_logits is not None and shadow_logits is not logits and shadow_rows != []:
            divisor = count if shadow_rows is None else token_count(labels, count)
            shadow_logits, labels = (select_rows(tensor, shadow_rows) for tensor in (shadow_logits, labels))
            shadow_loss = classification_loss(shadow_logits, labels, kind, divisor)
            loss = loss + self.shadow_loss_weight * shadow_loss.to(loss.device)
        return loss


@dataclass(frozen=True)
class ClassifierHead:
    """Logits `[n, C]` of pooled states `[n, d]`, on the device and in the dtype of the head."""

    head: nn.Module

    def __call__(self, pooled: Tensor) -> Tensor:
        """The logits."""
        weight = self.head.get_parameter("weight")
        logits: Tensor = self.head(pooled.to(weight.device, weight.dtype))
        return logits


def _pooled(hidden: Tensor, last: Tensor) -> Tensor:
    """States `[B, d]` at the tokens `last` `[B]` of states `[B, T, d]`."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last.to(hidden.device)]


def last_tokens(tokens: Tensor, attention_mask: Tensor | None, pad_token_id: int | None) -> Tensor:
    """Index `[B]` of each sequence's last non-padding token; 0 for a sequence of padding alone.

    Args:
        tokens: ids `[B, T]` or embeddings `[B, T, d]`.
        attention_mask: `[B, P + T]`; with None, ids equal to `pad_token_id` are padding, and embeddings have no padding.
        pad_token_id: the padding token, or None.
    """
    length = tokens.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -length:].bool()
    elif tokens.dim() == 2 and pad_token_id is not None:
        real = tokens.ne(pad_token_id)
    else:
        return torch.full((tokens.shape[0],), length - 1, device=tokens.device)
    order = torch.arange(length, device=tokens.device)
    return torch.where(real, order, 0).amax(dim=-1)


class _KnownToPipelines(PreTrainedConfig):
    """Key under which transformers' registry lists the class above, so that pipelines take it for what it is."""

    model_type = "shadow_for_sequence_classification"


MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.register(_KnownToPipelines, ShadowForSequenceClassification, exist_ok=True)
