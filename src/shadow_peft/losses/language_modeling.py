"""The training loss, counted by tokens.

    loss = CE(logits, labels) + w * CE(shadow_logits, labels) + v * t^2 * KL(p || q)
    p = softmax(logits / t)        q = softmax(shadow_logits / t)

The last term draws the shadow towards what the adapted base answers; no gradient of it reaches the base. All terms are sums
over the same targets divided by the same count: the number of targets of the whole optimiser step when the trainer knows it
(`num_items_in_batch`), else the number of targets at hand. So a step of 16 sequences has the same gradient whether it is
taken at once or accumulated, and a batch without any target has the loss 0.

Logits `[N, V]` of all tokens are never there at once: they are made from states `[N, d]` in chunks of tokens, of those that
have a target, and made again in the backward pass; or, where a head is one plain linear map, by torch's
`linear_cross_entropy`, which has the gradient ready after one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


def shifted(labels: Tensor) -> Tensor:
    """Targets of next-token prediction: `labels` `[B, T]` moved one to the left, the last one ignored."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def token_count(targets: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The divisor of a mean over targets: the trainer's count, or the count of `targets`, at least 1."""
    if num_items_in_batch is not None:
        return torch.as_tensor(num_items_in_batch, device=targets.device)
    return targets.ne(IGNORE_INDEX).sum().clamp(min=1)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in a dtype whose sums over a vocabulary are accurate."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def next_token_loss(logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Mean cross entropy of next-token prediction.

    Args:
        logits: `[B, T, V]`; computed in float32 or wider.
        targets: already shifted labels `[B, T]`, `-100` where there is none.
        num_items_in_batch: targets of the whole optimiser step; None counts those at hand.

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
        distillation: v, of the shadow's distance from the adapted base.
        temperature: t, which both distributions are softened by for that distance.

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
    """A way from states to logits."""

    def __call__(self, states: Tensor, /) -> Tensor:
        """Logits `[N, V]` of states `[N, d]`."""

    def linear_for(self, states: Tensor, /) -> tuple[Tensor, Tensor | None] | None:
        """Weight `[V, d]` and bias if the logits are nothing but a linear map of `states` that lies at hand, or None."""


class Logits:
    """A head for logits that are there already."""

    def __call__(self, states: Tensor) -> Tensor:
        """The logits themselves."""
        return states

    def linear_for(self, states: Tensor) -> None:
        """No map is left."""
        return None


class LogitSource(NamedTuple):
    """One network's way to its loss: the states `[B, T, d]` before its head, and the head."""

    states: Tensor
    head: Head

    def at(self, chosen: Tensor | None) -> LogitSource:
        """The states `[N, d]` of chosen tokens of the flattened batch; None takes all."""
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


CHUNK = 256
"""Tokens whose logits are there at once."""


def token_losses(
    base: LogitSource, shadow: LogitSource | None, targets: Tensor, count: Tensor | int | None, weights: LossWeights
) -> TokenLosses:
    """The terms of the loss of next-token prediction.

    Args:
        base: the adapted base's states `[B, T, d]` and head.
        shadow: the shadow's, or None where nobody reads it.
        targets: already shifted labels `[B, T]`, `-100` where there is none.
        count: targets of the whole optimiser step; None counts those at hand.
        weights: say whether the shadow's distance from the base is wanted, and its temperature.
    """
    divisor, flat = token_count(targets, count), targets.flatten()
    chosen = None
    if not torch.compiler.is_compiling():  # a compiled graph has one shape for any number of targets
        chosen = flat.ne(IGNORE_INDEX).nonzero().squeeze(1)
        flat = flat[chosen]
    base, shadow = base.at(chosen), None if shadow is None else shadow.at(chosen)
    if shadow is None or not weights.distillation:
        sums = [_cross_entropy(path, flat) for path in (base, shadow) if path is not None]
    else:
        sums = list(_in_chunks(_Terms(base.head, shadow.head, weights.temperature), flat, base.states, shadow.states))
    means = [total / divisor.to(total.device) for total in sums]
    return TokenLosses(*means, *[None] * (3 - len(means)))


def _cross_entropy(path: LogitSource, targets: Tensor) -> Tensor:
    """Summed cross entropy of targets `[N]`, by torch's fused form where the head allows it."""
    states, head = path
    linear = head.linear_for(states) if _FUSED and states.shape[0] else None
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
            terms.append(_distance(logits.detach(), shadow_logits, targets, self.temperature))
        return torch.stack(terms)


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets.to(logits.device), ignore_index=IGNORE_INDEX, reduction="sum")


def _distance(logits: Tensor, shadow_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """t^2 KL(softmax(logits / t) || softmax(shadow_logits / t)), summed over the tokens that have a target."""
    teacher = (logits / temperature).log_softmax(-1)
    student = (shadow_logits / temperature).log_softmax(-1)
    by_token = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * by_token.masked_fill(targets.to(by_token.device).eq(IGNORE_INDEX), 0).sum()


def _in_chunks(terms: Callable[..., Tensor], targets: Tensor, *states: Tensor) -> Tensor:
    """Sum of `terms` over chunks of tokens, whose logits are made again in the backward pass."""
    total: Tensor | None = None
    for start in range(0, max(targets.shape[0], 1), CHUNK):
        chunk = [tensor[start : start + CHUNK] for tensor in (targets, *states)]
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        part = checkpoint(terms, *chunk, use_reentrant=False, preserve_rng_state=False) if again else terms(*chunk)
        total = part if total is None else total + part
    assert total is not None
    return total


def problem_type_of(labels: Tensor, num_labels: int, declared: str | None) -> ProblemType:
    """The kind of classification problem, as transformers decides it: the config's word, else from the labels."""
    kinds: dict[str, ProblemType] = {
        "regression": "regression",
        "single_label_classification": "single_label_classification",
        "multi_label_classification": "multi_label_classification",
    }
    if declared is not None:
        if declared not in kinds:
            raise ValueError(f"config.problem_type must be one of {', '.join(kinds)}, got {declared!r}.")
        return kinds[declared]
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: ProblemType, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Mean loss of a classification or regression head.

    Args:
        logits: `[B, C]`; computed in float32 or wider.
        labels: `[B]` class indices, `-100` where there is none; `[B]` or `[B, C]` floats for regression; `[B, C]` multi
            label.
        problem_type: which loss: squared error, cross entropy, or binary cross entropy.
        num_items_in_batch: labels of the whole optimiser step; None counts those at hand.

    Returns:
        A scalar.
    """
    logits, labels = at_least_float32(logits), labels.to(logits.device)
    if problem_type == "regression":
        total = F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype), reduction="sum")
    elif problem_type == "single_label_classification":
        total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    else:
        total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    return total / token_count(labels, num_items_in_batch)
