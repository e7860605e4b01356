"""AutoModelForCausalLMWithHiddenProjection: a small decoder that speaks through the head of a large model.

    logits = lm_head(P(backbone(x)))       P maps the backbone's width S to the large model's d, lm_head is [V, d]

The form in which a shadow of another width than its base stands alone, and in which pretrained shadows are shared. Once
`shadow_peft` is imported, `AutoModelForCausalLM.from_pretrained` loads it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from shadow_peft.backbone.explicit import prepare_shadow_model, registered_config
from shadow_peft.backbone.projection import fit_projection
from shadow_peft.base.signature import Signature, returned_cache
from shadow_peft.losses.language_modeling import next_token_loss, shifted

MODEL_TYPE = "causal_lm_with_hidden_projection"

_BACKBONE_SIZES = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings"),
)
"""Sizes of the backbone that tools look up in the outer config, as `shadow-peft` 0.1.x writes them."""


class AutoModelForCausalLMWithHiddenProjectionConfig(PreTrainedConfig):
    """Config of a projected causal LM.

    Args:
        shadow_model_class: "module:Class" of the backbone. Written for `shadow-peft` 0.1.x; never imported when read.
        shadow_model_config_class: likewise, of its config.
        shadow_model_config: the backbone's config as a dictionary; its `model_type` decides the architecture.
        base_hidden_size: d, the width of the head.
        vocab_size: V.
        final_logit_softcapping: c in logits = c * tanh(logits / c), for heads of models that cap their logits.
        lm_head_bias: whether the head has a bias.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        *,
        shadow_model_class: str = "",
        shadow_model_config_class: str = "",
        shadow_model_config: dict[str, Any] | None = None,
        base_hidden_size: int = 0,
        vocab_size: int = 0,
        final_logit_softcapping: float | None = None,
        lm_head_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        self.final_logit_softcapping = final_logit_softcapping
        self.lm_head_bias = lm_head_bias
        self.shadow_model_class = shadow_model_class
        self.shadow_model_config_class = shadow_model_config_class
        self.shadow_model_config = shadow_model_config or {}
        self.base_hidden_size = base_hidden_size
        self.vocab_size = vocab_size
        if self.shadow_model_config:
            self.backbone_config()  # an unknown architecture is an error here, not somewhere inside transformers
        inner = {name: self.shadow_model_config.get(name) for name in _BACKBONE_SIZES}
        sizes = {name: value for name, value in inner.items() if value is not None}
        super().__init__(**{"tie_word_embeddings": False, "hidden_size": base_hidden_size, **sizes, **kwargs})

    @classmethod
    def around(cls, backbone: PreTrainedModel, base_hidden_size: int, vocab_size: int) -> Any:
        """The config of a projected model around a backbone, its generation-related ids included."""
        inner = backbone.config
        ids: dict[str, Any] = {name: getattr(inner, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return cls(
            shadow_model_class=_qualified(type(backbone)),
            shadow_model_config_class=_qualified(type(inner)),
            shadow_model_config=inner.to_dict(),
            base_hidden_size=base_hidden_size,
            vocab_size=vocab_size,
            dtype=backbone.dtype,
            **ids,
        )

    def backbone_config(self) -> PreTrainedConfig:
        """The backbone's config, of the class that transformers registers for its `model_type`.

        Raises:
            ValueError: the `model_type` is missing or unknown.
        """
        return registered_config(self.shadow_model_config)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Caches are made for the layers of the backbone; everything else is asked of this config."""
        if not decoder or not self.shadow_model_config:
            return self
        return self.backbone_config().get_text_config(decoder=True)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}:{cls.__name__}"


class AutoModelForCausalLMWithHiddenProjection(PreTrainedModel, GenerationMixin):
    """A backbone, a projection and the output embedding of a larger model.

    Attributes:
        shadow_model: the backbone.
        shadow_hidden_projection: P, `nn.Linear(S, d, bias=False)`.
        lm_head: `nn.Linear(d, V)`, without a bias unless the large model's head has one.
    """

    config_class = AutoModelForCausalLMWithHiddenProjectionConfig
    base_model_prefix = "shadow_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: AutoModelForCausalLMWithHiddenProjectionConfig, backbone: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        inner = config.backbone_config() if backbone is None else backbone.config
        self.shadow_model = _random_backbone(inner) if backbone is None else backbone
        width = inner.get_text_config(decoder=True).hidden_size
        self.shadow_hidden_projection = nn.Linear(width, config.base_hidden_size, bias=False)
        self.lm_head = nn.Linear(config.base_hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.train_embed_tokens = False
        if backbone is None:
            self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        freeze_backbone: bool = False,
        freeze_embed_tokens: bool = True,
        freeze_lm_head: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a projected model.

        Args:
            pretrained_model_name_or_path: a directory or hub repository.
            *model_args: handed on to transformers.
            freeze_backbone: freeze the backbone, embeddings included.
            freeze_embed_tokens: freeze the backbone's embedding table.
            freeze_lm_head: freeze the output embedding.
            **kwargs: handed on to transformers.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.shadow_model.requires_grad_(not freeze_backbone)
        model.train_embed_tokens = not (freeze_embed_tokens or freeze_backbone)
        model.get_input_embeddings().requires_grad_(model.train_embed_tokens)
        model.lm_head.requires_grad_(not freeze_lm_head)
        return loaded

    @classmethod
    def wrap(
        cls,
        *,
        shadow_model: PreTrainedModel,
        shadow_hidden_projection: nn.Linear,
        lm_head: nn.Linear,
        init_optimal_projection: bool = True,
        reference_lm_head: nn.Linear | None = None,
    ) -> AutoModelForCausalLMWithHiddenProjection:
        """Put a small model under the head of a large one.

        Args:
            shadow_model: the small model; it is copied, and its task head is stripped.
            shadow_hidden_projection: a map from the small width S to the large width d.
            lm_head: the large model's output embedding `[V, d]`; it is copied, with its bias if it has one.
            init_optimal_projection: set the projection to the least-squares solution of
                min `|lm_head @ P - reference_lm_head|`, so that the projected model starts as the small model itself.
            reference_lm_head: the small model's output embedding `[V, S]`; None takes it from `shadow_model`.

        Raises:
            ValueError: the widths or vocabularies do not fit, or there is no reference head.
        """
        reference = shadow_model.get_output_embeddings() if reference_lm_head is None else reference_lm_head
        backbone = prepare_shadow_model(copy.deepcopy(shadow_model))
        vocab_size, hidden_size = lm_head.weight.shape
        _check_projection(shadow_hidden_projection, backbone, hidden_size)
        config = AutoModelForCausalLMWithHiddenProjectionConfig.around(backbone, hidden_size, vocab_size)
        config.lm_head_bias = lm_head.bias is not None
        model = cls(config, backbone)
        model.shadow_hidden_projection = copy.deepcopy(shadow_hidden_projection).to(backbone.dtype)
        head = lm_head.weight
        model.lm_head.weight = nn.Parameter(head.detach().to(backbone.dtype, copy=True), requires_grad=head.requires_grad)
        if lm_head.bias is not None:
            model.lm_head.bias = nn.Parameter(lm_head.bias.detach().to(backbone.dtype, copy=True), requires_grad=False)
        if init_optimal_projection:
            if reference is None:
                raise ValueError("init_optimal_projection needs reference_lm_head: shadow_model has no output embedding.")
            with torch.no_grad():
                model.shadow_hidden_projection.weight.copy_(fit_projection(lm_head.weight, reference.weight))
        model.config.architectures = [cls.__name__]
        return model.to(backbone.device)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's embedding table."""
        return self.shadow_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's embedding table."""
        self.shadow_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output embedding."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output embedding."""
        self.lm_head = new_embeddings

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """A recurrent backbone reads the whole text for every token: transformers' loop hands no state on here."""
        if Signature.of(self.shadow_model).is_recurrent:
            generation_config.use_cache = model_kwargs["use_cache"] = False
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

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
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the next token.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, P + T]`.
            position_ids: `[B, T]`.
            past_key_values: a transformers cache with P tokens.
            inputs_embeds: `[B, T, S]` instead of `input_ids`.
            labels: `[B, T]`, `-100` where there is none; adds the mean cross entropy as `loss`.
            use_cache: return the cache.
            logits_to_keep: compute the logits of the last so many tokens only, or of these positions; 0 keeps all.
            num_items_in_batch: divisor of the loss, see `loss`.
            return_dict: False returns a tuple.
            **kwargs: handed on to the backbone.

        Returns:
            `CausalLMOutputWithPast` with logits `[B, T, V]`.
        """
        outputs = self.shadow_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **{Signature.of(self.shadow_model).cache_name or "past_key_values": past_key_values},
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = self.shadow_hidden_projection(outputs.last_hidden_state[:, kept])
        logits = self.lm_head(hidden)
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        result = CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, shifted(labels), num_items_in_batch),
            logits=logits,
            past_key_values=returned_cache(outputs),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
        return result.to_tuple() if return_dict is False else result


def _random_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone in torch's default dtype, which transformers sets to the dtype that a model is loaded in."""
    return AutoModel.from_config(config, dtype=torch.get_default_dtype())


def _check_projection(projection: nn.Linear, backbone: PreTrainedModel, hidden_size: int) -> None:
    width = backbone.config.get_text_config(decoder=True).hidden_size
    if projection.bias is not None:
        raise ValueError("shadow_hidden_projection must have no bias.")
    if (projection.in_features, projection.out_features) != (width, hidden_size):
        raise ValueError(
            f"shadow_hidden_projection must map {width} to {hidden_size}, it maps {projection.in_features} to "
            f"{projection.out_features}."
        )


AutoConfig.register(MODEL_TYPE, AutoModelForCausalLMWithHiddenProjectionConfig, exist_ok=True)
AutoModelForCausalLM.register(
    AutoModelForCausalLMWithHiddenProjectionConfig, AutoModelForCausalLMWithHiddenProjection, exist_ok=True
)
