"""ShadowSFTTrainer: TRL's supervised fine-tuning with the loss that the shadow model itself computes.

TRL's `SFTTrainer` rebuilds its loss from log-probabilities of the base's head and never reads `output.loss`, so the
shadow's own term would be lost without a word. This subclass hands the batch to the model instead, so that

    loss = CE(logits, labels) + shadow_loss_weight * CE(shadow_logits, labels)

is what is trained, counted over the targets of the whole optimiser step. The `loss` and `eval_loss` of the log are that sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from trl import SFTTrainer

from shadow_peft.causal_lm import ShadowForCausalLM
from shadow_peft.loss import IGNORE_INDEX, next_token_loss, shifted


class ShadowSFTTrainer(SFTTrainer):
    """`trl.SFTTrainer` for a `ShadowForCausalLM`.

    Takes the arguments of `trl.SFTTrainer`. Besides the loss, the log carries `base_loss`, `shadow_loss` and, where it is
    trained, `distillation_loss` (nats per target of a batch); in evaluation also `mean_token_accuracy` of the base path.

    Raises:
        TypeError: if the model is not a `ShadowForCausalLM`.
        ValueError: if `args` ask for a loss that this trainer would not compute.
    """

    def __init__(self, model: ShadowForCausalLM, args: Any = None, **kwargs: Any) -> None:
        if not isinstance(model, ShadowForCausalLM):
            raise TypeError(f"ShadowSFTTrainer trains a ShadowForCausalLM, got {type(model).__name__}; use trl.SFTTrainer.")
        _check_loss(args, kwargs)
        super().__init__(model, args, **kwargs)
        model.__dict__.pop("forward", None)  # TRL's fused head, which this trainer never calls

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss of a batch; with `return_outputs`, the model's output beside it."""
        mode = "train" if self.model.training else "eval"
        loss, outputs = Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, True, num_items_in_batch)
        self._note(mode, outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _note(self, mode: str, outputs: Any, inputs: dict[str, Any]) -> None:
        """Keeps what the next line of the log averages."""
        metrics, targets = self._metrics[mode], shifted(inputs["labels"])
        here = targets.ne(IGNORE_INDEX)
        if here.any():
            for name, value in _terms(outputs, here, targets).items():
                metrics[name].append(float(value))
        if mode == "train":
            self._total_train_tokens += int(inputs["attention_mask"].sum())
        metrics["num_tokens"] = [self._total_train_tokens]


def _terms(outputs: Any, here: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What is logged of a batch: the terms that training gives, else what the logits of the evaluation say."""
    if outputs.logits is None:
        names = ("base_loss", "shadow_loss", "distillation_loss")
        return {name: outputs[name] for name in names if outputs.get(name) is not None}
    chosen = outputs.logits[here]
    terms = {
        "base_loss": next_token_loss(chosen, targets[here]),
        "mean_token_accuracy": chosen.argmax(-1).eq(targets[here]).float().mean(),
    }
    if outputs.shadow_logits is not None:
        terms["shadow_loss"] = next_token_loss(outputs.shadow_logits[here], targets[here])
    return terms


def _check_loss(args: Any, kwargs: dict[str, Any]) -> None:
    """Refuses options that TRL would honour in its own loss and that the model's loss does not know."""
    if args is not None and args.loss_type != "nll":
        raise ValueError(f"loss_type must be 'nll', got {args.loss_type!r}: the shadow model computes its own loss.")
    if args is not None and args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is not supported: the shadow model computes its own loss.")
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func is not supported: the shadow model computes its own loss.")
