"""ShadowSFTTrainer: TRL's supervised fine-tuning with the loss that the shadow model itself computes.

TRL's `SFTTrainer` computes its loss from log-probabilities of the base's head and never reads `output.loss`, so the
shadow's own term would be lost. This subclass passes the batch to the model instead and trains

    loss = CE(logits, labels) + shadow_loss_weight * CE(shadow_logits, labels)

averaged over the targets of the whole optimizer step. `loss` and `eval_loss` in the log are this sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from trl import SFTTrainer

from shadow_peft.losses.language_modeling import next_token_loss, shifted
from shadow_peft.losses.reduction import IGNORE_INDEX
from shadow_peft.tasks.causal_lm import ShadowForCausalLM
from shadow_peft.training.mixin import TRAINER_TAG, ShadowTrainerMixin, reject_options


class ShadowSFTTrainer(ShadowTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` for a `ShadowForCausalLM`.

    Besides the loss, it logs `base_loss`, `shadow_loss` and, where it is trained, `distillation_loss` (nats per target of a
    batch); in evaluation also `mean_token_accuracy` of the base path.

    Args:
        model: the model to train.
        args: `trl.SFTConfig`.
        **kwargs: further arguments of `trl.SFTTrainer`, and `shadow_learning_rate_scale`.

    Raises:
        TypeError: the model is no `ShadowForCausalLM`.
        ValueError: `args` ask for a loss that this trainer does not compute.
    """

    trains = ShadowForCausalLM
    needs_base_path = False
    _tag_names = [*SFTTrainer._tag_names, TRAINER_TAG]  # noqa: RUF012

    def __init__(self, model: ShadowForCausalLM, args: Any = None, **kwargs: Any) -> None:
        _check_loss(args, kwargs)
        super().__init__(model, args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss of a batch; with `return_outputs`, a pair of loss and output."""
        loss, outputs = Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, True, num_items_in_batch)
        self._log_losses(outputs, shifted(inputs["labels"]))
        self._log_tokens(inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _log_losses(self, outputs: Any, targets: Tensor) -> None:
        here = targets.ne(IGNORE_INDEX)
        if here.any():
            for name, value in _terms(outputs, here, targets).items():
                self.note(name, value)

    def _log_tokens(self, inputs: dict[str, Any]) -> None:
        """Count tokens; a padding-free batch has no mask, since all of it is tokens."""
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            mask = inputs.get("attention_mask")
            self._total_train_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def _terms(outputs: Any, here: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The values to log of a batch: in training the terms of the loss, in evaluation losses and accuracy from the logits."""
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
    """Raise for options of TRL's own loss that the model's loss does not support."""
    if args is not None and args.loss_type != "nll":
        raise ValueError(f"loss_type must be 'nll', got {args.loss_type!r}: the shadow model computes its own loss.")
    reject_options(args, ("label_smoothing_factor",), "not supported, the shadow model computes its own loss.")
    reject_options(args, ("router_aux_loss_coef",), "not supported, the routers of a frozen base are not trained.")
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func is not supported: the shadow model computes its own loss.")
