"""What every trainer here adds to the trainer that it subclasses.

- It checks that the model has a shadow that this trainer trains. It keeps the model's own `forward`: TRL replaces it on the
  instance by one that computes log-probabilities from the base's head without the adapter.
- Beside a quantized base the adapter keeps its dtype: TRL casts trained parameters there to bfloat16, see `_same_dtypes`.
- It adds optimizer groups (`groups`), the gradient monitor (`monitor`) and the progress of the training (`progress`).
- It logs `base_loss` and `shadow_loss` in TRL's trainers.

`shadow_learning_rate_scale` is an argument of the trainer. It is no field of `ShadowConfig`, which defines an adapter and is
stored with it, while a rate belongs to a run. As a field of the arguments it would need a subclass of each of
`TrainingArguments`, `SFTConfig`, `DPOConfig` and so on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_optimizer import is_optimizer_factory

from shadow_peft.base.quantization import passes_gradients, quantization_method
from shadow_peft.tasks.base import TRAINER_TAG, ShadowTaskModel
from shadow_peft.training.groups import parameter_groups
from shadow_peft.training.monitor import GradientMonitor
from shadow_peft.training.progress import ProgressCallback

logger = logging.getLogger(__name__)

__all__ = ["TRAINER_TAG", "ShadowTrainerMixin", "mean_over_step", "reject_options", "without_dropout"]

#: Keys with which an optimizer of transformers passes its own groups.
_OWN_GROUPS = ("params", "model", "optimizer_dict")


class ShadowTrainerMixin:
    """Mixin for a trainer class; it comes before the trainer in the list of base classes.

    Args:
        model: the task model.
        *args: positional arguments of the trainer.
        shadow_learning_rate_scale: rate of the backbone and its projection, in units of the learning rate.
        **kwargs: keyword arguments of the trainer.

    Raises:
        TypeError: the model is of another class than `trains`.
        ValueError: a model in the mode "shadow_only", where the trainer needs the base path; an optimizer in `optimizers`
            together with a scale; a base whose quantization passes no gradients.
    """

    trains: type[ShadowTaskModel] = ShadowTaskModel
    """The class of models that this trainer trains."""

    needs_base_path = True
    """Whether a model in the mode "shadow_only" is refused."""

    # attributes of the trainer
    model: Any
    args: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    get_optimizer_cls_and_kwargs: Any
    callback_handler: Any
    add_callback: Any
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(self, model: ShadowTaskModel, *args: Any, shadow_learning_rate_scale: float = 1.0, **kwargs: Any) -> None:
        if not isinstance(model, self.trains):
            raise TypeError(f"{type(self).__name__} trains a {self.trains.__name__}, got {type(model).__name__}.")
        if self.needs_base_path and model.inference_mode != "base_shadow":
            raise ValueError(f'{type(self).__name__} trains base and shadow together: set_inference_mode("base_shadow").')
        _require_gradients(model)
        self.shadow_learning_rate_scale = shadow_learning_rate_scale
        bound = {name: forward for name, forward in model.__dict__.items() if name == "forward"}
        with _same_dtypes(model):
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        model.__dict__.pop("forward", None)
        model.__dict__.update(bound)
        if self.optimizer is not None and shadow_learning_rate_scale != 1:
            raise ValueError(
                "An optimizer in `optimizers` has its own groups: make them with parameter_groups, without a scale."
            )
        for kind in (GradientMonitor, ProgressCallback):
            if not any(isinstance(callback, kind) for callback in self.callback_handler.callbacks):
                self.add_callback(kind())

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """Those of transformers, but no epoch where `max_steps` is 0: transformers would take one step."""
        epochs, *others = super().set_initial_training_values(args, dataloader)  # type: ignore[misc]
        return (0 if args.max_steps == 0 else epochs, *others)

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer that the arguments ask for, with the groups of `parameter_groups`.

        Raises:
            ValueError: an optimizer that makes its own groups, and a scale other than 1.
        """
        if self.optimizer is None:
            self.optimizer_cls_and_kwargs = self._grouped(self.model if model is None else model)
        return super().create_optimizer(model)  # type: ignore[misc]

    def _grouped(self, model: Any) -> tuple[Any, dict[str, Any]]:
        args, given = self.args, self.optimizer_cls_and_kwargs
        kind, options = self.get_optimizer_cls_and_kwargs(args, model) if given is None else given
        if is_optimizer_factory(kind) or any(key in options for key in _OWN_GROUPS):
            if self.shadow_learning_rate_scale != 1:
                raise ValueError(
                    f"shadow_learning_rate_scale is {self.shadow_learning_rate_scale}, but optim={args.optim!r} makes its "
                    "own parameter groups; choose another optimizer, or leave the scale at 1."
                )
            return kind, options
        rate = options.get("lr", args.learning_rate)
        groups = parameter_groups(model, rate, args.weight_decay, self.shadow_learning_rate_scale)
        return kind, {**options, "params": groups}

    def note(self, name: str, value: Tensor | float) -> None:
        """Record a value; the next log entry of a TRL trainer shows the mean of the recorded values."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].setdefault(name, []).append(float(value))


def _require_gradients(model: ShadowTaskModel) -> None:
    """Refuse a quantized base through which no gradient would pass.

    Raises:
        ValueError: its method is none that passes gradients.
    """
    base = model.peft_model.base_model
    if not passes_gradients(base):
        raise ValueError(
            f"The base is quantized with {quantization_method(base)!r}, whose layers pass no gradient to the adapter before "
            "them. Load it with bitsandbytes or torchao, or not quantized."
        )


@contextmanager
def _same_dtypes(model: ShadowTaskModel) -> Iterator[None]:
    """Give trained parameters their dtype and their values back afterwards.

    The constructors of TRL's trainers cast whatever is trained beside a bitsandbytes base to bfloat16, as the QLoRA paper
    does. `autocast_adapter_dtype` of this library says float32 unless it is told otherwise, and steps of a small learning
    rate are lost in bfloat16.
    """
    before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in before:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


def reject_options(args: Any, names: tuple[str, ...], why: str) -> None:
    """Raise if one of these options is set in the arguments.

    Raises:
        ValueError: one of them is set.
    """
    asked = [name for name in names if args is not None and getattr(args, name)]
    if asked:
        raise ValueError(f"{' and '.join(asked)}: {why}")


def without_dropout(model: ShadowTaskModel) -> None:
    """Apply TRL's `disable_dropout` to all adapters, whose dropout is no module: set it to 0 in their configs."""
    for adapter in map(model.peft_model.adapter, model.peft_model.adapter_configs):
        if adapter.shadow_config.dropout:
            logger.info("disable_dropout: an adapter's dropout of %s becomes 0.", adapter.shadow_config.dropout)
            adapter.shadow_config = replace(adapter.shadow_config, dropout=0.0)


def mean_over_step(total: Tensor, count: Tensor | int, steps: int, processes: int) -> Tensor:
    """The part of a mean over a whole optimizer step that one micro-batch contributes.

    For trainers that average micro-batches and processes with equal weights.

    Args:
        total: sum over this micro-batch.
        count: number of items in all `steps` micro-batches of all `processes`.
        steps: gradient accumulation steps.
        processes: number of processes that average their gradients.

    Returns:
        `total * steps * processes / count`: its mean over micro-batches and processes is the mean over the items.
    """
    return total * steps * processes / torch.as_tensor(count, device=total.device).clamp(min=1)
