"""ShadowAdapter: the trained parts of an adapter, built for a base and placed beside it, and running its backbone.

s = P(backbone(x))      [B, T, d]; P is a linear map from the backbone's width S to d, the identity when they agree
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadow_peft.backbone.cast_weights import with_cast_weights
from shadow_peft.backbone.explicit import check_vocabularies, prepare_shadow_model, trains_embeddings
from shadow_peft.backbone.implicit import build_implicit_backbone, master_dtype
from shadow_peft.backbone.placement import place
from shadow_peft.backbone.projection import backbone_width, fit_embedding_map, make_projection
from shadow_peft.backbone.recompute import checkpoint_except_matmuls
from shadow_peft.backbone.shared_embedding import SharedEmbedding
from shadow_peft.base import peft_adapters
from shadow_peft.base.architectures import architecture_of
from shadow_peft.base.decoder import find_decoder
from shadow_peft.base.quantization import num_weights
from shadow_peft.base.signature import Signature, returned_cache
from shadow_peft.base.task_head import input_embeddings
from shadow_peft.config import ShadowConfig
from shadow_peft.coupling import Coupling, EvolvingStateCoupling, StaticStateCoupling
from shadow_peft.inputs import ModelInputs, with_drafted
from shadow_peft.layers.injection import ShadowInjectionModel
from shadow_peft.layers.output_correction import ShadowOutputModel
from shadow_peft.layers.readout import ShadowReadoutModel
from shadow_peft.layers.update import ShadowUpdateModel
from shadow_peft.losses.label_tokens import LabelTokens
from shadow_peft.storage.sharded import is_sharded

PARTS = (
    "shadow_model",
    "shadow_hidden_projection",
    "shadow_injection_model",
    "shadow_update_model",
    "shadow_output_model",
    "shadow_readout_model",
)
"""Names of the modules that make up an adapter; each variant has some of them."""

_HALF = (torch.bfloat16, torch.float16)


class ShadowAdapter(nn.Module):
    """The parts of a shadow adapter on a base; building them changes nothing of the base.

    Args:
        base_model: a transformers model with at least two decoder layers, or a `peft.PeftModel` of one.
        shadow_config: the adapter's hyperparameters.
        shadow_model: an explicit shadow; None builds an implicit one from the base.
        autocast_adapter_dtype: keep adapter parameters in float32, beside a float64 base in float64, whatever the base's
            dtype; False casts them to it.
        init_from_base: False leaves an implicit backbone random, for a checkpoint that is about to be loaded.

    Attributes:
        base_model: the base.
        decoder: where its decoder layers are.
        shadow_model: the backbone.
        shadow_hidden_projection: P, a linear map or the identity.
        shadow_injection_model: the injection weights of all adapted layers.
        shadow_update_model: their update weights; None in the variant "readout".
        shadow_output_model: their output corrections; None in the other variants.
        shadow_readout_model: the read-out behind the last layer; None in the other variants.
        task_heads: trained heads that a task model has added; saved beside the adapter.
        has_implicit_shadow: whether the backbone was built from the base.
        shared_table_name: name that the embedding weight of an implicit backbone had before it was removed, or None.
        recompute_backbone: in training, save the backbone's matrix products alone, see `backbone.recompute`.
        label_tokens: which tokens were targets in the trainings of a language model.

    Raises:
        TypeError: the base or the shadow is no transformers model.
        ValueError: the base cannot be adapted, or the sizes do not fit.
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
        if isinstance(base_model, nn.Module) and any(isinstance(module, ShadowAdapter) for module in base_model.modules()):
            raise ValueError(
                f"This {type(base_model).__name__} carries a shadow adapter already. Attach another one to its base "
                "(`get_base_model()`), or take the first one off with `unload()`."
            )
        base_model = peft_adapters.unwrap_base(base_model)
        decoder = find_decoder(base_model)
        if shadow_model is None:
            backbone, shared_table_name = build_implicit_backbone(decoder, shadow_config, init_from_base)
        else:
            backbone, shared_table_name = prepare_shadow_model(shadow_model), None
        self.shadow_config = shadow_config
        self.has_implicit_shadow = shadow_model is None
        self.shared_table_name = shared_table_name
        self.decoder = decoder
        self.base_model = base_model
        self.shadow_model = backbone
        self.shadow_hidden_projection = make_projection(backbone, decoder.hidden_size)
        self._add_layer_parts(shadow_config.injected_layers(len(decoder.layers)), decoder.hidden_size)
        self.task_heads = nn.ModuleDict()
        self._backbone_signature = Signature.of(backbone)
        self._embedding_map: Tensor | None = None
        self._embedding_map_of: list[tuple[int, int]] = []
        self._checkpointing = False
        self._paused: frozenset[str] | None = None  # names of what is trained once the adapter is active again
        self.recompute_backbone = True
        self.label_tokens = LabelTokens()
        self._configure_embeddings(shadow_model)
        self._place(master_dtype(base_model.dtype) if autocast_adapter_dtype else base_model.dtype)

    def _add_layer_parts(self, num_layers: int, width: int) -> None:
        config = self.shadow_config
        variant, k = config.variant, config.gate_hidden_size
        self.shadow_injection_model = ShadowInjectionModel(num_layers, width, config.injection_hidden_size, variant)
        self.shadow_update_model = self.shadow_output_model = self.shadow_readout_model = None
        if variant == "readout":
            self.shadow_output_model = ShadowOutputModel(num_layers, width, config.output_hidden_size)
            self.shadow_readout_model = ShadowReadoutModel(width, k, config.readout_hidden_size)
        else:
            self.shadow_update_model = ShadowUpdateModel(num_layers, width, k, peft=variant == "peft")

    def _configure_embeddings(self, shadow_model: PreTrainedModel | None) -> None:
        """Freeze the table of an explicit shadow unless it is to be trained; refuse one that cannot be fed.

        An implicit shadow of another width has a random table of its own, which is trained.

        Raises:
            ValueError: a shadow without embeddings that does not read the base's width.
        """
        own, base = input_embeddings(self.shadow_model), self.base_model.get_input_embeddings()
        if own is not None:
            made_here = shadow_model is None and self.shared_table_name is None
            trained = self.shadow_config.train_shadow_embeddings or trains_embeddings(shadow_model)
            own.requires_grad_(trained or made_here)
            check_vocabularies(own.get_parameter("weight").shape[0], base.weight.shape[0])
        elif shadow_model is not None and base.weight.shape[1] != self.shadow_hidden_size:
            raise ValueError(
                f"The shadow has no embeddings of its own and reads states {self.shadow_hidden_size} wide, but "
                f"the base's embeddings are {base.weight.shape[1]} wide. Keep the shadow's embedding table."
            )

    def _place(self, dtype: torch.dtype) -> None:
        """Move the adapter to the device on which the base embeds its tokens."""
        device = execution_device(self.base_model.get_input_embeddings())
        for part in self.parts().values():
            place(part, dtype, device)

    def parts(self) -> dict[str, nn.Module]:
        """The adapter's own modules by name, without the base, the trained heads and other adapters."""
        return {name: part for name, part in self.named_children() if name in PARTS}

    @property
    def shadow_hidden_size(self) -> int:
        """S, the width of the backbone."""
        return backbone_width(self.shadow_model)

    @property
    def base_hidden_size(self) -> int:
        """d, the width of the base."""
        return self.decoder.hidden_size

    # ---------------------------------------------------------------- running the backbone

    def initial_state(self, inputs: ModelInputs) -> tuple[Tensor, Any]:
        """s = P(backbone(x)) `[B, T, d]`, and the backbone's cache; states that drafting computed are reused."""
        return with_drafted(inputs, self.run_backbone)

    def run_backbone(self, inputs: ModelInputs) -> tuple[Tensor, Any]:
        """s `[B, T, d]` of all tokens of a call, and the backbone's cache."""
        states, cache = self.backbone_states(inputs)
        return self.project(states), cache

    def project(self, states: Tensor) -> Tensor:
        """P of the backbone's states `[B, T, S]`: `[B, T, d]`."""
        projection: nn.Module = self.shadow_hidden_projection
        if isinstance(projection, nn.Identity):
            return states
        with self._backbone_precision() as autocast:
            if autocast is not None:
                projection = with_cast_weights(projection, self.base_model.dtype)
            return projection(states)

    def backbone_states(self, inputs: ModelInputs) -> tuple[Tensor, Any]:
        """backbone(x) `[B, T, S]`, before the projection, and the backbone's cache."""
        cache = None if inputs.cache is None else inputs.cache.shadow
        signature = self._backbone_signature
        arguments = {**signature.accepted(inputs.extra), **inputs.arguments(signature, cache), "return_dict": True}
        tokens = self._backbone_tokens(inputs)
        backbone: nn.Module = self.shadow_model
        with self._backbone_precision() as autocast:
            if autocast is not None:
                backbone = with_cast_weights(backbone, self.base_model.dtype)
            if self._recomputes(inputs):
                save_matmuls = not architecture_of(self.shadow_model.config).modifies_outputs_in_place
                outputs = checkpoint_except_matmuls(self.shadow_model, tokens, arguments, save_matmuls)
            else:
                outputs = backbone(**tokens, **arguments)
            return outputs[0], returned_cache(outputs)

    def _recomputes(self, inputs: ModelInputs) -> bool:
        """Whether the backbone's activations are recomputed in the backward pass, see `backbone.recompute`.

        A cache would take the keys of the same tokens twice. FSDP's hooks on the layers act differently the second time,
        so a sharded backbone saves everything.
        """
        wanted = self.recompute_backbone and self.training and torch.is_grad_enabled()
        cached = inputs.use_cache or inputs.cache is not None
        never = self._checkpointing or cached or torch.compiler.is_compiling() or is_sharded(self.shadow_model)
        return wanted and not never

    def _backbone_tokens(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """The tokens as the backbone reads them: token ids for its own embeddings, or the base's embeddings."""
        own = input_embeddings(self.shadow_model)
        if inputs.input_ids is not None and own is not None:
            return {"input_ids": inputs.input_ids}
        if own is None or isinstance(own, SharedEmbedding):
            given = inputs.inputs_embeds
            embeds = self.base_model.get_input_embeddings()(inputs.input_ids) if given is None else given.clone()
        else:
            assert inputs.inputs_embeds is not None
            embeds = self._to_shadow_width(inputs.inputs_embeds)
        if self._checkpointing and self.training and not embeds.requires_grad:
            # reentrant checkpoints drop gradients of inputs that need none; no leaf, since CTRL and GIT modify it in place
            embeds = embeds.detach().requires_grad_().clone()
        return {"inputs_embeds": embeds}

    def _to_shadow_width(self, embeds: Tensor) -> Tensor:
        """The base's embeddings `[B, T, d]` for a shadow with its own table: the least-squares map between the tables."""
        tables = [m.get_input_embeddings().weight.detach() for m in (self.base_model, self.shadow_model)]
        versions = [(table.data_ptr(), table._version) for table in tables]
        if self._embedding_map is None or versions != self._embedding_map_of:
            self._embedding_map, self._embedding_map_of = fit_embedding_map(*tables), versions
        return embeds.to(self._embedding_map.dtype) @ self._embedding_map.to(embeds.device)

    def _backbone_precision(self) -> AbstractContextManager[Any]:
        """Beside a base in half precision, float32 masters of the backbone compute in the base's dtype."""
        parameter = next(self.shadow_model.parameters())
        kind, dtype = parameter.device.type, self.base_model.dtype
        if dtype in _HALF and parameter.dtype == torch.float32 and not torch.is_autocast_enabled(kind):
            return torch.autocast(kind, dtype)
        return nullcontext()

    # ---------------------------------------------------------------- activations of base and backbone

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
        self.checkpoint_backbone(gradient_checkpointing_kwargs, kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Save all activations of base and backbone again."""
        self.base_model.activation_checkpointing_disable()
        self.base_model.disable_input_require_grads()
        self.save_backbone()

    def checkpoint_backbone(self, arguments: dict[str, Any] | None, others: dict[str, Any]) -> None:
        """Recompute the backbone's layers in the backward pass; the arguments are those of the method for both."""
        if self.shadow_model.supports_gradient_checkpointing:
            self.shadow_model.activation_checkpointing_enable(arguments, **others)
        self._checkpointing = True

    def save_backbone(self) -> None:
        """Save the backbone's activations again."""
        self.shadow_model.activation_checkpointing_disable()
        self.shadow_model.disable_input_require_grads()
        self._checkpointing = False

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The name that transformers gives `gradient_checkpointing_enable` from 5.23 on."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """The name that transformers gives `gradient_checkpointing_disable` from 5.23 on."""
        self.gradient_checkpointing_disable()

    # ---------------------------------------------------------------- coupling it to the base

    def make_coupling(self, state: Tensor, keep_head_input: bool = False) -> Coupling:
        """The coupling of one forward pass of the base, of the adapter's variant, from an initial state s `[B, T, d]`."""
        config = self.shadow_config
        state = state if config.use_shadow_state else torch.zeros_like(state)
        settings: dict[str, Any] = {
            "first_layer": config.first_injected_layer,
            "alpha": config.alpha,
            "dropout": config.dropout if self.training else 0.0,
            "residual_stream": self.decoder.residual_stream,
            "dtype": self.base_model.dtype,
            "keep_head_input": keep_head_input,
        }
        injection = self.shadow_injection_model
        if self.shadow_update_model is not None:
            settings["dropout_before_down"] = config.variant == "peft"
            return EvolvingStateCoupling(state, injection, self.shadow_update_model, **settings)
        assert self.shadow_output_model is not None
        assert self.shadow_readout_model is not None
        settings["normalize"] = config.normalize_injection
        return StaticStateCoupling(state, injection, self.shadow_output_model, self.shadow_readout_model, **settings)

    # ---------------------------------------------------------------- sizes

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of trainable parameters, and of all parameters; a quantized weight is one parameter."""
        trainable = num_weights(p for p in self.parameters() if p.requires_grad)
        return trainable, num_weights(self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"Trainable params: {trainable:,} || Total params: {total:,} || Trainable%: {100 * trainable / total:.2f}%")

    def extra_repr(self) -> str:
        """The line that `print(model)` shows: variant, sizes, and what is trained."""
        config, (trained, total) = self.shadow_config, self.get_nb_trainable_parameters()
        own = sum(p.numel() for part in self.parts().values() for p in part.parameters())
        return (
            f"variant={config.variant!r}, r={config.injection_hidden_size}, k={config.gate_hidden_size}, "
            f"alpha={config.alpha:g}, adapter={own:,}, trained={trained:,} of {total:,} parameters"
        )


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, also when accelerate holds its weights elsewhere between calls."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    return next(module.parameters()).device
