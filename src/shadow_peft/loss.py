"""The training loss, counted by tokens.

    loss = CE(logits, labels) + weight * CE(shadow_logits, labels)

Both terms are sums over the same targets divided by the same count: the number of targets of the whole optimiser step
when the trainer knows it (`num_items_in_batch`), else the number of targets at hand. So a step of 16 sequences has the
same gradient whether it is taken at once or accumulated, and a batch without any target has the loss 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

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
