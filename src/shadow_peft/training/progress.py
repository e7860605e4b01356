"""How far a training is: the loss of a causal LM may change with it (`distillation_warmup_ratio`)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from shadow_peft.tasks.causal_lm import ShadowForCausalLM


class ProgressCallback(TrainerCallback):
    """Tells the model, before every optimizer step, which part of the training will be done after it.

    The trainers of this package add it by themselves; a stock `transformers.Trainer` takes it in `callbacks=[...]`. The
    part follows the trainer's own count of steps, so a resumed run goes on where it was.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set `training_progress` to a part in (0, 1]."""
        _set_progress(model, min(1.0, (state.global_step + 1) / max(state.max_steps, 1)))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """A loss asked for after the training has its full weights."""
        _set_progress(model, 1.0)


def _set_progress(model: nn.Module, part: float) -> None:
    for module in model.modules():
        if isinstance(module, ShadowForCausalLM):
            module.training_progress = part
