"""The progress of a training, on which the loss of a causal LM may depend (`distillation_warmup_ratio`)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from shadow_peft.tasks.causal_lm import ShadowForCausalLM


class ProgressCallback(TrainerCallback):
    """Sets, before every optimizer step, the fraction of the training that is done after it.

    The trainers of this package add it themselves; a stock `transformers.Trainer` takes it in `callbacks=[...]`. The
    fraction follows the trainer's own count of steps, so a resumed run continues where it was.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set `training_progress` to a fraction in (0, 1]."""
        _set_progress(model, min(1.0, (state.global_step + 1) / max(state.max_steps, 1)))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set `training_progress` to 1, so that a later loss has its full weights."""
        _set_progress(model, 1.0)


def _set_progress(model: nn.Module, part: float) -> None:
    for module in model.modules():
        if isinstance(module, ShadowForCausalLM):
            module.training_progress = part
