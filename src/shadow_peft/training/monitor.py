"""Reports once which parts of an adapter receive no gradient in a training loop.

Two things are watched during the first optimizer steps:

- **Parts.** Each part of the adapter and each task head with trainable parameters must receive a gradient that is not zero.
  One step is not enough: the up projections of a fresh adapter are zero, so the base path sends no gradient to the other
  parts before the second step.
- **The shadow's own loss.** The base path reaches the backbone too, so gradients of parameters do not show whether a loop
  drops the shadow's loss. Instead, the monitor checks whether a gradient arrives at the model's `loss` or at its
  `shadow_logits` during a backward pass.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.utils import ModelOutput

from shadow_peft.model import ShadowPeftModel
from shadow_peft.tasks.base import ShadowTaskModel

logger = logging.getLogger(__name__)

NO_PARTS = ("base_model", "task_heads", "other_adapters")
OWN_LOSS = "the shadow's own loss"


class GradientWatch:
    """Records which parts of an adapter received a gradient, for a training loop of your own.

    Create it before the first forward pass and call `step()` before each `optimizer.step()`.

    Args:
        model: a task model or a `ShadowPeftModel`, also inside a wrapper.
        steps: number of optimizer steps after which `missing()` is conclusive.

    Raises:
        TypeError: the model has no shadow adapter.
    """

    def __init__(self, model: nn.Module, steps: int = 3) -> None:
        self.steps, self.seen = steps, 0
        self._parts = _trainable_parts(model)
        self._reached: set[str] = set()
        self._wanted = set(self._parts)
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            if isinstance(module, ShadowTaskModel) and module.shadow_loss_weight > 0:
                self._wanted.add(OWN_LOSS)
                self._handles.append(module.register_forward_hook(self._listen))

    def _listen(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, ModelOutput):  # a tuple has no names for its tensors
            self._wanted.discard(OWN_LOSS)
            return
        for tensor in (output.get("loss"), output.get("shadow_logits")):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._hear)

    def _hear(self, gradient: Tensor) -> None:
        self._reached.add(OWN_LOSS)

    def step(self) -> bool:
        """Check the gradients before an optimizer step; returns True when enough steps were seen."""
        for name in self._wanted.intersection(self._parts) - self._reached:
            if any(p.grad is not None and bool(p.grad.any()) for p in self._parts[name]):
                self._reached.add(name)
        self.seen += 1
        return self.seen >= self.steps

    def missing(self) -> list[str]:
        """Names of the parts that received no gradient."""
        return sorted(self._wanted - self._reached)

    def close(self) -> None:
        """Stop watching."""
        while self._handles:
            self._handles.pop().remove()


class GradientMonitor(TrainerCallback):
    """Warns once, through logging, about adapter parts that received no gradient in the first optimizer steps.

    The trainers of this package add it themselves; a stock `transformers.Trainer` takes it in `callbacks=[...]`. A run
    shorter than `steps` ends without a report, and so does a run with DeepSpeed, which does not expose gradients.

    Args:
        steps: optimizer steps before the report, counted from the start of a run, also of a resumed one.

    Raises:
        ValueError: `steps` is smaller than 2; the first step of a fresh adapter shows nothing.
    """

    def __init__(self, steps: int = 3) -> None:
        if steps < 2:
            raise ValueError(f"steps must be at least 2, got {steps}: a fresh adapter's first step shows nothing.")
        self.steps = steps
        self._watch: GradientWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start watching."""
        self._end()
        if args.deepspeed_plugin is not None:
            logger.info("Gradients are not monitored with DeepSpeed, which does not expose them.")
            return
        self._watch = GradientWatch(model, self.steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradients of the whole step, accumulated and clipped; report after the last watched step."""
        if self._watch is not None and self._watch.step():
            missing = self._watch.missing()
            self._end()
            if missing:
                logger.warning(
                    "No gradient reached %s of the shadow adapter in the first %d optimizer steps: it is not trained. "
                    "Train with the trainers of shadow_peft.training, or use the `loss` that the model returns; "
                    "freeze what should not be trained.",
                    " and ".join(missing),
                    self.steps,
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self._end()

    def _end(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None


def _trainable_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    adapted = [module for module in model.modules() if isinstance(module, ShadowPeftModel)]
    if not adapted:
        raise TypeError(f"{type(model).__name__} holds no shadow adapter to monitor.")
    parts: dict[str, nn.Module] = {}
    for holder in adapted:
        for adapter_name in holder.adapter_configs:
            adapter = holder.adapter(adapter_name)
            own = {name: child for name, child in adapter.named_children() if name not in NO_PARTS}
            prefix = "" if adapter is holder else f"{adapter_name}."
            parts |= {f"{prefix}{name}": part for name, part in (own | dict(adapter.task_heads.items())).items()}
    trainable = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
    return {name: parameters for name, parameters in trainable.items() if parameters}
