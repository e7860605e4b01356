"""ShadowPeftModel: a frozen base with a shadow adapter attached. `run` is the one way through both.

embeddings -> backbone -> s;   base layers, injected and updated between them -> base outputs
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.shared_embedding import SharedEmbedding
from shadow_peft.base import peft_adapters
from shadow_peft.base.hooks import Attachment, LayerCallbacks, attachments_of, restored_on_failure
from shadow_peft.base.quantization import GradientKernels, trains_beside_quantized
from shadow_peft.base.record import BaseRecord
from shadow_peft.base.signature import Signature, replace_cache, returned_cache
from shadow_peft.base.task_head import input_embeddings
from shadow_peft.cache import (
    ShadowCache,
    base_only,
    check_in_step,
    combine_caches,
    holds_tokens,
    shadow_only_cache,
)
from shadow_peft.config import ShadowConfig
from shadow_peft.export.stock import build_standalone_model
from shadow_peft.inputs import ModelInputs
from shadow_peft.multi_adapter.batches import MixedBatchesMixin
from shadow_peft.multi_adapter.mixed import MixedAdapters
from shadow_peft.multi_adapter.named import DEFAULT
from shadow_peft.outputs import AdaptedOutput, Mode


def get_shadow_model(
    model: PreTrainedModel,
    shadow_config: ShadowConfig,
    *,
    shadow_model: PreTrainedModel | None = None,
    autocast_adapter_dtype: bool = True,
    adapter_name: str = DEFAULT,
) -> ShadowPeftModel:
    """Attach a fresh shadow adapter to a base model; the arguments are those of `ShadowPeftModel`."""
    settings: dict[str, Any] = {"autocast_adapter_dtype": autocast_adapter_dtype, "adapter_name": adapter_name}
    return ShadowPeftModel(model, shadow_config, shadow_model=shadow_model, **settings)


class ShadowPeftModel(MixedBatchesMixin):
    """A frozen base model with a shadow adapter attached.

    The base keeps its class, module names, state dict and behaviour: a call of the base itself is the bare base, a call of
    this model is the adapted one. Unknown attributes are looked up on the base. `state_dict()` holds the adapter alone.
    A fresh model, its base included, is in training mode; `unload()` gives the base back in the mode that it had.

    Args:
        base_model: a transformers model with at least two decoder layers, or a `peft.PeftModel` of one, see
            `base.peft_adapters`. Its parameters are frozen, but for adapters that `train_base_adapters` trains.
        shadow_config: the adapter's hyperparameters.
        shadow_model: an explicit shadow; None builds an implicit one from the base (see `backbone.implicit`).
        autocast_adapter_dtype: keep adapter parameters in float32, beside a float64 base in float64, whatever the base's
            dtype; False casts them to it.
        adapter_name: name of this adapter; others can be added beside it, see `multi_adapter.named`.

    Attributes: those of `ShadowAdapter`, which are those of the active adapter; `active_adapter`, its name.

    Raises:
        TypeError: the base or the shadow is no transformers model.
        ValueError: the base cannot be adapted, or the sizes do not fit; the base stays as it was.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        shadow_config: ShadowConfig,
        *,
        shadow_model: PreTrainedModel | None = None,
        autocast_adapter_dtype: bool = True,
        init_from_base: bool = True,
        adapter_name: str = DEFAULT,
    ) -> None:
        super().__init__(
            base_model,
            shadow_config,
            shadow_model=shadow_model,
            autocast_adapter_dtype=autocast_adapter_dtype,
            init_from_base=init_from_base,
        )
        self._name_adapters(adapter_name)
        self._given = (base_model,)  # in a tuple, or it would be a part of this model
        base, decoder = self.base_model, self.decoder
        self._base_signature, self._decoder_signature = Signature.of(base), Signature.of(decoder.backbone)
        with restored_on_failure(base) as record:
            self._attachment: Attachment | None = self._attach(record)
            self._attachment.hold(self)
            self._kernels = GradientKernels(base)
            weakref.finalize(self, self._kernels.release)
            self._hf_peft_config_loaded = trains_beside_quantized(base)  # transformers' Trainer asks
            self.train()

    def _attach(self, record: BaseRecord) -> Attachment:
        """Freeze the base and put the hooks on it; several attachments share the record of the first."""
        base, decoder, config = self.base_model, self.decoder, self.shadow_config
        record.keep_changes(base)
        record = next((other.record for other in attachments_of(base)), record)
        peft_adapters.freeze(base, but_adapters=config.train_base_adapters or record.trains_adapters)
        record.trains_adapters |= config.train_base_adapters
        first, head = config.first_injected_layer, base.get_output_embeddings()
        return Attachment(decoder.layers, first, decoder.layer_input_name, decoder.output_module, head, record)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._attachment is not None:
            self._attachment.hold(self)

    # ---------------------------------------------------------------- running base and shadow

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted base's outputs; takes what the base's own forward takes."""
        return self.forward_with_shadow(*args, **kwargs)[0]

    def forward_with_shadow(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Tensor | None]:
        """Run backbone and base together.

        Args:
            input_ids: token ids `[B, T]`.
            attention_mask: `[B, P + T]`, 1 for tokens and 0 for padding, P tokens being cached. Positions are counted from
                it when none are given, so that both sides of padding give the same result.
            position_ids: positions `[B, T]`.
            past_key_values: what an earlier call returned, or an empty transformers cache.
            inputs_embeds: embeddings `[B, T, d]` instead of token ids.
            use_cache: return the cache of both networks in `past_key_values`; None follows the base's config in
                inference and is False in training.
            adapter_names: the adapter of each row, "__base__" for the bare base; None uses the active adapter for all.
            **kwargs: whatever else the base's forward takes.

        Returns:
            The base's outputs, and the initial shadow state s `[B, T, d]`, which is None inside `disable_adapter()`.

        Raises:
            ValueError: no tokens, or a cache that the backbone has not seen.
            RuntimeError: the adapter was unloaded.
        """
        past_key_values = self.given_cache(past_key_values, kwargs)
        inputs = ModelInputs(input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, kwargs)
        names = self.row_names(adapter_names, past_key_values, inputs.checked().num_rows)
        output = self.run(replace(inputs, adapter_names=names))
        return output.base, output.shadow_state

    def run(
        self,
        inputs: ModelInputs,
        mode: Mode = "base_shadow",
        *,
        skip_head: bool = False,
        keep_head_input: bool = False,
        reads_state: bool = True,
    ) -> AdaptedOutput:
        """Run what a mode asks for, once.

        Args:
            inputs: the arguments of the call.
            mode: "base_shadow" runs backbone and adapted base, "shadow_only" the backbone alone, "base_only" the bare base,
                which every mode becomes inside `disable_adapter()`.
            skip_head: run the base's backbone without its task head.
            keep_head_input: return the input of the base's head, which itself computes nothing then.
            reads_state: False lets "base_shadow" leave out backbones that their adapters do not use.

        Raises:
            ValueError: no tokens, a cache that does not hold the same tokens of all networks that run, or a cached prefix in
                a training with gradient checkpointing.
            RuntimeError: the adapter was unloaded.
        """
        mode = mode if self.attachment.enabled else "base_only"
        names, reads_state = inputs.adapter_names, reads_state or mode == "shadow_only"
        inputs = self._ready(inputs, mode, reads_state)
        alone = mode == "base_shadow" and names is None and not reads_state and self.skips_shadow(inputs.cache)
        if mode == "base_only":
            outputs = self._run_base(inputs, skip_head, None)
            return AdaptedOutput(outputs, cache=returned_cache(outputs))
        if mode == "base_shadow":
            check_in_step(inputs.cache)
        adapter: ShadowAdapter | MixedAdapters = self
        if names is not None:
            adapter = self.mixed(names, mode == "shadow_only", reads_state)
        state, backbone_cache = (self.no_state(inputs), None) if alone else adapter.initial_state(inputs)
        if mode == "shadow_only":
            own_cache = backbone_cache if inputs.cache is None else inputs.cache.shadow
            cache = self.with_shadow_cache(shadow_only_cache(own_cache), names)
            return AdaptedOutput(shadow_state=state, cache=cache)
        coupling = adapter.make_coupling(state, keep_head_input)
        outputs = self._run_base(inputs, skip_head, coupling)
        cache = inputs.cache
        if cache is None:
            both = combine_caches(returned_cache(outputs), backbone_cache, alone)
            cache = self.with_shadow_cache(both, names, reads_state)
        replace_cache(outputs, cache)
        was_read = reads_state or (names is None and not alone)
        return AdaptedOutput(outputs, state if was_read else None, coupling.head_input, cache)

    def _ready(self, inputs: ModelInputs, mode: Mode, reads_state: bool = True) -> ModelInputs:
        """The inputs with positions, with the cache of the networks that run, and with a decision about returning one."""
        cache, use_cache = inputs.cache, inputs.use_cache
        if use_cache is None:
            use_cache = bool(getattr(self.decoder.config, "use_cache", False)) and not self.training
        cache = base_only(cache) if mode == "base_only" else self.with_shadow_cache(cache, inputs.adapter_names, reads_state)
        if self._checkpointing and self.training and torch.is_grad_enabled() and holds_tokens(cache):
            raise ValueError(
                "past_key_values hold a prefix, but gradient checkpointing is on, and transformers drops the cache of "
                "layers that it recomputes. Call gradient_checkpointing_disable(), or pass the prefix with the other tokens."
            )
        inputs = replace(inputs.checked(), cache=cache, use_cache=use_cache)
        return inputs.with_positions(self.decoder.first_position)

    def _run_base(self, inputs: ModelInputs, skip_head: bool, coupling: LayerCallbacks | None) -> Any:
        """Run the base, or its backbone alone; bare where there is no coupling."""
        model, signature = self.base_model, self._base_signature
        if skip_head:
            model, signature = self.decoder.backbone, self._decoder_signature
        cache = None if inputs.cache is None else inputs.cache.base
        with self.attachment.active(coupling):
            return model(**inputs.tokens, **{**inputs.extra, **inputs.arguments(signature, cache), "return_dict": True})

    def shadow_step(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: ShadowCache
    ) -> Tensor:
        """s `[B, T, d]` of tokens `[B, T]` that the backbone reads ahead of the base."""
        names = self.row_names(None, cache, len(input_ids))
        inputs = ModelInputs(input_ids, None, attention_mask, position_ids, cache, True, adapter_names=names)
        adapter = self if names is None else self.mixed(names)
        return adapter.initial_state(self._ready(inputs, "shadow_only"))[0]

    def given_cache(self, cache: Any, extra: dict[str, Any]) -> Any:
        """The cache of a call: `past_key_values`, or what is taken out of its other arguments under the base's own name."""
        own = None if self.cache_name is None else extra.pop(self.cache_name, None)
        return own if cache is None else cache

    @property
    def cache_name(self) -> str | None:
        """The name under which the base takes its cache, or None."""
        return self._base_signature.cache_name

    def base_takes(self, name: str) -> bool:
        """Whether the base's forward declares an argument."""
        return name in self._base_signature.names

    # ---------------------------------------------------------------- attaching

    @property
    def attachment(self) -> Attachment:
        """The hooks on the base.

        Raises:
            RuntimeError: the adapter was unloaded.
        """
        if self._attachment is None:
            raise RuntimeError("This shadow adapter was unloaded from its base; attach a new one to use it again.")
        return self._attachment

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; a 4 bit base whose adapter is trained stays on kernels that pass gradients."""
        self._trained_parts_changed()
        return super().train(mode)

    def _trained_parts_changed(self) -> None:
        if self._attachment is not None:
            trained = any(parameter.requires_grad for parameter in self.parameters())
            (self._kernels.hold if trained else self._kernels.release)()

    def unload(self) -> PreTrainedModel:
        """Remove the adapter and give back what was wrapped as it was: trainable parameters and training mode included.

        On a base that carries other shadows too, the last one to be unloaded gives it back so. PEFT adapters that came with
        the base stay in it, as trained as they are; those of a checkpoint are removed.
        """
        attachment, base = self.attachment, self.base_model
        attachment.detach()
        self._attachment = None
        self._kernels.release()
        if self._checkpointing:
            self.save_backbone()
        if not attachments_of(base):
            attachment.record.restore(base)
        given: PreTrainedModel = self._given[0]
        return given

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the embeddings of the base and of a shadow that has its own; arguments as transformers takes them."""
        embeddings: nn.Module = self.base_model.resize_token_embeddings(*args, **kwargs)
        for adapter in map(self.adapter, self.adapter_configs):
            own = input_embeddings(adapter.shadow_model)
            if isinstance(own, SharedEmbedding):
                object.__setattr__(own, "table", embeddings)
            elif own is not None:
                adapter.shadow_model.resize_token_embeddings(*args, **kwargs)
        self.attachment.hook_head(self.base_model.get_output_embeddings())
        embeddings.requires_grad_(False)
        return embeddings

    def get_base_model(self) -> PreTrainedModel:
        """The base, still attached; calling it is calling the bare base."""
        return self.base_model

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Tag the base for the hub.

        Raises:
            TypeError: tags of TRL, whose trainers tag what they train; that belongs to the task model, see there.
        """
        if "trl" in ([tags] if isinstance(tags, str) else tags):
            raise TypeError(
                "Wrap the model to train it with TRL: ShadowForCausalLM(model), and a shadow_peft.training trainer."
            )
        self.base_model.add_model_tags(tags)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Generation belongs to the task model.

        Raises:
            TypeError: always; the base's own `generate` would ignore the adapter.
        """
        raise TypeError("Wrap the model to generate with it: ShadowForCausalLM(model).generate(...).")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def export_shadow(self, *, fold: bool = False) -> PreTrainedModel:
        """The shadow alone as a self-contained model, see `export.stock`.

        Args:
            fold: multiply the projection of a shadow of another width into its head. The model is a stock one then, which
                `AutoModelForCausalLM` loads without this library. False keeps both apart, as `shadow-peft` 0.1.x does: in
                an `AutoModelForCausalLMWithHiddenProjection`, which can be a shadow again.

        Raises:
            ValueError: parameters are sharded over processes, or the shadow has no such form; the message says why.
        """
        return build_standalone_model(self, folded=fold)
