"""ShadowDPOTrainer: TRL's direct preference optimization of the adapted base; its shadow learns the chosen answers.

    loss = DPO(policy = adapted base, reference = bare base) + shadow_loss_weight * CE(shadow_logits, chosen completions)

Why the shadow has a cross entropy and not a DPO loss: DPO assumes a reference that can already write such answers, and its
gradient vanishes once a pair is ranked. A shadow can rank a pair correctly and still give both answers almost no
probability. To answer alone, and to draft for the base, it has to learn to write the chosen answers. Also, there is no bare
shadow that could be its reference.

The cross entropy is a mean over the chosen completions' tokens of the whole optimizer step, with or without gradient
accumulation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from shadow_peft.losses.reduction import IGNORE_INDEX
from shadow_peft.tasks.causal_lm import ShadowForCausalLM
from shadow_peft.training.mixin import TRAINER_TAG, ShadowTrainerMixin, mean_over_step, reject_options, without_dropout
from shadow_peft.training.scoring import Reference, Scored


class ShadowDPOTrainer(ShadowTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` for a `ShadowForCausalLM`; the log carries `base_loss` (DPO's) and `shadow_loss` (nats per token).

    Args:
        model: the policy.
        ref_model: a causal LM of transformers; None uses the bare base, with the adapter disabled.
        args: `trl.DPOConfig`. Its `disable_dropout`, on by default, sets the adapter's dropout to 0.
        **kwargs: further arguments of `trl.DPOTrainer`, and `shadow_learning_rate_scale`.

    Raises:
        TypeError: the model is no `ShadowForCausalLM`, or the reference is one.
        ValueError: a policy in the mode "shadow_only", or an option that is not supported.
    """

    trains = ShadowForCausalLM
    _tag_names = [*DPOTrainer._tag_names, TRAINER_TAG]  # noqa: RUF012

    def __init__(self, model: ShadowForCausalLM, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        reject_options(args, ("sync_ref_model",), "not supported, the reference is the bare base.")
        reject_options(args, ("router_aux_loss_coef",), "not supported, the routers of a frozen base are not trained.")
        if isinstance(ref_model, ShadowForCausalLM):
            raise TypeError("A ShadowForCausalLM cannot be ref_model; leave it out to use the bare base.")
        if ref_model is None and isinstance(model, ShadowForCausalLM):
            ref_model = Reference(model)
        super().__init__(model, ref_model, args, **kwargs)
        self.aux_loss_enabled = False
        if self.args.disable_dropout:
            without_dropout(model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """DPO loss of the adapted base plus the weighted cross entropy of the shadow."""
        weight = self.model.shadow_loss_weight
        scored = Scored(model, shadow=weight > 0)
        result = super().compute_loss(scored, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        self.note("base_loss", loss.detach())
        if scored.shadow_log_probs is not None:
            loss = loss + weight * self._shadow_loss(scored, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _shadow_loss(self, scored: Scored, count: Any) -> Tensor:
        chosen = _chosen(scored.mask)[scored.mask]
        assert scored.shadow_log_probs is not None
        nats = -scored.shadow_log_probs.gather(-1, scored.targets[:, None]).squeeze(-1)[chosen]
        self.note("shadow_loss", nats.detach().sum() / chosen.sum().clamp(min=1))
        if count is None:
            return nats.sum() / chosen.sum().clamp(min=1)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return mean_over_step(nats.sum(), count, self.current_gradient_accumulation_steps, processes)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Number of tokens of the chosen completions in all micro-batches of a step; `Trainer` counts them as labels."""
        masks = [_chosen(batch["completion_mask"][:, 1:].bool()) for batch in batch_samples]
        labels = [torch.where(mask, 0, IGNORE_INDEX) for mask in masks]
        return super()._get_num_items_in_batch([{"labels": x, "shift_labels": x} for x in labels], device)


def _chosen(mask: Tensor) -> Tensor:
    """The part of a mask `[2 * B, T]` that belongs to chosen completions, which come first."""
    chosen, rejected = mask.chunk(2)
    return torch.cat([chosen, torch.zeros_like(rejected)])
