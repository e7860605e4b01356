"""The shadow learns from the adapted base: the divergence of their next-token distributions.

t^2 * KL(p || q)        p = softmax(logits / t) of the adapted base        q = softmax(shadow_logits / t)
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from shadow_peft.losses.reduction import IGNORE_INDEX


def distillation_sum(logits: Tensor, shadow_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """t^2 KL(p || q), summed over the tokens that have a target.

    Args:
        logits: the teacher's, `[N, V]`; the caller detaches them.
        shadow_logits: the student's, `[N, V]`.
        targets: `[N]`, `-100` where there is none.
        temperature: t.

    Returns:
        A scalar, in nats.
    """
    teacher = (logits / temperature).log_softmax(-1)
    student = (shadow_logits / temperature).log_softmax(-1)
    by_token = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * by_token.masked_fill(targets.to(by_token.device).eq(IGNORE_INDEX), 0).sum()
