"""ShadowRewardTrainer: TRL's reward modelling with the adapted base and with its shadow.

    loss = BT(r) + shadow_loss_weight * BT(r_shadow)
    BT(r) = mean over pairs of -log sigmoid(r_chosen - r_rejected - margin) + c * (r_chosen + r_rejected)^2

with `c` = `center_rewards_coefficient`. Both heads learn the same preferences, so the detached shadow is a reward model too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from trl import RewardTrainer

from shadow_peft.tasks.sequence_classification import ShadowForSequenceClassification
from shadow_peft.training.mixin import TRAINER_TAG, ShadowTrainerMixin, without_dropout


class ShadowRewardTrainer(ShadowTrainerMixin, RewardTrainer):
    """`trl.RewardTrainer` for a `ShadowForSequenceClassification`; the log carries `base_loss` and `shadow_loss`.

    Args:
        model: the model to train, on a base whose config says `num_labels=1`.
        args: `trl.RewardConfig`. Its `disable_dropout`, on by default, sets the adapter's dropout to 0.
        **kwargs: further arguments of `trl.RewardTrainer`, and `shadow_learning_rate_scale`.

    Raises:
        TypeError: the model is no `ShadowForSequenceClassification`.
        ValueError: a model with several labels, or in the mode "shadow_only".
    """

    trains = ShadowForSequenceClassification
    _tag_names = [*RewardTrainer._tag_names, TRAINER_TAG]  # noqa: RUF012

    def __init__(self, model: ShadowForSequenceClassification, args: Any = None, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        if self.args.disable_dropout:
            without_dropout(model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Pairwise loss of the adapted base plus the weighted pairwise loss of the shadow."""
        weight = self.model.shadow_loss_weight
        margin = inputs.get("margin")

        def scored(margin: Any = None, **arguments: Any) -> Any:
            return model(**arguments)

        loss, outputs = super().compute_loss(scored, inputs, True)
        self.note("base_loss", loss.detach())
        if outputs.shadow_logits is not None and weight:
            shadow_loss = pairwise_loss(outputs.shadow_logits, margin, self.args.center_rewards_coefficient)
            self.note("shadow_loss", shadow_loss.detach())
            loss = loss + weight * shadow_loss.to(loss.device)
        return (loss, outputs) if return_outputs else loss


def pairwise_loss(rewards: Tensor, margin: Tensor | None, centering: float | None) -> Tensor:
    """The Bradley-Terry loss of rewards `[2 * B, 1]`, those of chosen texts first.

    Args:
        rewards: `[2 * B, 1]`.
        margin: `[B]`, how much larger the reward of each chosen text should be; None for 0.
        centering: weight of the squared sum of a pair's rewards, or None.

    Returns:
        A scalar, in nats per pair.
    """
    chosen, rejected = rewards.squeeze(-1).chunk(2)
    lead = chosen - rejected if margin is None else chosen - rejected - margin.to(chosen.device)
    loss = -F.logsigmoid(lead).mean()
    return loss if centering is None else loss + centering * (chosen + rejected).square().mean()
