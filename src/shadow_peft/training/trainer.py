"""ShadowTrainer: `transformers.Trainer` with the optimizer groups and the monitor of this package.

A stock `Trainer` trains a task model correctly, since it reads `output.loss`. This one adds `shadow_learning_rate_scale` and
the monitor, and refuses the two options with which `Trainer` would compute a loss of its own from the base's logits.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from shadow_peft.tasks.base import ShadowTaskModel
from shadow_peft.training.mixin import ShadowTrainerMixin, reject_options


class ShadowTrainer(ShadowTrainerMixin, Trainer):
    """`transformers.Trainer` for a task model.

    Args:
        model: a `ShadowForCausalLM` or `ShadowForSequenceClassification`.
        args: `TrainingArguments`.
        **kwargs: further arguments of `transformers.Trainer`, and `shadow_learning_rate_scale`.

    Raises:
        TypeError: the model is no task model.
        ValueError: `label_smoothing_factor` or `compute_loss_func`, which would drop the shadow's loss.
    """

    needs_base_path = False

    def __init__(self, model: ShadowTaskModel, args: Any = None, **kwargs: Any) -> None:
        reject_options(args, ("label_smoothing_factor",), "not supported, the shadow model computes its own loss.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func is not supported: the shadow model computes its own loss.")
        super().__init__(model, args, **kwargs)
