"""Next-token loss, and distillation from the k most likely next tokens of a teacher, behind a head that is not trained.

For one token, p_1 ... p_k are the teacher's probabilities of its k most likely next tokens, q_1 ... q_k the student's of the
same ones, and p_0, q_0 those of all other tokens together:

    CE = -log q(target)          KL = p_0 log(p_0 / q_0) + p_1 log(p_1 / q_1) + ... + p_k log(p_k / q_k)

KL is that of two distributions over k + 1 events: at most that over the whole vocabulary V, and equal to it for k = V - 1.

Logits z `[N, V]` exist for a chunk of tokens only. Since nothing behind the states `[N, d]` is trained, the gradient with
respect to them is computed at once, beside the loss: each logit is computed once in a step, and the head has no gradient.

    d CE / dz_j = q_j - [j = target]          d KL / dz_j = q_j - p_j                  for the teacher's tokens
                                              d KL / dz_j = q_j - q_j * p_0 / q_0      for all others
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from shadow_peft.losses.reduction import IGNORE_INDEX, at_least_float32

CHUNK = 256
"""Tokens whose logits exist at once."""

_LEAST = 1e-6
"""Least probability of all other tokens together; below it, rounding decides."""


class TopTokens(NamedTuple):
    """The k most likely next tokens of N tokens, as a teacher sees them.

    Attributes:
        ids: `[N, k]`.
        log_probs: `[N, k]`, the logarithms of their probabilities.
    """

    ids: Tensor
    log_probs: Tensor


class Factors(NamedTuple):
    """Weights of the terms: a of CE, b of KL."""

    cross_entropy: float
    divergence: float


def top_tokens(logits: Tensor, k: int) -> TopTokens:
    """The k most likely next tokens of logits `[N, V]`; all of them but one where the vocabulary is no larger."""
    top, scores = logits.topk(min(k, logits.shape[-1] - 1), dim=-1), at_least_float32(logits)
    return TopTokens(top.indices, top.values.to(scores.dtype) - scores.logsumexp(-1, keepdim=True))


def frozen_head_loss(
    head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, teacher: TopTokens | None, factors: Factors
) -> tuple[Tensor, Tensor]:
    """a CE + b KL, summed over the tokens that have a target.

    Args:
        head: from states `[N, d]` to logits `[N, V]`; nothing in it may be trained.
        states: `[N, d]`.
        targets: `[N]`, `-100` where there is none.
        teacher: of the N tokens; None where b is 0.
        factors: a and b.

    Returns:
        A scalar with a gradient with respect to the states, and the sums of CE and KL `[2]` without one.
    """
    total, sums = _GradientBeside.apply(states, head, targets, teacher, factors)
    return total, sums


class _GradientBeside(torch.autograd.Function):
    """Computes the gradient with respect to the states in the forward pass, a chunk of tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Callable[[Tensor], Tensor],
        targets: Tensor,
        teacher: TopTokens | None,
        factors: Factors,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(states) if wanted else states
        sums = at_least_float32(states.new_zeros(2))
        for start in range(0, states.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            top = None if teacher is None else TopTokens(teacher.ids[part], teacher.log_probs[part])
            terms, own = _of_chunk(head, states[part], targets[part], top, factors, wanted)
            sums += terms
            if own is not None:
                gradient[part] = own
        if wanted:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return factors.cross_entropy * sums[0] + factors.divergence * sums[1], sums  # no product that autocast would round

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * total, None, None, None, None


def _of_chunk(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    targets: Tensor,
    teacher: TopTokens | None,
    factors: Factors,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """The summed CE and KL `[2]` of a chunk, and if wanted their gradient `[N, d]`; its logits are gone at the end.

    Its graph lives no longer, so whoever checkpoints or offloads what a forward pass saves is not given it.
    """
    states = states.detach().requires_grad_(wanted)
    with torch.set_grad_enabled(wanted), saved_tensors_hooks(_itself, _itself):
        logits = head(states)
    terms, slope = _terms_and_slope(logits.detach(), targets, teacher, factors)
    return terms, torch.autograd.grad(logits, states, slope.to(logits.dtype))[0] if wanted else None


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _terms_and_slope(logits: Tensor, targets: Tensor, teacher: TopTokens | None, factors: Factors) -> tuple[Tensor, Tensor]:
    """The summed CE and KL `[2]` of logits z `[N, V]`, and d(a CE + b KL)/dz `[N, V]`."""
    known = targets.ne(IGNORE_INDEX)
    a, b = (known * factor for factor in factors)
    index = targets.where(known, 0)[:, None]  # any other target that is no token is an error
    z = at_least_float32(logits)
    z = z - z.amax(-1, keepdim=True)
    target_score = z.gather(-1, index)
    top_scores = None if teacher is None else z.gather(-1, teacher.ids)
    weights = z.exp_()  # in place, as all that follows: this is the largest tensor of a training
    total = weights.sum(-1, keepdim=True)
    cross_entropy = (total.log() - target_score).squeeze(-1) * known
    if teacher is None or top_scores is None:
        slope = weights.mul_(a[:, None] / total)
        divergence = torch.zeros_like(cross_entropy)
    else:
        log_q, log_p = top_scores - total.log(), teacher.log_probs.to(z.dtype)
        q, p = log_q.exp(), log_p.exp()
        q_0, p_0 = ((1 - x.sum(-1)).clamp(min=_LEAST) for x in (q, p))
        divergence = ((p * (log_p - log_q)).sum(-1) + p_0 * (p_0.log() - q_0.log())) * known
        slope = weights.mul_(((a + b * (1 - p_0 / q_0)) / total.squeeze(-1))[:, None])
        slope.scatter_add_(-1, teacher.ids, b[:, None] * (q * (p_0 / q_0)[:, None] - p))
    slope.scatter_add_(-1, index, -a[:, None].to(slope.dtype))
    return torch.stack([cross_entropy.sum(), divergence.sum()]), slope
