"""What the task models share: one adapted model, two inference modes, heads that may be trained.

A task model is a `PreTrainedModel`, so trainers, pipelines and accelerate treat it as one. Its state dict and its files
contain the adapter and the trained heads only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadow_peft.adapter import ShadowAdapter
from shadow_peft.backbone.dequantize import float_copy
from shadow_peft.backbone.implicit import master_dtype, materialized
from shadow_peft.checkpoint import reading
from shadow_peft.config import ShadowConfig
from shadow_peft.model import ShadowPeftModel
from shadow_peft.multi_adapter.named import DEFAULT
from shadow_peft.outputs import InferenceMode
from shadow_peft.storage.sharded import is_sharded
from shadow_peft.tasks.adapters import TaskAdaptersMixin

TRAINER_TAG = "shadow-peft"
"""A trainer of TRL with this tag declares that it trains the shadow too, see `ShadowTaskModel.add_model_tags`."""


class ShadowTaskModel(TaskAdaptersMixin, PreTrainedModel):
    """An adapted model with a task's heads and loss.

    Args:
        peft_model: the adapted base.
        shadow_loss_weight: factor of the shadow's own loss.
        inference_mode: "base_shadow" computes the logits with the adapted base, "shadow_only" with the shadow alone; then no
            layer of the base runs.

    Raises:
        TypeError: `peft_model` is no `ShadowPeftModel`.
        ValueError: an unknown mode, a negative weight, or a head in `modules_to_save` that the task does not have.
    """

    base_model_prefix = "peft_model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    head_names: ClassVar[tuple[str, str]]
    """Names of the base's and the shadow's head."""

    loss_settings: ClassVar[tuple[str, ...]] = ("shadow_loss_weight",)
    """Arguments and attributes that define the loss; they are stored with the adapter."""

    def __init__(
        self,
        peft_model: ShadowPeftModel,
        *,
        shadow_loss_weight: float = 0.05,
        inference_mode: InferenceMode = "base_shadow",
    ) -> None:
        if not isinstance(peft_model, ShadowPeftModel):
            raise TypeError(f"Expected a ShadowPeftModel (see get_shadow_model), got {type(peft_model).__name__}.")
        if shadow_loss_weight < 0:
            raise ValueError(f"shadow_loss_weight must not be negative, got {shadow_loss_weight}.")
        self._check_heads(peft_model.shadow_config)
        super().__init__(peft_model.base_model.config)
        self.peft_model = peft_model
        self._no_split_modules = peft_model.base_model._no_split_modules  # what FSDP wraps: the decoder layers
        self._hf_peft_config_loaded = peft_model._hf_peft_config_loaded
        self.shadow_loss_weight = shadow_loss_weight
        self.all_tied_weights_keys: dict[str, str] = {}
        self.set_inference_mode(inference_mode)
        self._add_heads(peft_model)
        self.train(peft_model.training)
        self._own_dtypes = self._trained_dtypes()

    @classmethod
    def _check_heads(cls, config: ShadowConfig) -> None:
        unknown = set(config.modules_to_save) - set(cls.head_names)
        if unknown:
            raise ValueError(
                f"modules_to_save names {', '.join(sorted(unknown))}, but {cls.__name__} has {' and '.join(cls.head_names)}."
            )

    def _trained_dtypes(self) -> set[torch.dtype]:
        return {parameter.dtype for parameter in self.parameters() if parameter.requires_grad}

    @classmethod
    def _add_heads(cls, adapter: ShadowAdapter) -> None:
        """Give an adapter the heads of its own that this task wants and that it does not have."""
        for name in cls._owned_heads(adapter):
            if name not in adapter.task_heads:
                adapter.task_heads[name] = cls._fresh_head(adapter, name)

    @classmethod
    def _owned_heads(cls, adapter: ShadowAdapter) -> list[str]:
        """The heads of which this task has copies of its own."""
        raise NotImplementedError

    @classmethod
    def _fresh_head(cls, adapter: ShadowAdapter, name: str) -> nn.Module:
        """A head as it is before training."""
        raise NotImplementedError

    def set_inference_mode(self, mode: InferenceMode) -> None:
        """Choose which network computes the logits: "base_shadow" or "shadow_only".

        Raises:
            ValueError: an unknown mode.
        """
        if mode not in get_args(InferenceMode):
            raise ValueError(f"inference_mode must be one of {', '.join(map(repr, get_args(InferenceMode)))}, got {mode!r}.")
        self.inference_mode = mode

    def wants_shadow_logits(self, asked: bool | None) -> bool:
        """Whether to compute the shadow's logits: as asked, else always but in training without a shadow loss."""
        return asked if asked is not None else not (self.training and self.shadow_loss_weight == 0)

    # ---------------------------------------------------------------- what transformers expects of a model

    @property
    def config(self) -> Any:
        """A view of the base's config that tells `transformers.Trainer` to leave `shadow_logits` out of its predictions.

        It shares its values with the base's config: setting one sets the other.
        """
        if "peft_model" not in self._modules:
            return self.__dict__["_early_config"]
        config = self.peft_model.base_model.config
        kind: Any = type(config)
        view = object.__new__(_without_shadow_logits(kind))
        view.__dict__ = config.__dict__
        return view

    @config.setter
    def config(self, config: PreTrainedConfig) -> None:
        if "peft_model" in self._modules:
            self.peft_model.base_model.config = config
        else:
            self.__dict__["_early_config"] = config  # transformers' constructor runs before `peft_model` is set

    @property
    def device(self) -> torch.device:
        """The device of the base, where inputs belong."""
        device: torch.device = self.peft_model.base_model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the base computes in."""
        dtype: torch.dtype = self.peft_model.base_model.dtype
        return dtype

    def get_input_embeddings(self) -> nn.Module:
        """The base's embedding table."""
        return self.peft_model.base_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The output embedding that computes the adapted base's logits, if there is one."""
        heads = self.peft_model.task_heads
        return heads["lm_head"] if "lm_head" in heads else self.peft_model.base_model.get_output_embeddings()

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Tag the model for the hub; refuse a trainer of TRL that would not train the shadow.

        TRL's trainers compute losses from the base's logits, or call the base's head without the adapter. Neither trains
        the shadow, and their calls look like those of a training loop that does it right. But their constructors, and
        nothing else, add their tags to the model, `["trl", "sft"]` for example (in TRL 1.16 all but the two experimental
        asynchronous ones, which need outputs that the model does not return). The trainers of `shadow_peft.training` add
        `TRAINER_TAG` too. `GradientMonitor` reports a loop that passes this check and still drops the shadow's loss.

        Args:
            tags: one or more tags.

        Raises:
            TypeError: tags of TRL without ours, and a shadow loss that would be dropped, or an adapter that TRL has rounded.
        """
        names = [tags] if isinstance(tags, str) else tags
        of_trl = "trl" in names and TRAINER_TAG not in names
        if of_trl and self._hf_peft_config_loaded and self._trained_dtypes() != self._own_dtypes:
            raise TypeError(
                f"This trainer of TRL ({', '.join(names)}) has rounded the adapter to bfloat16, as it does beside any base "
                "of bitsandbytes. Use the trainers of shadow_peft.training, which keep its dtype; a trainer of your own "
                f"does so with ShadowTrainerMixin before TRL's class, and {TRAINER_TAG!r} in its _tag_names."
            )
        if of_trl and self.shadow_loss_weight > 0:
            raise TypeError(
                f"This trainer of TRL ({', '.join(names)}) does not train the shadow: its loss would be dropped silently. "
                "Use ShadowSFTTrainer, ShadowDPOTrainer, ShadowGRPOTrainer or ShadowRewardTrainer of "
                "shadow_peft.training; a trainer of your own that adds the shadow's loss declares it with "
                f"{TRAINER_TAG!r} in its _tag_names."
            )
        super().add_model_tags(tags)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """True: the base has chosen its experts' implementation; transformers would look for experts in this file."""
        return True

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute layers in the backward pass; transformers' `activation_checkpointing_enable` calls this too."""
        self.peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again; transformers' `activation_checkpointing_disable` calls this too."""
        self.peft_model.gradient_checkpointing_disable()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "peft_model":
                raise
            return getattr(self.peft_model, name)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the embeddings of the base and of a shadow that has its own; arguments as transformers takes them."""
        return self.peft_model.resize_token_embeddings(*args, **kwargs)

    # ---------------------------------------------------------------- files

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """The adapter's tensors and the trained heads, see `ShadowPeftModel.state_dict`."""
        prefix += _INNER if is_sharded(self) else ""
        return self.peft_model.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Copy what `state_dict` returned into this model, see `ShadowPeftModel.load_state_dict`."""
        return self.peft_model.load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load from the state dict of a parent module: the adapted model inside finds its part where torch looks for it."""
        inside = prefix + _INNER
        for name in [name for name in state_dict if name.startswith(prefix) and not name.startswith(inside)]:
            state_dict[inside + name[len(prefix) :]] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained."""
        self.peft_model.print_trainable_parameters()

    def export_shadow(self, *, fold: bool = False) -> PreTrainedModel:
        """The shadow alone as a self-contained model, see `ShadowPeftModel.export_shadow`."""
        return self.peft_model.export_shadow(fold=fold)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the adapter, the trained heads and the factors of the loss.

        The arguments are those of `ShadowPeftModel.save_pretrained`.
        """
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = _inner(kwargs["state_dict"])
        training = {name: getattr(self, name) for name in self.loss_settings}
        self.peft_model.save_pretrained(save_directory, **{"training": training, **kwargs})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload adapter and trained heads to the hub; the arguments are those of `ShadowPeftModel.push_to_hub`."""
        return self.peft_model.push_to_hub(repo_id, save=self.save_pretrained, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        pretrained_shadow_path: str | Path,
        *,
        is_trainable: bool = False,
        shadow_model: PreTrainedModel | None = None,
        shadow_loss_weight: float | None = None,
        inference_mode: InferenceMode = "base_shadow",
        autocast_adapter_dtype: bool = True,
        adapter_name: str = DEFAULT,
    ) -> Any:
        """Attach a stored adapter with its heads to a base.

        Args:
            model: the base.
            pretrained_shadow_path: a directory, or on the hub `owner/name` or `owner/name/folder`; `@revision` may follow.
            is_trainable: False freezes the adapter and the heads and sets eval mode.
            shadow_model: the explicit shadow of the adapter; adapters saved by this library rebuild theirs without it.
            shadow_loss_weight: None uses the stored one, or 0.05 if none is stored; other factors of the loss are the stored
                ones.
            inference_mode: "base_shadow" or "shadow_only".
            autocast_adapter_dtype: keep the adapter in float32 whatever the base's dtype; False casts it to that dtype.
            adapter_name: its name in this model.

        Raises:
            ValueError: there is no adapter, a file is damaged, the adapter does not fit the base, or it has heads of another
                task.
        """
        stored = cls._read(pretrained_shadow_path)
        settings = {name: float(stored.training[name]) for name in cls.loss_settings if name in stored.training}
        if shadow_loss_weight is not None:
            settings["shadow_loss_weight"] = shadow_loss_weight
        return ShadowPeftModel.from_checkpoint(
            model,
            stored,
            is_trainable=is_trainable,
            shadow_model=shadow_model,
            autocast_adapter_dtype=autocast_adapter_dtype,
            adapter_name=adapter_name,
            make_head=cls._fresh_head,
            make_task=lambda peft_model: cls(peft_model, inference_mode=inference_mode, **settings),
        )

    @classmethod
    def _read(cls, path_or_repo: str | Path) -> reading.Checkpoint:
        """A checkpoint whose heads are those of this task.

        Raises:
            ValueError: they are not, or there is no checkpoint.
        """
        stored = reading.read(path_or_repo)
        foreign = set(stored.head_names) - set(cls.head_names)
        if foreign:
            raise ValueError(f"{stored.directory} holds {', '.join(sorted(foreign))}, which {cls.__name__} does not have.")
        stored.require_heads(cls.head_names)
        return stored


@cache
def _without_shadow_logits(kind: Any) -> Any:
    """A config class of the same name whose `shadow_logits` a Trainer leaves out of its predictions."""
    ignored = [*getattr(kind, "keys_to_ignore_at_inference", ["past_key_values"]), "shadow_logits"]
    return type(kind.__name__, (kind,), {"keys_to_ignore_at_inference": ignored, "__module__": kind.__module__})


_INNER = "peft_model."


def _inner(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A task model's state dict under the names of the adapted model inside."""
    return {name.removeprefix(_INNER): tensor for name, tensor in state.items()}


def trainable_copy(module: nn.Module) -> nn.Module:
    """A trainable copy of a head: in float32, or float64 where it computes in that."""
    with materialized(module):
        copied = float_copy(module)
        return copied.to(master_dtype(copied.get_parameter("weight").dtype)).requires_grad_(True)
