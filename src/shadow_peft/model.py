"""ShadowPeftModel: a frozen base, its shadow backbone, and the small parts that couple them.

What happens to a batch:

    embeddings -> backbone -> s;   base layers, injected and updated on the way -> base outputs
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadow_peft.backbone.explicit import (
    CACHE_NAMES,
    Signature,
    asked_to_train,
    backbone_width,
    least_squares_map,
    make_projection,
    prepare_shadow_model,
    rebuilt_shadow,
    returned_cache,
)
from shadow_peft.backbone.implicit import build_implicit_backbone
from shadow_peft.backbone.recompute import checkpoint_except_matmuls
from shadow_peft.backbone.shared_embedding import SharedEmbedding
from shadow_peft.base import peft_adapters
from shadow_peft.base.architectures import ADDS_IN_PLACE, find_decoder
from shadow_peft.base.hooks import Attachment
from shadow_peft.base.task_head import input_embeddings
from shadow_peft.cache import ShadowCache, StatePair, base_only, combine_caches, with_shadow_cache
from shadow_peft.checkpoint import store
from shadow_peft.checkpoint.mixin import AdapterFiles
from shadow_peft.config import ShadowConfig
from shadow_peft.coupling import Coupling, EvolvingStateCoupling, StaticStateCoupling
from shadow_peft.inputs import Call
from shadow_peft.layers.injection import ShadowInjectionModel
from shadow_peft.layers.output_correction import ShadowOutputModel
from shadow_peft.layers.readout import ShadowReadoutModel
from shadow_peft.layers.update import ShadowUpdateModel
from shadow_peft.storage.sharded import is_sharded

_HALF = (torch.bfloat16, torch.float16)


def get_shadow_model(
    model: PreTrainedModel,
    shadow_config: ShadowConfig,
    *,
    shadow_model: PreTrainedModel | None = None,
    autocast_adapter_dtype: bool = True,
) -> ShadowPeftModel:
    """Attach a fresh shadow adapter to a base model; the arguments are those of `ShadowPeftModel`."""
    return ShadowPeftModel(model, shadow_config, shadow_model=shadow_model, autocast_adapter_dtype=autocast_adapter_dtype)


class ShadowPeftModel(AdapterFiles):
    """A frozen base model with a shadow adapter attached.

    The base keeps its class, module names, state dict and behaviour: a call of the base itself is the bare base, a call of
    this model is the adapted one. Unknown attributes are looked up on the base. `state_dict()` holds the adapter alone.

    Args:
        base_model: a transformers model with at least two decoder layers, or a `peft.PeftModel` of one, see `base_adapters`.
            Its parameters are frozen, but for adapters that `train_base_adapters` trains.
        shadow_config: the adapter's hyperparameters.
        shadow_model: an explicit shadow; None builds an implicit one from the base (see `twin`).
        autocast_adapter_dtype: keep adapter parameters in float32 whatever the base's dtype; False casts them to it.

    Attributes:
        shadow_model: the backbone.
        shadow_hidden_projection: P, a linear map or the identity.
        shadow_injection_model: the maps of all ridden layers.
        shadow_update_model: the same; None in the variant "transient".
        shadow_output_model: the maps of what the layers add; None in the other variants.
        shadow_readout_model: the maps at the end; None in the other variants.
        recompute_backbone: in training, keep of the backbone's values its matrix products alone, see `recomputing`.
        task_heads: trained heads that a task model has put here; saved beside the adapter.

    Raises:
        TypeError: the base or the shadow is no transformers model.
        ValueError: the base cannot be ridden, or the sizes do not fit.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        shadow_config: ShadowConfig,
        *,
        shadow_model: PreTrainedModel | None = None,
        autocast_adapter_dtype: bool = True,
        init_from_base: bool = True,
    ) -> None:
        super().__init__()
        self._given = (base_model,)  # in a tuple, or it would be a part of this model
        base_model = peft_adapters.unwrap_base(base_model)
        decoder = find_decoder(base_model)
        adapted_layers, width = decoder.layers[shadow_config.first_injected_layer :], decoder.hidden_size
        if shadow_model is None:
            backbone, shared_table_name = build_implicit_backbone(decoder, shadow_config, init_from_base)
        else:
            backbone, shared_table_name = prepare_shadow_model(shadow_model), None
        self.shadow_config = shadow_config
        self.has_implicit_shadow = shadow_model is None
        self.shared_table_name = shared_table_name
        self.decoder = decoder
        self._unfrozen = [name for name, p in base_model.named_parameters() if p.requires_grad]
        peft_adapters.freeze(base_model, but_adapters=shadow_config.train_base_adapters)
        self.base_model = base_model
        self._injected_adapters: Any = ()
        self.shadow_model = backbone
        self.shadow_hidden_projection = make_projection(backbone, width)
        variant, k = shadow_config.variant, shadow_config.gate_hidden_size
        self.shadow_injection_model = ShadowInjectionModel(
            len(adapted_layers), width, shadow_config.injection_hidden_size, variant
        )
        transient = variant == "transient"
        self.shadow_update_model = (
            None if transient else ShadowUpdateModel(len(adapted_layers), width, k, variant == "paper")
        )
        self.shadow_output_model = self.shadow_readout_model = None
        if transient:
            self.shadow_output_model = ShadowOutputModel(len(adapted_layers), width, shadow_config.output_hidden_size)
            self.shadow_readout_model = ShadowReadoutModel(width, k, shadow_config.readout_hidden_size)
        self.task_heads = nn.ModuleDict()
        self._base_signature, self._shadow_signature = Signature.of(base_model), Signature.of(backbone)
        self._decoder_signature = Signature.of(decoder.backbone)
        self._embedding_map: Tensor | None = None
        self._checkpointing = False
        self.recompute_backbone = True
        self._configure_embeddings(shadow_model)
        self._place(torch.float32 if autocast_adapter_dtype else base_model.dtype)
        self._attachment: Attachment | None = Attachment(
            adapted_layers, decoder.input_name, decoder.end, base_model.get_output_embeddings()
        )
        weakref.finalize(self, self._attachment.detach)
        self.train(base_model.training)

    # ---------------------------------------------------------------- the path of one batch

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
            use_cache: return the states of both networks in `past_key_values`; None follows the base's config in
                inference and is False in training.
            **kwargs: whatever else the base's forward takes.

        Returns:
            The base's outputs, and the initial shadow state s `[B, T, d]`, which is None inside `disable_adapter()`.

        Raises:
            ValueError: no tokens, or a cache that the backbone has not seen.
            RuntimeError: the adapter was unloaded.
        """
        call = self.call(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs)
        if not self.attachment.enabled:
            return self.run_base(call, kwargs), None
        state, shadow_cache = self.initial_state(call, kwargs)
        outputs, _ = self.run_coupled(state, shadow_cache, call, kwargs)
        return outputs, state

    def call(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> Call:
        """The arguments of one call, made ready; takes the base's own name of a cache out of `kwargs`."""
        if past_key_values is None and self._base_signature.cache_name is not None:
            past_key_values = kwargs.pop(self._base_signature.cache_name, None)
        if use_cache is None:
            use_cache = bool(getattr(self.decoder.config, "use_cache", False)) and not self.training
        states = self.with_shadow_cache(past_key_values) if self.attachment.enabled else base_only(past_key_values)
        first = self.decoder.first_position
        return Call.of(input_ids, inputs_embeds, attention_mask, position_ids, states, use_cache, first)

    def with_shadow_cache(self, cache: Any) -> Any:
        """The states of both networks for a cache: itself if it holds both, else one with an empty sibling.

        Raises:
            ValueError: no transformers cache, or one with tokens that the shadow has not seen.
        """
        return with_shadow_cache(cache, self.shadow_model.config)

    @property
    def cache_name(self) -> str | None:
        """The name under which the base takes its cache, or None."""
        return self._base_signature.cache_name

    def base_takes(self, name: str) -> bool:
        """Whether the base's forward declares an argument."""
        return name in self._base_signature.names

    def initial_state(self, call: Call, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """s = P(backbone(x)) `[B, T, d]`, and the backbone's cache; states that drafting left there are taken from it."""
        states = call.cache if isinstance(call.cache, ShadowCache) else None
        if states is None or states.drafted is None:
            return self._run_backbone(call, kwargs)
        drafted, states.drafted = states.drafted, None
        rest = call.without_first(drafted.states.shape[1])
        if rest.length == 0:
            return drafted.states, states.shadow
        state, cache = self._run_backbone(rest, kwargs)
        return torch.cat([drafted.states, state], dim=1), cache

    def shadow_step(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: ShadowCache
    ) -> Tensor:
        """s `[B, T, d]` of tokens `[B, T]` that the backbone reads ahead of the base."""
        call = self.call(input_ids, attention_mask, position_ids, cache, None, True, {})
        return self._run_backbone(call, {})[0]

    def _run_backbone(self, call: Call, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        cache = None if call.cache is None else call.cache.shadow
        signature = self._shadow_signature
        arguments = {**signature.accepted(kwargs), **call.arguments(signature, cache)}
        with self._backbone_precision():
            if self._recomputes(call):
                inputs, products = self._shadow_tokens(call), self.shadow_model.config.model_type not in ADDS_IN_PLACE
                outputs = checkpoint_except_matmuls(self.shadow_model, inputs, {**arguments, "return_dict": True}, products)
            else:
                outputs = self.shadow_model(**self._shadow_tokens(call), **arguments, return_dict=True)
            return self.shadow_hidden_projection(outputs[0]), returned_cache(outputs)

    def _recomputes(self, call: Call) -> bool:
        """Whether the backbone's values are computed again in the backward pass, see `recomputing`.

        FSDP's hooks on the layers act differently the second time, so a sharded backbone keeps everything.
        """
        wanted = self.recompute_backbone and self.training and torch.is_grad_enabled()
        never = self._checkpointing or call.use_cache or torch.compiler.is_compiling() or is_sharded(self.shadow_model)
        return wanted and not never

    def run_coupled(
        self,
        state: Tensor,
        shadow_cache: Any,
        call: Call,
        kwargs: dict[str, Any],
        *,
        skip_head: bool = False,
        keep_head_input: bool = False,
    ) -> tuple[Any, Tensor | None]:
        """Run the base with a shadow state riding its layers.

        Args:
            state: s `[B, T, d]`.
            shadow_cache: the backbone's cache, to be returned with the base's.
            call: the arguments.
            kwargs: whatever else the base's forward takes.
            skip_head: run the base's backbone alone, without its task head.
            keep_head_input: let the base's head compute nothing and return its input.

        Returns:
            The outputs, with the states of both networks where the base returns its own, and the head's input if caught.

        Raises:
            ValueError: a cache with tokens that the base has not seen.
        """
        if call.cache is not None and call.cache.base is None:
            raise ValueError("These past_key_values hold tokens of the shadow alone, which the base has not seen.")
        coupling = self._passage(state, keep_head_input)
        attachment = self.attachment
        attachment.coupling = coupling
        try:
            outputs = self.run_base(call, kwargs, skip_head)
        finally:
            attachment.coupling = None
        states = combine_caches(returned_cache(outputs), shadow_cache) if call.cache is None else call.cache
        replace_cache(outputs, states)
        return outputs, coupling.head_input

    def _passage(self, state: Tensor, keep_head_input: bool) -> Coupling:
        config = self.shadow_config
        settings: dict[str, Any] = {
            "alpha": config.alpha,
            "dropout": config.dropout if self.training else 0.0,
            "stream": self.decoder.stream,
            "dtype": self.base_model.dtype,
            "keep_head_input": keep_head_input,
        }
        if self.shadow_output_model is not None and self.shadow_readout_model is not None:
            resting = self.shadow_injection_model, self.shadow_output_model, self.shadow_readout_model
            return StaticStateCoupling(state, *resting, **settings)
        assert self.shadow_update_model is not None
        dropout_before_down = config.variant == "paper"
        maps = self.shadow_injection_model, self.shadow_update_model
        return EvolvingStateCoupling(state, *maps, dropout_before_down=dropout_before_down, **settings)

    def run_base(self, call: Call, kwargs: dict[str, Any], skip_head: bool = False) -> Any:
        """Run the base, or with `skip_head` its backbone alone, on the arguments of a call."""
        model, signature = self.base_model, self._base_signature
        if skip_head:
            model, signature = self.decoder.backbone, self._decoder_signature
        cache = None if call.cache is None else call.cache.base
        return model(**call.tokens, **{**kwargs, **call.arguments(signature, cache), "return_dict": True})

    def _shadow_tokens(self, call: Call) -> dict[str, Tensor]:
        """The tokens as the backbone reads them: its own embeddings of the ids, or the base's embeddings."""
        own = input_embeddings(self.shadow_model)
        if isinstance(own, SharedEmbedding) and call.input_ids is not None:
            return {"input_ids": call.input_ids}
        if own is None or isinstance(own, SharedEmbedding):
            given = call.inputs_embeds
            embeds = self.base_model.get_input_embeddings()(call.input_ids) if given is None else given.clone()
        elif call.inputs_embeds is not None:
            embeds = self._to_shadow_width(call.inputs_embeds)
        else:
            assert call.input_ids is not None
            return {"input_ids": call.input_ids}
        if self._checkpointing and self.training and not embeds.requires_grad:
            # reentrant checkpoints drop gradients of inputs that need none; no leaf, since CTRL and GIT change it in place
            embeds = embeds.detach().requires_grad_().clone()
        return {"inputs_embeds": embeds}

    def _to_shadow_width(self, embeds: Tensor) -> Tensor:
        """The base's embeddings `[B, T, d]` for a shadow with its own table: the least-squares map between the tables."""
        if self._embedding_map is None:
            tables = (m.get_input_embeddings().weight.detach() for m in (self.base_model, self.shadow_model))
            self._embedding_map = least_squares_map(*tables)
        return embeds.to(self._embedding_map.dtype) @ self._embedding_map.to(embeds.device)

    def _backbone_precision(self) -> AbstractContextManager[Any]:
        """Beside a base in half precision, float32 masters of the backbone compute in the base's dtype."""
        parameter = next(self.shadow_model.parameters())
        kind, dtype = parameter.device.type, self.base_model.dtype
        if dtype in _HALF and parameter.dtype == torch.float32 and not torch.is_autocast_enabled(kind):
            return torch.autocast(kind, dtype)
        return nullcontext()

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

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the context, in this thread, the model is its bare base."""
        with self.attachment.disabled():
            yield

    def unload(self) -> PreTrainedModel:
        """Take the adapter off and give back what was wrapped as it was, trainable parameters included.

        PEFT adapters that came with the base stay in it, as trained as they are; those that a checkpoint brought leave it.
        """
        self.attachment.detach()
        self._attachment = None
        if self._checkpointing:
            self.gradient_checkpointing_disable()
        self.base_model.requires_grad_(False)
        for name in self._unfrozen:
            self.base_model.get_parameter(name).requires_grad_(True)
        for wrapped in self._injected_adapters:
            peft_adapters.remove_adapters(self.base_model, wrapped)
        given: PreTrainedModel = self._given[0]
        return given

    def get_base_model(self) -> PreTrainedModel:
        """The base, still attached; calling it is calling the bare base."""
        return self.base_model

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute the layers of base and backbone in the backward pass.

        Args:
            gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`, such as `use_reentrant`.
            **kwargs: `every_n_layers` and `offload`, as transformers takes them.
        """
        self.base_model.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
        self.base_model.disable_input_require_grads()  # transformers' hook would send gradients through untouched layers
        for layer in self.decoder.layers[: self.shadow_config.first_injected_layer]:
            for module in layer.modules():
                if "gradient_checkpointing" in module.__dict__:  # nothing below the first injection needs a gradient
                    vars(module)["gradient_checkpointing"] = False
        if self.shadow_model.supports_gradient_checkpointing:
            self.shadow_model.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
        self._checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations of base and backbone again."""
        for model in (self.base_model, self.shadow_model):
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()
        self._checkpointing = False

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The name that transformers gives `gradient_checkpointing_enable` from 5.23 on."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """The name that transformers gives `gradient_checkpointing_disable` from 5.23 on."""
        self.gradient_checkpointing_disable()

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Tag the base for the hub.

        Raises:
            TypeError: tags of TRL, whose trainers sign what they train; that belongs to the task model, see there.
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

    # ---------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        pretrained_shadow_path: str | Path,
        *,
        is_trainable: bool = False,
        shadow_model: PreTrainedModel | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> ShadowPeftModel:
        """Attach a stored adapter to a base.

        Args:
            model: the base.
            pretrained_shadow_path: a directory, or a hub repository `repo_id` or `repo_id@revision`, of either dialect.
            is_trainable: False freezes the adapter.
            shadow_model: the explicit shadow of the adapter; adapters saved by this library rebuild theirs without it.
            autocast_adapter_dtype: see the class.

        Raises:
            ValueError: no adapter there, a damaged file, or an adapter that does not fit the base; the base stays untouched.
        """
        stored = store.read(pretrained_shadow_path)
        return cls.from_checkpoint(
            model,
            stored,
            is_trainable=is_trainable,
            shadow_model=shadow_model,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @classmethod
    def from_checkpoint(
        cls,
        model: PreTrainedModel,
        stored: store.Checkpoint,
        *,
        is_trainable: bool = False,
        shadow_model: PreTrainedModel | None = None,
        autocast_adapter_dtype: bool = True,
        make_head: Callable[[ShadowPeftModel, str], nn.Module] | None = None,
    ) -> ShadowPeftModel:
        """Attach an adapter that was read already; `make_head` makes the modules of the trained heads that it holds."""
        if shadow_model is None:
            shadow_model = rebuilt_shadow(stored.provenance)
        base = peft_adapters.unwrap_base(model)
        injected = peft_adapters.inject_adapters(base, stored.provenance.get("base_adapters") or {})
        try:
            peft_model = cls(
                model,
                stored.config,
                shadow_model=shadow_model,
                autocast_adapter_dtype=autocast_adapter_dtype,
                init_from_base=False,
            )
        except BaseException:
            peft_adapters.remove_adapters(base, injected)
            raise
        peft_model._injected_adapters = () if injected is None else (injected,)
        try:
            if make_head is not None:
                for name in stored.head_names:
                    peft_model.task_heads[name] = make_head(peft_model, name)
            store.load_into(peft_model, stored)
        except ValueError:
            peft_model.unload()
            raise
        if not is_trainable:
            peft_model.requires_grad_(False).eval()
        return peft_model

    # ---------------------------------------------------------------- building

    def _configure_embeddings(self, shadow_model: PreTrainedModel | None) -> None:
        """Freeze the table of an explicit shadow unless it is to be trained; refuse one that cannot be fed.

        An implicit shadow of another width has a random table of its own, which is trained.

        Raises:
            ValueError: a shadow without embeddings that does not read the base's width.
        """
        own, base = input_embeddings(self.shadow_model), self.base_model.get_input_embeddings()
        if own is not None:
            made_here = shadow_model is None and self.shared_table_name is None
            asked = self.shadow_config.train_shadow_embeddings or asked_to_train(shadow_model)
            own.requires_grad_(asked or made_here)
        elif shadow_model is not None and base.weight.shape[1] != backbone_width(self.shadow_model):
            raise ValueError(
                f"The shadow has no embeddings of its own and reads states {backbone_width(self.shadow_model)} wide, but "
                f"the base's embeddings are {base.weight.shape[1]} wide. Keep the shadow's embedding table."
            )

    def _place(self, dtype: torch.dtype) -> None:
        """Put the adapter where the base embeds its tokens."""
        device = execution_device(self.base_model.get_input_embeddings())
        for part in (
            self.shadow_model,
            self.shadow_hidden_projection,
            self.shadow_injection_model,
            self.shadow_update_model,
            self.shadow_output_model,
            self.shadow_readout_model,
        ):
            if part is not None:
                part.to(device, dtype)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, also when accelerate holds its weights elsewhere between calls."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    return next(module.parameters()).device


def replace_cache(outputs: Any, states: ShadowCache | StatePair | None) -> None:
    """Put the states of both networks where a model returned its own."""
    for name in CACHE_NAMES:
        if name in outputs:
            outputs[name] = states
            return
