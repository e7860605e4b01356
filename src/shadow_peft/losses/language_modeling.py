"""The training loss of a causal language model and its shadow, as a mean over tokens.

    loss = CE(logits, labels) + w * CE(shadow_logits, labels) + v * t^2 * KL(p || q)      see `distillation`

No gradient of the last term reaches the base. All terms are sums over the same targets divided by the same count: the number
of targets of the whole optimiser step when the trainer knows it (`num_items_in_batch`), else the number of targets of this
batch. So a step of 16 sequences has the same gradient whether it is taken at once or accumulated, and a batch without any
target has the loss 0.

Logits `[N, V]` of all tokens never exist at once: they are computed from states `[N, d]` in chunks of tokens, of those that
have a target. Where a head is one plain linear map in float32, torch's `linear_cross_entropy` computes them once; behind any
other frozen head `losses.frozen_head` does, with the gradient of the states beside them; else they are computed again in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shadow_peft.losses.distillation import distillation_sum
from shadow_peft.losses.frozen_head import CHUNK, Factors, frozen_head_loss
from shadow_peft.losses.reduction import IGNORE_INDEX, at_least_float32, token_count


def shifted(labels: Tensor) -> Tensor:
    """Targets of next-token prediction: `labels` `[B, T]` moved one to the left, the last one ignored."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def next_token_loss(logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Mean cross entropy of next-token prediction.

    Args:
        logits: `[B, T, V]`; computed in float32 or wider.
        targets: already shifted labels `[B, T]`, `-100` where there is none.
        num_items_in_batch: targets of the whole optimiser step; None counts those of this batch.

    Returns:
        A scalar, in nats per target.
    """
    targets = targets.to(logits.device)
    total = F.cross_entropy(
        at_least_float32(logits).flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return total / token_count(targets, num_items_in_batch)


@dataclass(frozen=True)
class LossWeights:
    """Factors of the terms.

    Attributes:
        shadow: w, of the shadow's cross entropy.
        distillation: v, of the shadow's divergence from the adapted base.
        temperature: t, which softens both distributions of the divergence.

    Raises:
        ValueError: a negative factor, or a temperature that is not positive.
    """

    shadow: float = 0.05
    distillation: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("shadow_loss_weight", self.shadow), ("distillation_weight", self.distillation)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        if self.temperature <= 0:
            raise ValueError(f"distillation_temperature must be positive, got {self.temperature}.")

    @property
    def need_shadow(self) -> bool:
        """Whether a term reads the shadow."""
        return bool(self.shadow or self.distillation)


class Head(Protocol):
    """Computes logits of hidden states."""

    def __call__(self, states: Tensor, /) -> Tensor:
        """Logits `[N, V]` of states `[N, d]`."""

    def linear_for(self, states: Tensor, /) -> tuple[Tensor, Tensor | None] | None:
        """Weight `[V, d]` and bias if the logits are one linear map of `states` whose weight is in memory, or None."""

    def is_frozen_for(self, states: Tensor, /) -> bool:
        """Whether nothing in it is trained, and all of it is in memory where the states are."""


class Logits:
    """A head for logits that were computed already."""

    def __call__(self, states: Tensor) -> Tensor:
        """The logits themselves."""
        return states

    def linear_for(self, states: Tensor) -> None:
        """No linear map is left."""
        return None

    def is_frozen_for(self, states: Tensor) -> bool:
        """The gradient of computed logits is as large as they are, so it is not kept beside them."""
        return False


class LogitSource(NamedTuple):
    """Where logits come from: the states `[B, T, d]` before a head, and the head."""

    states: Tensor
    head: Head

    def select(self, chosen: Tensor | None) -> LogitSource:
        """The source of the chosen tokens `[N, d]` of the flattened batch; None takes all."""
        flat = self.states.flatten(0, -2)
        return LogitSource(flat if chosen is None else flat[chosen.to(flat.device)], self.head)


class TokenLosses(NamedTuple):
    """Means over targets, in nats; None where a term is not wanted."""

    base: Tensor
    shadow: Tensor | None
    distillation: Tensor | None

    def total(self, weights: LossWeights) -> Tensor:
        """The weighted sum."""
        total = self.base
        if self.shadow is not None and weights.shadow:
            total = total + weights.shadow * self.shadow.to(total.device)
        if self.distillation is not None:
            total = total + weights.distillation * self.distillation.to(total.device)
        return total


def total_losses(parts: Sequence[TokenLosses]) -> TokenLosses:
    """The sum of the terms of parts of a batch, all with the divisor of the whole; a part may lack a term."""
    if len(parts) == 1:
        return parts[0]
    columns = [[term for term in terms if term is not None] for terms in zip(*parts, strict=True)]
    base, shadow, distillation = (torch.stack(terms).sum() if terms else None for terms in columns)
    assert base is not None
    return TokenLosses(base, shadow, distillation)


def token_losses(
    base: LogitSource, shadow: LogitSource | None, targets: Tensor, count: Tensor | int | None, weights: LossWeights
) -> TokenLosses:
    """The terms of the loss of next-token prediction.

    Args:
        base: the adapted base's states `[B, T, d]` and head.
        shadow: the shadow's, or None where no term needs it.
        targets: already shifted labels `[B, T]`, `-100` where there is none.
        count: targets of the whole optimiser step; None counts those of this batch.
        weights: say whether the distillation term is wanted, and its temperature.
    """
    divisor, flat = token_count(targets, count), targets.flatten()
    chosen = None
    if not torch.compiler.is_compiling():  # a compiled graph has one shape for any number of targets
        chosen = flat.ne(IGNORE_INDEX).nonzero().squeeze(1)
        flat = flat[chosen]
    base, shadow = base.select(chosen), None if shadow is None else shadow.select(chosen)
    if shadow is None or not weights.distillation:
        sums = [_cross_entropy(source, flat) for source in (base, shadow) if source is not None]
    else:
        sums = list(_in_chunks(_Terms(base.head, shadow.head, weights.temperature), flat, base.states, shadow.states))
    means = [total / divisor.to(total.device) for total in sums]
    return TokenLosses(*means, *[None] * (3 - len(means)))


def _cross_entropy(source: LogitSource, targets: Tensor) -> Tensor:
    """Summed cross entropy of targets `[N]`, in the cheapest form that the head allows."""
    states, head = source
    linear = head.linear_for(states) if _FUSED and states.shape[0] else None
    if linear is None and head.is_frozen_for(states):
        return frozen_head_loss(head, states, targets.to(states.device), None, _CROSS_ENTROPY)[0]
    if linear is None:
        return _in_chunks(_Terms(head), targets, states)[0]
    weight, bias = linear
    return F.linear_cross_entropy(
        states.to(weight.dtype),
        weight,
        targets.to(states.device),
        linear_bias=bias,
        reduction="sum",
        ignore_index=IGNORE_INDEX,
        options=torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=min(CHUNK, states.shape[0]), allow_retain_graph=torch.compiler.is_compiling()
        ),
    )


_FUSED = hasattr(F, "linear_cross_entropy")  # from torch 2.13 on
_CROSS_ENTROPY = Factors(1.0, 0.0)


@dataclass(frozen=True)
class _Terms:
    """The summed terms `[1]`, or with a shadow `[3]`, of a chunk of tokens."""

    head: Head
    shadow_head: Head | None = None
    temperature: float = 1.0

    def __call__(self, targets: Tensor, states: Tensor, shadow_states: Tensor | None = None) -> Tensor:
        logits = at_least_float32(self.head(states))
        terms = [_summed(logits, targets)]
        if self.shadow_head is not None and shadow_states is not None:
            shadow_logits = at_least_float32(self.shadow_head(shadow_states)).to(logits.device)
            terms.append(_summed(shadow_logits, targets))
            terms.append(distillation_sum(logits.detach(), shadow_logits, targets, self.temperature))
        return torch.stack(terms)


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets.to(logits.device), ignore_index=IGNORE_INDEX, reduction="sum")


def _in_chunks(terms: Callable[..., Tensor], targets: Tensor, *states: Tensor) -> Tensor:
    """Sum of `terms` over chunks of tokens, whose logits are recomputed in the backward pass."""
    total: Tensor | None = None
    for start in range(0, max(targets.shape[0], 1), CHUNK):
        chunk = [tensor[start : start + CHUNK] for tensor in (targets, *states)]
        recompute = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        part = checkpoint(terms, *chunk, use_reentrant=False, preserve_rng_state=False) if recompute else terms(*chunk)
        total = part if total is None else total + part
    assert total is not None
    return total
