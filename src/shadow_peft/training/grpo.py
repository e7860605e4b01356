"""ShadowGRPOTrainer: TRL's group relative policy optimization of the adapted base; the shadow is distilled from it.

    loss = GRPO(policy = adapted base, reference = bare base) + shadow_loss_weight * KL(stop-gradient(policy) || shadow)

The adapted base generates. There is no target for both paths, and rewards of completions that the base wrote say little
about the shadow. So the shadow is distilled on policy: at every token that the policy wrote, the shadow's distribution moves
towards the policy's, both at the sampling temperature.

The divergence is a mean over the completions' tokens of the whole optimizer step, with or without gradient accumulation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from trl import GRPOTrainer

from shadow_peft.tasks.causal_lm import ShadowForCausalLM
from shadow_peft.training.mixin import TRAINER_TAG, ShadowTrainerMixin, mean_over_step, reject_options, without_dropout
from shadow_peft.training.scoring import Reference, Scored

#: Other ways to generate or to compute logits, which would run the base without the adapter.
_WITHOUT_ADAPTER = ("use_vllm", "use_transformers_continuous_batching", "cast_lm_head_to_fp32")


class ShadowGRPOTrainer(ShadowTrainerMixin, GRPOTrainer):
    """`trl.GRPOTrainer` for a `ShadowForCausalLM`; the log carries `base_loss` (GRPO's) and `shadow_loss` (nats per token).

    Args:
        model: the policy.
        reward_funcs: see `trl.GRPOTrainer`.
        args: `trl.GRPOConfig`. With `beta` above 0 the reference is the bare base, with the adapter disabled.
        **kwargs: further arguments of `trl.GRPOTrainer`, and `shadow_learning_rate_scale`.

    Raises:
        TypeError: the model is no `ShadowForCausalLM`.
        ValueError: a policy in the mode "shadow_only", or an option that is not supported.
    """

    trains = ShadowForCausalLM
    _tag_names = [*GRPOTrainer._tag_names, TRAINER_TAG]  # noqa: RUF012

    def __init__(self, model: ShadowForCausalLM, reward_funcs: Any = None, args: Any = None, **kwargs: Any) -> None:
        reject_options(args, _WITHOUT_ADAPTER, "not supported, it would run the base without the adapter.")
        reject_options(args, ("sync_ref_model",), "not supported, the reference is the bare base.")
        reject_options(args, ("router_aux_loss_coef",), "not supported, the routers of a frozen base are not trained.")
        beta = 0.0 if args is None else args.beta
        try:
            if args is not None:
                args.beta = 0.0  # else the constructor loads a second copy of the base as reference
            super().__init__(model, reward_funcs, args, **kwargs)
        finally:
            if args is not None:
                args.beta = beta
        self.beta = beta
        self.ref_model = Reference(model, self.temperature) if beta else None
        self.aux_loss_enabled = False
        if self.args.disable_dropout:
            without_dropout(model)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's method with the log-probabilities of the adapted model."""
        if not isinstance(model, Scored | Reference):
            model = Scored(model, self.temperature)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """GRPO loss of the adapted base plus the weighted divergence of the shadow from it."""
        weight = self.model.shadow_loss_weight
        scored = Scored(model, self.temperature, shadow=weight > 0)
        loss: Tensor = super()._compute_loss(scored, inputs)
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        self.note("base_loss", loss.detach() * steps)
        if scored.shadow_log_probs is not None:
            shadow_loss = self._divergence(scored, inputs)
            self.note("shadow_loss", shadow_loss.detach() * steps)
            loss = loss + weight * shadow_loss
        return loss

    def _divergence(self, scored: Scored, inputs: dict[str, Any]) -> Tensor:
        """This micro-batch's share of the mean KL over the completions' tokens, already scaled for accumulation."""
        policy, shadow = scored.log_probs.detach(), scored.shadow_log_probs
        assert shadow is not None
        nats = scored.spread(F.kl_div(shadow, policy, log_target=True, reduction="none").sum(-1))
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        total = (nats[:, -mask.shape[1] :] * mask).sum()
        count = inputs["num_items_in_batch"]  # of the whole generation batch, which may span several optimiser steps
        if not self.model.training:
            return mean_over_step(total, count, 1, self.accelerator.num_processes)
        micro_batches = self.args.steps_per_generation
        share = mean_over_step(total, count, micro_batches, self.accelerator.num_processes)
        return share / self.current_gradient_accumulation_steps
